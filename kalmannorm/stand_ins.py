"""Which Kalman layer takes the place of which stock layer, and the way from one to the other and back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

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

# Stock layers and their Kalman layers; subclasses that override none of these methods are replaced likewise.
_MUST_BE_STOCK = ("forward", "train", "__call__")
_STOCK: dict[str, dict[type[nn.Module], type[KalmanLayer]]] = {
    "batch": {
        nn.BatchNorm1d: KalmanNorm1d,
        nn.BatchNorm2d: KalmanNorm2d,
        nn.BatchNorm3d: KalmanNorm3d,
        nn.SyncBatchNorm: KalmanNorm,
        _BatchNorm: KalmanNorm,
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
_RANKS = {nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,)}
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def stand_in(layer: nn.Module) -> tuple[str, type[KalmanLayer] | None]:
    """The kind of a layer, ``""`` for none of :data:`KINDS`; and the class to replace it, None if no class can."""
    # A parametrization, for one, adds other tensors or submodules.
    has_others = not {*layer._parameters, *layer._buffers} <= _TENSORS
    if (found := _ELSEWHERE.get(f"{type(layer).__module__}.{type(layer).__name__}")) is not None:
        return (found[0], None) if has_others else found
    if isinstance(layer, KalmanLayer):
        return "", None
    if type(layer).__name__.endswith("FrozenBatchNorm2d") and layer._buffers.keys() == _FROZEN:
        return "batch", KalmanNorm2d
    its_class = getattr(layer, "cls_to_become", None) or type(layer)  # of a lazy layer, after its first call
    for kind, classes in _STOCK.items():
        for stock, kalman in classes.items():
            if issubclass(its_class, stock):
                overrides = any(getattr(type(layer), name) is not getattr(stock, name) for name in _MUST_BE_STOCK)
                return kind, None if has_others or layer._modules or overrides else kalman
    return "", None


def stock_ancestor(layer: nn.Module) -> type:
    """The class of torch.nn that a layer's class is derived from."""
    return next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))


def device_and_dtype(tensors: Iterable[Tensor]) -> dict[str, Any]:
    """Device and type of the first floating-point tensor, if there is one, as keyword arguments."""
    first = next((t for t in tensors if t.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}


def kalman_layer(layer: nn.Module, name: str, kalman: type[KalmanLayer], options: dict[str, Any]) -> KalmanLayer:
    """A Kalman layer with the tensors, submodules and training flag of a stock layer, which keeps its hooks."""
    _refuse(layer, name, kalman)
    options = options | device_and_dtype((*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
    synchronizes = isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized()
    if synchronizes and "process_group" not in options and options.get("stats_batch_size") is None:
        options["process_group"] = layer.process_group or torch.distributed.group.WORLD
    new: Any = kalman(*_arguments(layer), **options)
    if "weight" in layer._buffers:  # a FrozenBatchNorm2d's, which must not move with those of the new layer
        with torch.no_grad():
            for tensor in _FROZEN:
                getattr(new, tensor).copy_(layer._buffers[tensor])
    else:
        _share_tensors(new, layer)
    new._modules.update(layer._modules)
    new.training = layer.training  # not `train(...)`: what is inside a layer keeps a flag of its own
    new.frozen = is_frozen(layer)
    new.layer_name = name
    for kind, ranks in _RANKS.items():
        if isinstance(layer, kind):
            new._ranks = ranks
    for added in (new.gain, new.process_noise):
        if isinstance(added, nn.Parameter) and new.weight is not None:
            added.requires_grad_(new.weight.requires_grad)
    if not _is_torchs(type(layer)) and isinstance(layer, _NormBase | nn.GroupNorm):
        new.replaces = (_without_tensors(layer),)
        # What its network may read off a subclass.
        new.__dict__.update({key: value for key, value in vars(layer).items() if not hasattr(new, key)})
        if not _is_torchs(getattr(layer, "_check_input_dim", nn.Module)):
            new._ranks = KalmanNorm._ranks
    return new  # type: ignore[no-any-return]


def _refuse(layer: nn.Module, name: str, kalman: type[KalmanLayer]) -> None:
    """Raise for a layer that this Kalman layer cannot replace."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and (
        layer.has_uninitialized_params() or getattr(layer, "num_features", 1) == 0  # it may have no parameters
    ):
        raise ValueError(
            f"{type(layer).__name__} {name!r} is lazy and does not know its channels yet: run the model once in "
            "eval() before kalmannorm.convert"
        )
    if any(hasattr(t, "device_mesh") for t in layer.parameters(recurse=False)):
        raise ValueError(
            f"{type(layer).__name__} {name!r} is sharded already, with a DTensor as a parameter, expected a "
            "torch.Tensor: call kalmannorm.convert before fully_shard"
        )
    if issubclass(kalman, GroupKalmanNorm) and getattr(layer, "track_running_stats", False):
        raise ValueError(
            f"{type(layer).__name__} {name!r} tracks running statistics, which GroupKalmanNorm has not: "
            "expected track_running_stats=False"
        )


def _is_torchs(definition: Any) -> bool:
    return f"{definition.__module__}.".startswith("torch.")


def stock_layer(layer: KalmanLayer) -> nn.Module:
    """The layer that a Kalman layer replaced, or torch.nn's and the dropout and activation behind, with its tensors."""
    behind: list[nn.Module] = []
    if layer.replaces:
        stock: Any = _without_tensors(layer.replaces[0])
        for option in {"eps", "momentum"} & vars(layer).keys():
            setattr(stock, option, getattr(layer, option))
        stock._modules.update(layer._modules)
    else:
        pairs = [pair for kind in ("batch", "group") for pair in _STOCK[kind].items()]
        stock = next(stock for stock, kalman in pairs if isinstance(layer, kalman))(*_arguments(layer))
        children = layer.named_children()
        behind = [it for name, it in children if name != "parametrizations" and not isinstance(it, nn.Identity)]
    _share_tensors(stock, layer)
    stock.training = layer.training and not layer.frozen
    if behind:
        stock = nn.Sequential(stock, *behind)
        stock.training = layer.training
    return stock  # type: ignore[no-any-return]


def _arguments(layer: Any) -> tuple[Any, ...]:
    """The positional arguments of a layer like this one, stock or Kalman."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups, layer.num_channels, layer.eps, layer.affine
    if isinstance(layer, _InstanceNorm):
        return layer.num_features, layer.num_features, layer.eps, layer.affine
    if isinstance(layer, _BatchNorm):
        return layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    return layer.weight.shape[0], getattr(layer, "eps", 1e-5)  # FrozenBatchNorm2d


def _share_tensors(new: nn.Module, old: nn.Module) -> None:
    """Share the tensors of the names that both layers have. A missing counter of batches stays the new layer's own."""
    new._parameters.update({name: t for name, t in old._parameters.items() if name in new._parameters})
    buffers = {name: t for name, t in old._buffers.items() if name in new._buffers}
    if buffers.get("running_mean") is not None and buffers.get("num_batches_tracked") is None:
        buffers.pop("num_batches_tracked", None)
    new._buffers.update(buffers)


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
        hooks = getattr(old, name)
        for hook in hooks.values() if name.startswith("_load") else ():
            if getattr(hook, "with_module", False):  # torch's own wrapper
                hook.module = weakref.ref(new)
        setattr(new, name, hooks)
        setattr(old, name, type(hooks)())
    new._is_full_backward_hook, old._is_full_backward_hook = old._is_full_backward_hook, None
