"""Activation checkpoints, which recompute regions of the forward pass in the backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint


def is_recomputing() -> bool:
    """Whether this thread runs a backward pass, in which a checkpoint recomputes the forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_reentrant() -> bool:
    """Whether the backward pass of an autograd function recomputes it, as with ``use_reentrant=True``: such a function
    takes and returns tensors without beliefs. Other checkpoints recompute when autograd unpacks saved tensors.
    """
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook" and code.co_filename == checkpoint.__file__:
            return False
        if code.co_name == "backward" and code.co_varnames:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _within(context: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any], *args: Any) -> Any:
    with context():
        return function(*args)


def enter_again(hooks: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Enter a context whenever the region that these hooks for saved tensors identify is recomputed."""
    for cell in hooks[0].__closure__ or () if hasattr(hooks[0], "__closure__") else ():
        region = cell.cell_contents
        is_region = isinstance(region, checkpoint._CheckpointFrame)
        if is_region and getattr(region.recompute_fn, "func", None) is not _within:
            region.recompute_fn = partial(_within, context, region.recompute_fn)
