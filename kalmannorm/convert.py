"""From stock layers to Kalman layers and back, in place."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fuse_graph

from kalmannorm.gaussian import Gaussian
from kalmannorm.modules import GroupKalmanNorm, KalmanNorm, KalmanNorm1d, KalmanNorm2d, KalmanNorm3d
from kalmannorm.propagation import Watch

__all__ = ["connect", "convert", "fuse", "kalman_layers", "to_batchnorm"]

_M = TypeVar("_M", bound=nn.Module)
KalmanLayer = KalmanNorm | GroupKalmanNorm

_BATCH: dict[type[nn.Module], type[KalmanNorm]] = {
    nn.BatchNorm1d: KalmanNorm1d,
    nn.BatchNorm2d: KalmanNorm2d,
    nn.BatchNorm3d: KalmanNorm3d,
    nn.SyncBatchNorm: KalmanNorm,
}
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_KINDS = ("batch", "group", "instance")
_OPTIONS = ("gain", "process_noise", "spread", "carry", "estimator", "stats_batch_size", "guard", "process_group")


def convert(model: _M, *, layers: Sequence[str] = ("batch",),
            input_stats: tuple[Any, Any] | None = None, **options: Any) -> _M:  # fmt: skip
    """Replace a network's normalization layers by Kalman layers, in place, and connect them.

    The new layers hold the very same parameters and buffers, so an optimizer made before keeps
    working on them; only gain and process noise are new (add them to it). Device, dtype, training
    flag and ``requires_grad`` stay. ``eval()`` output does not change by one bit.

    Args:
        model: any network. If it is itself a normalization layer, its replacement is returned.
        layers: which kinds to replace: ``"batch"`` (BatchNorm1d/2d/3d, SyncBatchNorm, torchvision's
            FrozenBatchNorm2d), ``"group"`` (GroupNorm), ``"instance"`` (InstanceNorm1d/2d/3d).
        input_stats: mean and standard deviation of the network's first input as it is fed in, one
            number a channel each: after the usual normalization, zeros and ones. The first layer gets
            its prior from them.
        options: keyword options of :class:`KalmanNorm2d`, for every layer.

    Returns:
        The model.

    Raises:
        ValueError: for unknown kinds or options, or where there is nothing to convert.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...     torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = kn.convert(model)
        >>> model(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """
    kinds = (layers,) if isinstance(layers, str) else tuple(layers)
    _check_names("layers", kinds, _KINDS)
    _check_names("option", options, _OPTIONS)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        new = _kalman_layer(layer, name, kinds, options)
        if new is not None:
            replaced[layer] = new
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has nothing to convert: no layer of the kinds {list(kinds)}, "
            f"expected at least one (kinds are {list(_KINDS)})"
        )
    model = _replace_modules(model, replaced)
    return connect(model, input_stats=input_stats)


def _check_names(what: str, given: Any, allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise ValueError(f"kalmannorm.convert got {what} {name!r}, expected one of {list(allowed)}")


def _replace_modules(model: _M, replaced: dict[nn.Module, nn.Module]) -> _M:
    """Put new modules in the places of old ones, wherever these are used."""
    if model in replaced:
        return replaced[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        # Not `named_children`, which shows a module once: a second name for it must be replaced too.
        for name, module in parent._modules.items():
            if module is not None and module in replaced:
                parent._modules[name] = replaced[module]
    return model


def _kalman_layer(layer: nn.Module, name: str, kinds: Sequence[str], options: dict[str, Any]) -> nn.Module | None:
    """The Kalman layer that takes this one's place, if it is of a kind to replace."""
    new: KalmanLayer | None = None
    if "batch" in kinds and type(layer) in _BATCH:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        new = _from_batch_norm(layer, name, options)
    elif "batch" in kinds and _is_frozen_batch_norm(layer):
        new = _from_frozen_batch_norm(layer, options)
    elif "group" in kinds and type(layer) is nn.GroupNorm:
        new = GroupKalmanNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine, **_on(layer, options))
        _adopt(new, layer)
    elif "instance" in kinds and type(layer) in _INSTANCE:
        assert isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        if layer.track_running_stats:
            raise ValueError(
                f"{type(layer).__name__} {name!r} tracks running statistics, which GroupKalmanNorm has not: "
                "expected track_running_stats=False"
            )
        channels = layer.num_features
        new = GroupKalmanNorm(channels, channels, layer.eps, layer.affine, **_on(layer, options))
        _adopt(new, layer)
    elif _is_kin(layer, kinds):
        stock = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))
        warnings.warn(
            f"{type(layer).__name__} {name!r} is a kind of {stock.__name__} with a forward of its own: "
            "kalmannorm.convert leaves it as it is",
            stacklevel=3,
        )
    if new is not None:
        new.train(layer.training)
    return new


def _is_kin(layer: nn.Module, kinds: Sequence[str]) -> bool:
    """Whether a layer descends from one that would be replaced."""
    families: dict[str, Any] = {"batch": tuple(_BATCH), "group": nn.GroupNorm, "instance": _INSTANCE}
    return any(isinstance(layer, families[kind]) for kind in kinds)


def _on(layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and where the layer's tensors live."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    floating = [t for t in tensors if t.is_floating_point()]
    return {**options, "device": floating[0].device, "dtype": floating[0].dtype} if floating else options


def _adopt(new: KalmanLayer, old: nn.Module) -> None:
    """Take over the parameters and buffers themselves."""
    for name, parameter in old._parameters.items():
        new._parameters[name] = parameter
    for name, buffer in old._buffers.items():
        new._buffers[name] = buffer
    for added in (new.gain, new.process_noise):
        if isinstance(added, nn.Parameter) and new.weight is not None:
            added.requires_grad_(new.weight.requires_grad)


def _from_batch_norm(layer: nn.modules.batchnorm._BatchNorm, name: str, options: dict[str, Any]) -> KalmanNorm:
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(layer).__name__} {name!r} is lazy: run the model once before kalmannorm.convert")
    synchronizes = isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized()
    if synchronizes and "process_group" not in options:
        options = {**options, "process_group": layer.process_group or torch.distributed.group.WORLD}
    new = _BATCH[type(layer)](
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, **_on(layer, options)
    )
    _adopt(new, layer)
    return new


def _is_frozen_batch_norm(layer: nn.Module) -> bool:
    """torchvision is not a dependency: a model that has its layer has imported it."""
    misc = sys.modules.get("torchvision.ops.misc")
    return misc is not None and type(layer) is misc.FrozenBatchNorm2d


def _from_frozen_batch_norm(layer: Any, options: dict[str, Any]) -> KalmanNorm:
    new = KalmanNorm2d(layer.weight.shape[0], layer.eps, **_on(layer, options))
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(new, name).copy_(getattr(layer, name))
    return new


def connect(model: _M, *, input_stats: tuple[Any, Any] | None = None) -> _M:
    """Let beliefs flow between a network's Kalman layers. :func:`convert` has done it already.

    For a model written with Kalman layers by hand; and again after layers were added or replaced. It
    puts two forward hooks on each module that contains a Kalman layer, and tells each layer its name.

    Args:
        model: the network.
        input_stats: see :func:`convert`.

    Returns:
        The model.

    Raises:
        ValueError: where there is no Kalman layer, or ``input_stats`` is not one mean and one positive
            standard deviation a channel.
    """
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, KalmanLayer)}
    if not names:
        raise ValueError(f"{type(model).__name__} has no Kalman layer to connect, expected at least one")
    for layer, name in names.items():
        layer.layer_name = name
    for module in model.modules():
        _disconnect(module)
        inside = [layer for layer in module.modules() if layer in names and layer is not module]
        if inside:
            watch = Watch(inside, _input_belief(input_stats) if module is model else None)
            module.register_forward_pre_hook(watch.open, with_kwargs=True, prepend=True)
            module.register_forward_hook(watch.close, always_call=True)
    return model


def _disconnect(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Watch):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _input_belief(input_stats: tuple[Any, Any] | None) -> Gaussian | None:
    if input_stats is None:
        return None
    mean, std = (torch.as_tensor(t, dtype=torch.float32).detach().flatten() for t in input_stats)
    if mean.shape != std.shape or not bool((std > 0).all()) or not bool(mean.isfinite().all()):
        raise ValueError(
            f"kalmannorm.convert got input_stats={input_stats!r}, expected (mean, std), one number a channel "
            "each, std above 0"
        )
    return Gaussian(mean, std.square())


def kalman_layers(model: nn.Module) -> Iterator[tuple[str, KalmanLayer]]:
    """Each Kalman layer of a model, with its name."""
    for name, layer in model.named_modules():
        if isinstance(layer, KalmanLayer):
            yield name, layer


def to_batchnorm(model: _M) -> _M:
    """Replace Kalman layers by the stock layers of the same ``eval()`` output, in place, to deploy.

    Parameters and buffers are the same objects; gain and process noise are dropped.

    Args:
        model: a network with :class:`KalmanNorm` layers. If it is itself one, its replacement is
            returned.

    Returns:
        The model, with layers of torch.nn only.

    Raises:
        ValueError: for a :class:`GroupKalmanNorm` whose gain is not 1: it fuses in ``eval()``, so no
            stock layer does the same.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in kalman_layers(model):
        if isinstance(layer, GroupKalmanNorm):
            if not layer.ignores_prior:
                raise ValueError(
                    f"GroupKalmanNorm {name!r} fuses its input with a prior in eval() too, expected gain=1.0: "
                    "no stock layer computes the same"
                )
            stock: nn.Module = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
        else:
            stock = _stock_class(layer)(
                layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
            )
        for key in stock._parameters:
            stock._parameters[key] = layer._parameters[key]
        for key in stock._buffers:
            stock._buffers[key] = layer._buffers[key]
        replaced[layer] = stock.train(layer.training)
    model = _replace_modules(model, replaced)
    for module in model.modules():
        _disconnect(module)
    return model


def _stock_class(layer: KalmanNorm) -> Callable[..., nn.Module]:
    return next(stock for stock, kalman in _BATCH.items() if type(layer) is kalman)


def fuse(model: _M) -> _M:
    """Fold normalization layers into the convolutions and linear layers before them, for inference.

    Works on a trace of the model (``torch.fx``), in ``eval()``; the model itself is not changed.

    Args:
        model: a network in ``eval()``, with Kalman or BatchNorm layers.

    Returns:
        A fused copy.

    Raises:
        ValueError: for a model in training.
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training, expected eval(): only running statistics fold")
    plain = copy.deepcopy(model)
    if any(True for _ in kalman_layers(plain)):
        plain = to_batchnorm(plain)
    return fuse_graph(plain)  # type: ignore[return-value]


