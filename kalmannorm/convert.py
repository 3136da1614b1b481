"""From stock layers to Kalman layers and back, in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fuse_graph

from kalmannorm.connect import InputStats, connect, disconnect, input_beliefs
from kalmannorm.freezing import remove_freezing_hook
from kalmannorm.modules import KalmanLayer, KalmanNorm, is_trained
from kalmannorm.stand_ins import (
    KINDS,
    device_and_dtype,
    kalman_layer,
    move_hooks,
    stand_in,
    stock_ancestor,
    stock_layer,
)
from kalmannorm.standardization import bake, filters_below_norms, use_standardized
from kalmannorm.traversal import kalman_layers, untraceable

__all__ = ["convert", "fuse", "to_batchnorm", "with_stock_norms"]

_M = TypeVar("_M", bound=nn.Module)
# Modules that drop whole blocks at random, and their attributes with the rate.
_RANDOM_DEPTH = {"StochasticDepth": ("p",), "DropPath": ("drop_prob", "p"), "DropBlock2d": ("drop_prob", "p"),
                 "DropBlock3d": ("p",)}  # fmt: skip
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
    _check_names("layers", kinds, KINDS)
    input_beliefs(model, input_stats)  # raises before anything is changed
    _check_names("option", options, _OPTIONS)
    filters = filters_below_norms(model) if weight_standardization else []
    if calibrate:
        _insist_on_statistics(model, kinds)
    replaced = _stand_ins(model, kinds, options)
    if not replaced:
        asked = {**options, "calibrate": calibrate, "weight_standardization": weight_standardization or None,
                 "track_running_stats": None if track_running_stats else False}  # fmt: skip
        _refuse_unless_converted(model, kinds, [name for name, value in asked.items() if value is not None])
        return connect(model, input_stats=input_stats)
    for new in replaced.values():
        new.calibrates = calibrate
        if calibrate is not False and new.has_known_statistics:
            new.await_correction()
        if not track_running_stats and isinstance(new, KalmanNorm):
            new.drop_running_stats()
    if any(new.awaits_correction for new in replaced.values()):
        _warn_of_random_depth(model)
        _warn_of_few_batches(replaced.values())
    model = _replace_modules(model, replaced)
    for new in replaced.values():
        remove_freezing_hook(new)
    use_standardized(filters)
    return connect(model, input_stats=input_stats)


def _stand_ins(model: nn.Module, kinds: Sequence[str], options: dict[str, Any]) -> dict[nn.Module, KalmanLayer]:
    """The Kalman layers that are to replace layers of these kinds; warns of layers that none can replace."""
    replaced = {}
    of_model = device_and_dtype((*model.parameters(), *model.buffers()))  # for layers without tensors of their own
    for name, layer in model.named_modules():
        kind, kalman = stand_in(layer)
        if kind not in kinds:
            continue
        if kalman is None:
            warnings.warn(
                f"{type(layer).__name__} {name!r} is a kind of {stock_ancestor(layer).__name__} with a forward of its "
                "own, or tensors: kalmannorm.convert leaves it as it is",
                stacklevel=3,
            )
            continue
        left_out = _OF_BATCHES if kind != "batch" and "batch" in kinds else ()
        given = {option: value for option, value in options.items() if option not in left_out}
        replaced[layer] = kalman_layer(layer, name, kalman, of_model | given)
    return replaced


def _refuse_unless_converted(model: nn.Module, kinds: Sequence[str], options: Sequence[str]) -> None:
    """Raise for a model without a layer to replace, unless it is converted and no options are given."""
    if next(kalman_layers(model), None) is None:
        raise ValueError(
            f"{type(model).__name__} has nothing to convert: no layer of the kinds {list(kinds)}, "
            f"expected at least one (kinds are {list(KINDS)})"
        )
    if options:
        raise ValueError(
            f"{type(model).__name__} is converted already, so kalmannorm.convert got {', '.join(options)} in vain: "
            "expected a model with stock layers (kalmannorm.to_batchnorm makes them), or input_stats alone"
        )


def _check_names(what: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise ValueError(f"kalmannorm.convert got {what} {name!r}, expected one of {list(allowed)}")


def _insist_on_statistics(model: nn.Module, kinds: Sequence[str]) -> None:
    """Raise where a layer to replace has no running statistics that could correct its prior."""
    for name, layer in model.named_modules():
        kind, kalman = stand_in(layer)
        mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if kind in kinds and kalman is not None and not is_trained(mean, var):
            raise ValueError(
                f"kalmannorm.convert got calibrate=True, but {type(layer).__name__} {name!r} has "
                f"{'no running statistics' if mean is None else 'running statistics of no training'}: load trained "
                "weights before, or correct its prior from data by kalmannorm.calibrate(model, loader)"
            )


def _warn_of_random_depth(model: nn.Module) -> None:
    """The first training step would correct priors for the blocks that it happens to keep."""
    for name, module in model.named_modules():
        if any(getattr(module, share, 0) for share in _RANDOM_DEPTH.get(type(module).__name__, ())):
            warnings.warn(
                f"{type(module).__name__} {name!r} drops its input at random in training: before the first step call "
                "kalmannorm.calibrate(model, inputs), which corrects priors in eval(), or convert with calibrate=False",
                stacklevel=3,
            )
            return


def _warn_of_few_batches(layers: Iterable[KalmanLayer]) -> None:
    """Running statistics of a network that was called once or twice are mostly zeros and ones."""
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


def _replace_modules(model: _M, replaced: Mapping[nn.Module, nn.Module]) -> _M:
    """Put new modules, which get the hooks of old ones, in the places of these, under second names too."""
    for old, new in replaced.items():
        move_hooks(new, old)
    if model in replaced:
        return replaced[model]  # type: ignore[return-value]
    for parent in list(model.modules()):
        for name, module in parent._modules.items():  # `named_children` shows a module once
            if module is not None and module in replaced:
                parent._modules[name] = replaced[module]
    return model


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
        replaced[layer] = stock_layer(layer)
    model = _replace_modules(model, replaced)
    for module in model.modules():
        disconnect(module)
    return model


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
        raise untraceable(
            model, error, "expected a forward whose course does not depend on its input: deploy "
            "kalmannorm.to_batchnorm(model), or fuse the parts of it that can be traced",
        ) from error  # fmt: skip
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
