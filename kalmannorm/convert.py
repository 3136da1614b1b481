"""From stock layers to Kalman layers and back, in place."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fuse_graph
from torch.nn.modules.batchnorm import _NormBase

from kalmannorm.freezing import is_frozen, let_go
from kalmannorm.gaussian import Gaussian
from kalmannorm.modules import (
    GroupKalmanNorm,
    GroupKalmanNormAct,
    KalmanLayer,
    KalmanNorm,
    KalmanNorm1d,
    KalmanNorm2d,
    KalmanNorm3d,
    KalmanNormAct2d,
    is_trained,
)
from kalmannorm.standardization import bake, filters_below_norms, use_standardized
from kalmannorm.traversal import kalman_layers
from kalmannorm.watch import Watch

__all__ = ["connect", "convert", "fuse", "to_batchnorm", "with_stock_norms"]

_M = TypeVar("_M", bound=nn.Module)
InputStats = tuple[Any, Any] | Mapping[str, tuple[Any, Any]]
# What takes the place of a stock layer, and of a subclass that has its forward.
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
# Layers of other libraries with a forward of their own, by name: a model that has them has imported them.
_ELSEWHERE: dict[str, tuple[str, type[KalmanLayer]]] = {
    "timm.layers.norm_act.BatchNormAct2d": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.SyncBatchNormAct": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.FrozenBatchNormAct2d": ("batch", KalmanNormAct2d),
    "timm.layers.norm_act.GroupNormAct": ("group", GroupKalmanNormAct),
    "timm.layers.norm_act.GroupNorm1Act": ("group", GroupKalmanNormAct),
    "timm.layers.norm.GroupNorm": ("group", GroupKalmanNorm),
    "timm.layers.norm.GroupNorm1": ("group", GroupKalmanNorm),
}
# Modules that drop whole blocks at random, and what says how often.
_RANDOM_DEPTH = {"StochasticDepth": ("p",), "DropPath": ("drop_prob", "p"), "DropBlock2d": ("drop_prob", "p"),
                 "DropBlock3d": ("p",)}  # fmt: skip
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
# The buffers of torchvision's FrozenBatchNorm2d. transformers has a copy of it a detector, some without `eps`.
_FROZEN = {"weight", "bias", "running_mean", "running_var"}
_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,)
}  # fmt: skip
# What users register on a layer. The dicts themselves move, so that their handles still remove.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_KINDS = tuple(_STOCK)
_FOLDED_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OPTIONS = ("gain", "process_noise", "spread", "carry", "estimator", "stats_batch_size", "guard", "process_group")
# A channel group has one sample.
_OF_BATCHES = ("stats_batch_size", "process_group")


def convert(model: _M, *, layers: Sequence[str] = ("batch",), input_stats: InputStats | None = None,
            calibrate: bool | None = None, weight_standardization: bool = False, track_running_stats: bool = True,
            **options: Any) -> _M:  # fmt: skip
    """Replace a network's normalization layers by Kalman layers, in place, and connect them.

    The new layers hold the very same parameters and buffers, so an optimizer made before keeps
    working on them; only gain and process noise are new (add them to it). Device, dtype, training
    flag and ``requires_grad`` stay. ``eval()`` output does not change by one bit.

    A model that is converted already stays as it is, but for its ``input_stats``, where they are given.

    A *pretrained* network brings its running statistics along: they correct each layer's prior, channel by channel,
    at the first call that computes priors (:func:`kalmannorm.calibrate`). So the first training step sees the network
    as it was trained.

    Args:
        model: any network. If it is itself a normalization layer, its replacement is returned.
        layers: which kinds to replace: ``"batch"`` (BatchNorm1d/2d/3d, SyncBatchNorm, torchvision's
            FrozenBatchNorm2d and its copies in transformers, timm's BatchNormAct2d and its
            relatives), ``"group"`` (GroupNorm, timm's GroupNormAct), ``"instance"``
            (InstanceNorm1d/2d/3d). Subclasses are replaced if they have their stock class's forward;
            others are left alone, with a warning.
        input_stats: mean and standard deviation of the network's first input as it is fed in, one
            number a channel each: after the usual normalization, zeros and ones. Single numbers hold for
            all of an input, whichever of its axes has the channels. The first layer gets its prior from
            them. Of a network with several floating-point inputs, a mapping from names of its forward's
            arguments to such pairs.
        calibrate: correct priors by running statistics. None: in each layer whose running statistics are those of some
            training. True: in every layer, or an error. False: in none. The first call that computes priors makes the
            correction; of a network that drops blocks at random, :func:`kalmannorm.calibrate` should, and a warning
            says so.
        weight_standardization: give the filters below normalization layers zero mean and unit norm too, for training
            from scratch: see :func:`standardize_weights`. ``eval()`` output changes then.
        track_running_stats: False drops running statistics: in ``eval()`` too, each sample is normalized by its own
            statistics fused with the prior (or each ``stats_batch_size`` samples, if that is given). The most accurate
            at one sample a step. The first layer has no prior then without ``input_stats``. In ``eval()`` without
            gradients priors are computed once, and again where parameters, the inputs' shape or the mode have changed
            (a write through ``.data`` is not seen). Inference does not fold into convolutions.
        options: keyword options of :class:`KalmanNorm2d`, for every layer. What stands in for SyncBatchNorm shares
            statistics if ``torch.distributed`` is initialized, unless ``stats_batch_size`` asks for smaller groups.

    Returns:
        The model.

    Raises:
        ValueError: for unknown kinds or options, or where there is nothing to convert; for options of a model that is
            converted already; with ``calibrate=True`` for a layer whose running statistics say nothing; for what
            :func:`standardize_weights` raises. The model is then as it was.

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
    if not track_running_stats and "batch" in kinds:
        options.setdefault("stats_batch_size", 1)
    _check_names("layers", kinds, _KINDS)
    _input_beliefs(model, input_stats)  # an error leaves the model as it was
    _check_names("option", options, _OPTIONS)
    filters = filters_below_norms(model) if weight_standardization else []
    if calibrate:
        _insist_on_statistics(model, kinds)
    replaced: dict[nn.Module, KalmanLayer] = {}
    of_model = _place_of((*model.parameters(), *model.buffers()))  # for layers without tensors of their own
    for name, layer in model.named_modules():
        new = _kalman_layer(layer, name, kinds, of_model | options)
        if new is not None:
            replaced[layer] = new
    if not replaced and any(isinstance(layer, KalmanLayer) for layer in model.modules()):
        asked = {**options, "calibrate": calibrate, "weight_standardization": weight_standardization or None,
                 "track_running_stats": None if track_running_stats else False}  # fmt: skip
        if given := [name for name, value in asked.items() if value is not None]:
            raise ValueError(
                f"{type(model).__name__} is converted already, so kalmannorm.convert got {', '.join(given)} in vain: "
                "expected a model with stock layers (kalmannorm.to_batchnorm makes them), or input_stats alone"
            )
        return connect(model, input_stats=input_stats)
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has nothing to convert: no layer of the kinds {list(kinds)}, "
            f"expected at least one (kinds are {list(_KINDS)})"
        )
    for new in replaced.values():
        new.calibrates = calibrate
        if calibrate is not False and _has_statistics(new):
            new.await_correction()
        if not track_running_stats and isinstance(new, KalmanNorm):
            new.drop_running_stats()
    if any(new.awaits_correction for new in replaced.values()):
        _warn_of_random_depth(model)
        _warn_of_few_batches(replaced.values())
    model = _replace_modules(model, replaced)
    use_standardized(filters)
    return connect(model, input_stats=input_stats)


def _warn_of_random_depth(model: nn.Module) -> None:
    """A correction that the first training step makes would be of the blocks that this step happens to keep."""
    for name, module in model.named_modules():
        if any(getattr(module, share, 0) for share in _RANDOM_DEPTH.get(type(module).__name__, ())):
            warnings.warn(
                f"{type(module).__name__} {name!r} drops its input at random in training: before the first step call "
                "kalmannorm.calibrate(model, inputs), which corrects priors in eval(), or convert with calibrate=False",
                stacklevel=3,
            )
            return


def _warn_of_few_batches(layers: Iterable[KalmanLayer]) -> None:
    """Running statistics that are mostly zeros and ones still, as of a network that was called once to try it."""
    for layer in layers:
        batches, momentum = getattr(layer, "num_batches_tracked", None), getattr(layer, "momentum", None)
        count = int(batches) if layer.awaits_correction and batches is not None else 0
        if count > 0 and momentum is not None and (1 - momentum) ** count > 0.75:
            warnings.warn(
                f"{type(layer).__name__} {layer.layer_name!r} has running statistics of {count} batches, which are "
                "mostly their initial zeros and ones still, and correct its prior: if it is not a pretrained network, "
                "convert it before it is called, or with calibrate=False",
                stacklevel=3,
            )
            return


def _has_statistics(layer: nn.Module) -> bool:
    return is_trained(getattr(layer, "running_mean", None), getattr(layer, "running_var", None))


def _insist_on_statistics(model: nn.Module, kinds: Sequence[str]) -> None:
    """Raise where a layer to replace has no running statistics that could correct its prior."""
    for name, layer in model.named_modules():
        kind, kalman = stand_in(layer)
        if kind in kinds and kalman is not None and not _has_statistics(layer):
            has_none = getattr(layer, "running_mean", None) is None
            raise ValueError(
                f"kalmannorm.convert got calibrate=True, but {type(layer).__name__} {name!r} has "
                f"{'no running statistics' if has_none else 'running statistics of no training'}: load trained "
                "weights before, or correct its prior from data by kalmannorm.calibrate(model, loader)"
            )


def _check_names(what: str, given: Any, allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise ValueError(f"kalmannorm.convert got {what} {name!r}, expected one of {list(allowed)}")


def _replace_modules(model: _M, replaced: Mapping[nn.Module, nn.Module]) -> _M:
    """Put new modules in the places of old ones, wherever these are used."""
    if model in replaced:
        return replaced[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        # Not `named_children`, which shows a module once: a second name for it must be replaced too.
        for name, module in parent._modules.items():
            if module is not None and module in replaced:
                parent._modules[name] = replaced[module]
    return model


def _kalman_layer(layer: nn.Module, name: str, kinds: Sequence[str], options: dict[str, Any]) -> KalmanLayer | None:
    """The Kalman layer that takes this one's place, if it is of a kind to replace."""
    kind, kalman = stand_in(layer)
    if kind not in kinds:
        return None
    if kalman is None:
        warnings.warn(
            f"{type(layer).__name__} {name!r} is a kind of {_stock_ancestor(layer).__name__} with a forward of its "
            "own, or tensors: kalmannorm.convert leaves it as it is",
            stacklevel=3,
        )
        return None
    if kind != "batch" and "batch" in kinds:
        options = {name: value for name, value in options.items() if name not in _OF_BATCHES}
    make = _from_batch_norm if kind == "batch" else _from_group_norm
    new: KalmanLayer = make(layer, name, kalman, _on(layer, options))
    new.layer_name = name
    if type(layer).__module__.split(".")[0] != "torch" and isinstance(layer, (_NormBase, nn.GroupNorm)):
        new.replaces = (_emptied(layer),)
    new.training = layer.training  # not `train(...)`: what is inside a layer keeps a flag of its own
    _take_hooks(new, layer)
    let_go(new)
    return new


def stand_in(layer: nn.Module) -> tuple[str, type[KalmanLayer] | None]:
    """Which kind of layer this is, and the class that can take its place; None for its class where the
    layer is of a kind, but computes something of its own.
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
                same = type(layer).forward is stock.forward and _has_stock_tensors(layer)
                return kind, kalman if same else None
    return "", None


def _has_stock_tensors(layer: nn.Module) -> bool:
    """Whether a layer has no parameters, buffers or submodules but those of torch.nn: a parametrization,
    for one, makes others.
    """
    return {*layer._parameters, *layer._buffers, *layer._modules} <= _TENSORS


def _stock_ancestor(layer: nn.Module) -> type:
    return next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))


def _on(layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options, and where the layer's tensors live."""
    return options | _place_of((*layer.parameters(recurse=False), *layer.buffers(recurse=False)))


def _place_of(tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Device and type of the first floating-point tensor, if there is one."""
    first = next((t for t in tensors if t.is_floating_point()), None)
    return {} if first is None else {"device": first.device, "dtype": first.dtype}


def _emptied(layer: nn.Module) -> nn.Module:
    """The layer without its tensors and submodules, which its stand-in holds."""
    shell: Any = copy.copy(layer)
    shell._parameters = dict.fromkeys(layer._parameters)
    shell._buffers = dict.fromkeys(layer._buffers)
    shell._modules = dict.fromkeys(layer._modules)
    if hasattr(shell, "process_group"):
        shell.process_group = None
    for name in _HOOKS:  # its stand-in has them
        setattr(shell, name, type(getattr(layer, name))())
    return shell  # type: ignore[no-any-return]


def _take_hooks(new: nn.Module, old: nn.Module) -> None:
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
        setattr(old, name, type(getattr(old, name))())  # what is put on the old layer is not the new one's


def _adopt(new: KalmanLayer, old: nn.Module) -> None:
    """Take over the parameters, buffers and submodules themselves."""
    new._parameters.update({name: tensor for name, tensor in old._parameters.items() if name in new._parameters})
    new._buffers.update({name: tensor for name, tensor in old._buffers.items() if name in new._buffers})
    new._modules.update(old._modules)
    for added in (new.gain, new.process_noise):
        if isinstance(added, nn.Parameter) and new.weight is not None:
            added.requires_grad_(new.weight.requires_grad)


def _from_batch_norm(layer: Any, name: str, kalman: Any, options: dict[str, Any]) -> KalmanNorm:
    if not hasattr(layer, "num_batches_tracked"):
        return _from_frozen_batch_norm(layer, kalman, options)
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{type(layer).__name__} {name!r} is lazy: run the model once before kalmannorm.convert")
    synchronizes = isinstance(layer, nn.SyncBatchNorm) and torch.distributed.is_initialized()
    if synchronizes and "process_group" not in options and options.get("stats_batch_size") is None:
        options["process_group"] = layer.process_group or torch.distributed.group.WORLD
    new: KalmanNorm = kalman(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, **options
    )
    _adopt(new, layer)
    new.frozen = is_frozen(layer)
    return new


def _from_frozen_batch_norm(layer: Any, kalman: Any, options: dict[str, Any]) -> KalmanNorm:
    """Its weight and bias are buffers: they become parameters."""
    new: KalmanNorm = kalman(layer.weight.shape[0], getattr(layer, "eps", 1e-5), **options)
    new._modules.update(layer._modules)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(new, name).copy_(getattr(layer, name))
    return new


def _from_group_norm(layer: Any, name: str, kalman: Any, options: dict[str, Any]) -> GroupKalmanNorm:
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
    _adopt(new, layer)
    return new


def connect(model: _M, *, input_stats: InputStats | None = None) -> _M:
    """Let beliefs flow between a network's Kalman layers. :func:`convert` has done it already.

    You need it for a model that you write with Kalman layers yourself, and after layers were added or replaced.

    It puts two forward hooks on each module that contains a Kalman layer, and tells each layer its name.

    Args:
        model: the network.
        input_stats: see :func:`convert`. None leaves what the network was told before.

    Returns:
        The model.

    Raises:
        ValueError: where there is no Kalman layer, or ``input_stats`` is not one mean and one positive
            standard deviation a channel.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), kn.KalmanNorm2d(8))
        >>> model = kn.connect(model, input_stats=([0.0] * 3, [1.0] * 3))
        >>> kn.describe(model, torch.randn(1, 3, 8, 8)).with_prior
        1
    """
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, KalmanLayer)}
    if not names:
        raise ValueError(f"{type(model).__name__} has no Kalman layer to connect, expected at least one")
    for layer, name in names.items():
        layer.layer_name = name
    given = _input_beliefs(model, input_stats)
    for module in model.modules():
        known = _disconnect(module)
        inside = [layer for layer in module.modules() if layer in names and layer is not module]
        if inside:
            watch = Watch(inside, (module is model and given) or known, _positional(module))
            module.register_forward_pre_hook(watch.open, with_kwargs=True, prepend=True)
            module.register_forward_hook(watch.close, always_call=True)
    return model


def _disconnect(module: nn.Module) -> dict[str | None, Gaussian]:
    """Take the hooks away; return what was believed of the module's inputs."""
    known: dict[str | None, Gaussian] = {}
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(watch := getattr(hook, "__self__", None), Watch):
                known = watch.given
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
    return known


def _input_beliefs(model: nn.Module, input_stats: InputStats | None) -> dict[str | None, Gaussian]:
    """What ``input_stats`` say, by the names of arguments; None for the first floating-point tensor."""
    if input_stats is None:
        return {}
    if not isinstance(input_stats, Mapping):
        return {None: _belief(input_stats, "input_stats")}
    arguments = _arguments(model)
    for name in input_stats:
        if name not in arguments and not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
            raise ValueError(
                f"kalmannorm.convert got input_stats of {name!r}, expected names of what {type(model).__name__}'s "
                f"forward takes: {list(arguments)}"
            )
    return {name: _belief(stats, f"input_stats[{name!r}]") for name, stats in input_stats.items()}


def _arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # of a function that is not Python's
        return {}


def _positional(module: nn.Module) -> list[str]:
    return [name for name, p in _arguments(module).items() if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]


def _belief(stats: tuple[Any, Any], what: str) -> Gaussian:
    given = (torch.as_tensor(t, dtype=torch.float64, device="cpu").detach() for t in stats)
    mean, std = (t.flatten() if t.ndim else t for t in given)
    if mean.shape != std.shape or not bool((std > 0).all()) or not bool(mean.isfinite().all()):
        raise ValueError(
            f"kalmannorm.convert got {what}={stats!r}, expected (mean, std), one number a channel each, std above 0"
        )
    return Gaussian(mean, std.square())


def to_batchnorm(model: _M) -> _M:
    """Replace Kalman layers by the stock layers of the same ``eval()`` output, in place, to deploy.

    You need it to deploy a model, or to load its checkpoint where this library is not installed.

    Parameters and buffers are the same objects; gain and process noise are dropped. Training flags and
    ``requires_grad`` stay; a frozen layer gives one in ``eval()``, which ``model.train()`` would end. Standardized
    filters (:func:`standardize_weights`) are written into the parameters, and their layers become stock ones.

    Args:
        model: a network with :class:`KalmanNorm` layers or standardized filters. If it is itself a layer, its
            replacement is returned.

    Returns:
        The model, with layers of torch.nn only; where a layer had taken the place of another library's
        (timm's norm-and-activation layers), with that.

    Raises:
        ValueError: for a :class:`GroupKalmanNorm`, or a layer without running statistics, whose gain is not 1: it fuses
            in ``eval()``, so no stock layer does the same.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
        >>> type(kn.to_batchnorm(model)[1]).__name__
        'BatchNorm2d'
    """
    model = with_stock_norms(model)
    bake(model)
    return model


def with_stock_norms(model: _M) -> _M:
    """Replace Kalman layers as :func:`to_batchnorm` does, and leave standardized filters to be trained further."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in kalman_layers(model):
        if getattr(layer, "running_mean", None) is None and not layer.ignores_prior:
            raise ValueError(
                f"{type(layer).__name__} {name!r} fuses its input with a prior in eval() too, expected gain=1.0 or "
                "running statistics: no stock layer computes the same"
            )
        replaced[layer] = _stock_layer(layer)
    model = _replace_modules(model, replaced)
    for module in model.modules():
        _disconnect(module)
    return model


def _stock_layer(layer: KalmanLayer) -> nn.Module:
    """The layer that was there, or torch.nn's, with the same tensors."""
    stock: Any
    if layer.replaces:
        stock = _emptied(layer.replaces[0])
        for option in {"eps", "momentum"} & vars(layer).keys():
            setattr(stock, option, getattr(layer, option))
        stock._modules.update(layer._modules)
    elif isinstance(layer, GroupKalmanNorm):
        stock = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine)
    else:
        kind: Any = next(stock for stock, kalman in _STOCK["batch"].items() if isinstance(layer, kalman))
        stock = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for key in stock._parameters:
        stock._parameters[key] = layer._parameters[key]
    for key in stock._buffers:
        stock._buffers[key] = layer._buffers[key]
    # Not `train(...)`: what is inside a layer keeps a flag of its own.
    stock.training = layer.training and not layer.frozen
    _take_hooks(stock, layer)
    behind = [] if layer.replaces else [m for m in layer.children() if not isinstance(m, nn.Identity)]
    if not behind:
        return stock  # type: ignore[no-any-return]
    both = nn.Sequential(stock, *behind)
    both.training = layer.training
    return both


def fuse(model: _M) -> _M:
    """Fold normalization layers into the convolutions and linear layers before them, for inference.

    You need it for the fastest inference: no normalization layer is left behind a convolution.

    Works on a trace of the model (``torch.fx``), in ``eval()``; the model itself is not changed. A
    convolution that is called at several places gets a copy for each.

    Args:
        model: a network in ``eval()``, with Kalman or BatchNorm layers.

    Returns:
        A fused copy. A layer that follows no convolution or linear layer is in it as it was.

    Raises:
        ValueError: for a model in training, or one that ``torch.fx`` cannot trace.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
        >>> [type(layer).__name__ for layer in kn.fuse(model.eval()).children()]
        ['Conv2d']
    """
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training, expected eval(): only running statistics fold")
    return fuse_graph(_traced(to_batchnorm(copy.deepcopy(model))), inplace=True, no_trace=True)  # type: ignore[return-value]


def _traced(model: nn.Module) -> torch.fx.GraphModule:
    """The model's graph, in which no layer with weights is called twice: each call may be folded otherwise."""
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # the model's own code runs on stand-ins, and may raise anything
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {first}), "
            "expected a forward whose course does not depend on its input: deploy kalmannorm.to_batchnorm(model), or "
            "fuse the parts of it that can be traced"
        ) from error
    called: set[str] = set()
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        if node.target in called and isinstance(traced.get_submodule(node.target), _FOLDED_INTO):
            copied = f"{node.target}_copy{len(called)}"
            traced.add_submodule(copied, copy.deepcopy(traced.get_submodule(node.target)))
            node.target = copied
        called.add(node.target)
    return traced


