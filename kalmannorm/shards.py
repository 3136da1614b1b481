"""FSDP reshards parameters after a module's forward, so the moments of its outputs are evaluated first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.paper import drawn, maps_for
from kalmannorm.propagation import exact, without_autocast
from kalmannorm.recording import current, paused
from kalmannorm.steps import Step, found_in, put, step_of


def watch_shards(module: nn.Module) -> None:
    """Evaluate the outputs' moments of each module whose parameters FSDP reshards.

    It is called whenever the mode opens, as FSDP may wrap modules after :func:`kalmannorm.connect`.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or torch.compiler.is_compiling() or not torch.distributed.is_initialized():
        return
    for each in module.modules():
        if isinstance(each, fsdp.FSDPModule) and _leave_shard not in each._forward_hooks.values():
            each.register_forward_hook(_leave_shard, prepend=True)  # before FSDP's own


def _leave_shard(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a module whose parameters FSDP reshards."""
    if (mode := current()) is None:
        return
    with paused():
        for tensor in found_in((output,), Tensor):
            if (step := step_of(tensor)) is not None:
                with without_autocast(tensor.device):
                    put(tensor, _without_shards(step, module, mode.layers))


def _without_shards(step: Step, module: Any, layers: Sequence[Any]) -> Step:
    """A copy of a step with its moments, and its draws if a layer needs them, computed; their backward pass asks FSDP
    to gather the module's parameters.
    """
    called = step.function, step.args, step.kwargs
    new = Step(*called, step.shape, step.index, step.source, recorded_in=step.recorded_in)
    belief = exact(step)
    if isinstance(belief, Gaussian):
        belief = Gaussian(_gathered(belief.mean, module), _gathered(belief.var, module), step.shape)
    new.belief = belief
    if (maps := _maps_drawn(layers, step)) is not None:
        draws = drawn(step, maps)
        new.draws = draws if isinstance(draws, Unknown) else _gathered(draws, module)
        new.maps_drawn = maps
    return new


def _maps_drawn(layers: Sequence[Any], step: Step) -> int | None:
    """How many feature maps a layer draws; None without such a layer."""
    for layer in layers:
        if layer.estimator == "monte_carlo" and step.shape:
            with suppress(ValueError):
                return maps_for(step.shape, layer.statistic_groups(step.shape[0]))
    return None


def _gathered(tensor: Tensor, module: Any) -> Tensor:
    """A copy (an output's mean may be the bias itself) whose backward pass first gathers the module's parameters."""
    tensor = tensor.clone()
    if tensor.requires_grad:
        tensor.register_hook(lambda _: module.unshard())
    return tensor
