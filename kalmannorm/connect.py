"""The hooks by which beliefs flow between a network's Kalman layers, and the beliefs about its inputs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from kalmannorm.gaussian import Gaussian
from kalmannorm.traversal import kalman_layers
from kalmannorm.watch import Watch

_M = TypeVar("_M", bound=nn.Module)
InputStats = tuple[Any, Any] | Mapping[str, tuple[Any, Any]]


def connect(model: _M, *, input_stats: InputStats | None = None) -> _M:
    """Let beliefs flow between a network's Kalman layers, as :func:`convert` does.

    You need it for a model that you write with Kalman layers, and after layers were added or replaced. It puts two
    forward hooks on each module that contains a Kalman layer, and sets the layers' names.

    Args:
        model: the network.
        input_stats: as in :func:`convert`. None leaves those that were given before.

    Returns:
        The model.

    Raises:
        ValueError: without a Kalman layer, or if ``input_stats`` is not one mean and one positive standard deviation
            a channel.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), kn.KalmanNorm2d(8))
        >>> model = kn.connect(model, input_stats=([0.0] * 3, [1.0] * 3))
        >>> kn.describe(model, torch.randn(1, 3, 8, 8)).with_prior
        1
    """
    layers = dict(kalman_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Kalman layer to connect, expected at least one")
    given = input_beliefs(model, input_stats)
    for name, layer in layers.items():
        layer.layer_name = name
    for name, module in model.named_modules():
        known = disconnect(module)
        if module is model and given:
            known = given
        # A layer alone needs hooks only for what it is told of its input.
        inside = [layer for _, layer in kalman_layers(module) if layer is not module or (module is model and known)]
        if inside:
            arguments = [n for n, p in _arguments(module).items() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
            watch = Watch(inside, known, arguments, name)
            module.register_forward_pre_hook(watch.open, with_kwargs=True, prepend=True)
            module.register_forward_hook(watch.close, always_call=True)
    return model


def disconnect(module: nn.Module) -> dict[str | None, Gaussian]:
    """Remove the hooks of :func:`connect` from a module; return the beliefs about the module's inputs."""
    known: dict[str | None, Gaussian] = {}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(watch := getattr(hook, "__self__", None), Watch):
                known = watch.given
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return known


def input_beliefs(model: nn.Module, input_stats: InputStats | None) -> dict[str | None, Gaussian]:
    """The beliefs that ``input_stats`` describe, by names of arguments; None for the first floating-point tensor."""
    if input_stats is None:
        return {}
    if getattr(model.forward, "__func__", None) is nn.Module.forward:  # a plain ModuleList, say
        raise ValueError(
            f"input_stats got {type(model).__name__}, whose parts are called and not itself, expected a module with a "
            "forward"
        )
    if not isinstance(input_stats, Mapping):
        return {None: _belief(input_stats, "input_stats")}
    arguments = _arguments(model)
    for name in input_stats:
        first = re.split(r"[.\[]", str(name))[0]  # of a place inside of an argument, as "batch['image']"
        if first not in arguments and not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
            raise ValueError(
                f"input_stats got {name!r}, expected names of what {type(model).__name__}'s forward takes: "
                f"{list(arguments)}"
            )
    return {name: _belief(stats, f"input_stats[{name!r}]") for name, stats in input_stats.items()}


def _belief(stats: tuple[Any, Any], what: str) -> Gaussian:
    try:
        mean, std = (torch.as_tensor(t, dtype=torch.float64, device="cpu").detach() for t in stats)
    except (TypeError, ValueError, RuntimeError):  # not two of numbers
        mean, std = torch.zeros(1), torch.zeros(1)
    mean, std = (t.flatten() if t.ndim else t for t in (mean, std))
    good = (std > 0) & (std < math.inf) & mean.isfinite() if mean.shape == std.shape else torch.zeros(0)
    if not good.numel() or not bool(good.all()):
        raise ValueError(
            f"{what} got {stats!r}, expected (mean, std), one finite number a channel each, std above 0"
        )
    return Gaussian(mean, std.square())


def _arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a module's forward, or of that of the module inside, for a compiled one."""
    module = getattr(module, "_orig_mod", module)
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # of a function that is not Python's
        return {}
