"""Which Kalman layer takes the place of which stock layer, and the way from one to the other and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kalmannorm.freezing import is_frozen
from kalmannorm.modules import (
    GroupKalmanNorm,
    GroupKalmanNormAct,
    KalmanLayer,
    KalmanNorm,
    KalmanNorm1d,
    KalmanNorm2d,
    KalmanNorm3d,
    KalmanNormAct2d,
)

__all__ = ["KINDS", "device_and_dtype", "kalman_layer", "move_hooks", "stand_in", "stock_ancestor", "stock_layer"]

# Stock layers and their Kalman layers; subclasses with the stock layer's forward are replaced likewise.
_STOCK: dict[str, dict[type[nn.Module], type[KalmanLayer]]] = {
    "batch": {
        nn.BatchNorm1d: KalmanNorm1d,
        nn.BatchNorm2d: KalmanNorm2d,
        nn.BatchNorm3d: KalmanNorm3d,
        nn.SyncBatchNorm: KalmanNorm,
    },
    "group": {nn.GroupNorm: GroupKalmanNorm},
    "instance": dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), GroupKalmanNorm),
}
KINDS = tuple(_STOCK)
# Other libraries' layers with a forward of their own, by name, so that nothing is imported for them.
_ELSEWHERE: dict[str, tuple[str, type[KalmanLayer]]] = {
    "timm.layers.norm_act.BatchNormAct2d": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.SyncBatchNormAct": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.GroupNormAct": ("group", GroupKalmanNormAct),
    "timm.layers.norm_act.GroupNorm1Act": ("group", GroupKalmanNormAct),
    "timm.layers.norm.GroupNorm": ("group", GroupKalmanNorm),
    "timm.layers.norm.GroupNorm1": ("group", GroupKalmanNorm),
}
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# The buffers of torchvision's FrozenBatchNorm2d. transformers has a copy of it a detector, some without `eps`.
_FROZEN = {"weight", "bias", "running_mean", "running_var"}
_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,)
}  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def stand_in(layer: nn.Module) -> tuple[str, type[KalmanLayer] | None]:
    """The kind of a layer, ``""`` for none of :data:`KINDS`, and the class that can take its place; None for a
    subclass that computes something of its own.
    """
    if (found := _ELSEWHERE.get(f"{type(layer).__module__}.{type(layer).__name__}")) is not None:
        return found
    if isinstance(layer, KalmanLayer):
        return "", None
    if type(layer).__name__.endswith("FrozenBatchNorm2d") and layer._buffers.keys() == _FROZEN:
        return "batch", KalmanNorm2d
    for kind, classes in _STOCK.items():
        for stock, kalman in classes.items():
            if isinstance(layer, stock):
                # A parametrization, for one, adds other tensors or submodules.
                has_others = not {*layer._parameters, *layer._buffers, *layer._modules} <= _TENSORS
                return kind, None if has_others or type(layer).forward is not stock.forward else kalman
    return "", None


def stock_ancestor(layer: nn.Module) -> type:
    """The class of torch.nn that a layer's class is derived from."""
    return next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))


def device_and_dtype(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Device and type of the first floating-point tensor, if there is one, as keyword arguments."""
    first = next((t for t in tensors if t.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}


# -- to Kalman layers ------------------------------------------------------------------------------


def kalman_layer(layer: nn.Module, name: str, kalman: type[KalmanLayer], options: dict[str, Any]) -> KalmanLayer:
    """A Kalman layer with the tensors, submodules and training flag of a stock layer, which keeps its hooks.

    Raises:
        ValueError: for a lazy layer, or instance normalization with running statistics.
    """
    options = options | device_and_dtype((*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
    if issubclass(kalman, GroupKalmanNorm):
        new: Any = _from_group_norm(layer, name, kalman, options)
    elif hasattr(layer, "num_batches_tracked"):
        new = _from_batch_norm(layer, name, kalman, options)
    else:
        new = _from_frozen_batch_norm(layer, kalman, options)
    _share_tensors(new, layer)
    new._modules.update(layer._modules)
    new.training = layer.training  # not `train(...)`: what is inside a layer keeps a flag of its own
    for added in (new.gain, new.process_noise):
        if isinstance(added, nn.Parameter) and new.weight is not None:
            added.requires_grad_(new.weight.requires_grad)
    new.layer_name = name
    if type(layer).__module__.split(".")[0] != "torch" and isinstance(layer, _NormBase | nn.GroupNorm):
        new.replaces = (_without_tensors(layer),)
    return new  # type: ignore[no-any-return]


def _from_batch_norm(layer: Any, name: str, kalman: Any, options: dict[str, Any]) -> KalmanLayer:
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(layer).__name__} {name!r} is lazy: run the model once before kalmannorm.convert")
    synchronizes = isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized()
    if synchronizes and "process_group" not in options and options.get("stats_batch_size") is None:
        options["process_group"] = layer.process_group or torch.distributed.group.WORLD
    new: KalmanLayer = kalman(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, **options
    )
    new.frozen = is_frozen(layer)
    return new


def _from_frozen_batch_norm(layer: Any, kalman: Any, options: dict[str, Any]) -> KalmanLayer:
    """Its weight and bias are buffers, and become parameters."""
    new: KalmanLayer = kalman(layer.weight.shape[0], getattr(layer, "eps", 1e-5), **options)
    with torch.no_grad():
        new.weight.copy_(layer.weight)
        new.bias.copy_(layer.bias)
    return new


def _from_group_norm(layer: Any, name: str, kalman: Any, options: dict[str, Any]) -> KalmanLayer:
    if isinstance(layer, nn.GroupNorm):
        groups, channels = layer.num_groups, layer.num_channels
    elif layer.track_running_stats:
        raise ValueError(
            f"{type(layer).__name__} {name!r} tracks running statistics, which GroupKalmanNorm has not: "
            "expected track_running_stats=False"
        )
    else:
        groups = channels = layer.num_features
    new: GroupKalmanNorm = kalman(groups, channels, layer.eps, layer.affine, **options)
    new._ranks = next((ranks for kind, ranks in _RANKS.items() if isinstance(layer, kind)), new._ranks)
    return new


# -- and back --------------------------------------------------------------------------------------


def stock_layer(layer: KalmanLayer) -> nn.Module:
    """The layer that a Kalman layer replaced, or else torch.nn's, with the same tensors; the latter is followed by the
    Kalman layer's dropout and activation.
    """
    stock: Any
    if layer.replaces:
        stock = _without_tensors(layer.replaces[0])
        for option in {"eps", "momentum"} & vars(layer).keys():
            setattr(stock, option, getattr(layer, option))
        stock._modules.update(layer._modules)
    elif isinstance(layer, GroupKalmanNorm):
        stock = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
    else:
        assert isinstance(layer, KalmanNorm)
        kind: Any = next(stock for stock, kalman in _STOCK["batch"].items() if isinstance(layer, kalman))
        stock = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    _share_tensors(stock, layer)
    stock.training = layer.training and not layer.frozen
    behind = [] if layer.replaces else [m for m in layer.children() if not isinstance(m, nn.Identity)]
    if not behind:
        return stock  # type: ignore[no-any-return]
    both = nn.Sequential(stock, *behind)
    both.training = layer.training
    return both


def _share_tensors(new: nn.Module, old: nn.Module) -> None:
    """Put the tensors of an old layer into a new one, under the names that both have."""
    new._parameters.update({name: t for name, t in old._parameters.items() if name in new._parameters})
    new._buffers.update({name: t for name, t in old._buffers.items() if name in new._buffers})


def _without_tensors(layer: nn.Module) -> nn.Module:
    """A copy of a layer without its tensors, submodules and hooks, which its stand-in holds."""
    shell: Any = copy.copy(layer)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(shell, name, dict.fromkeys(getattr(layer, name)))
    if hasattr(shell, "process_group"):
        shell.process_group = None
    for name in _HOOKS:
        setattr(shell, name, type(getattr(layer, name))())
    return shell  # type: ignore[no-any-return]


def move_hooks(new: nn.Module, old: nn.Module) -> None:
    """Move the hooks that users have registered. The dicts themselves move, so that handles still remove."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
        setattr(old, name, type(getattr(old, name))())
