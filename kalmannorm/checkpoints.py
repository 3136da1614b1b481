"""Activation checkpoints, which recompute regions of the forward pass in the backward pass."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from kalmannorm.kernels.autograd import saved_tensor_hooks

_T = TypeVar("_T")
# Of each region, what `of_first_run` was given.
_FIRST: weakref.WeakKeyDictionary[Any, dict[Any, list[Any]]] = weakref.WeakKeyDictionary()

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


def _region(hooks: Any) -> tuple[Any, bool]:
    """The region that these hooks for saved tensors identify, or None; and whether it runs again."""
    pack = inspect.unwrap(hooks[0]) if hooks else None  # torch hides that of a second run from compilers
    for cell in getattr(pack, "__closure__", None) or ():
        region = cell.cell_contents
        again = isinstance(region, weakref.ref)
        region = region() if again else region
        if isinstance(region, checkpoint._CheckpointFrame):
            return region, again
    return None, False


def enter_again(hooks: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Enter a context whenever the region that these hooks for saved tensors identify is recomputed."""
    region, _ = _region(hooks)
    if region is not None and getattr(region.recompute_fn, "func", None) is not _within:
        region.recompute_fn = partial(_within, context, region.recompute_fn)


def of_first_run(place: Any, value: _T) -> _T:
    """The value itself, or where a region runs again: the one that the same call of ``place`` had in its first run."""
    region, again = _region(saved_tensor_hooks())
    if region is None:
        return value
    values = _FIRST.setdefault(region, {}).setdefault(place, [])
    values.append(values.pop(0) if again and values else value)  # in the order of the calls, for a third run too
    return values[-1]  # type: ignore[no-any-return]
