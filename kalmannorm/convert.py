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
from kalmannorm.freezing import freeze, remove_freezing_hook
from kalmannorm.modules import KalmanLayer, KalmanNorm
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
from kalmannorm.steps import replace
from kalmannorm.traversal import kalman_layers, untraceable

_M = TypeVar("_M", bound=nn.Module)
# How the names of modules end that drop whole blocks at random, such as transformers' `SwiftFormerDropPath`.
_RANDOM_DEPTH = ("StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d")
_FOLDED_INTO = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_OPTIONS = ("gain", "process_noise", "spread", "carry", "estimator", "stats_batch_size", "guard", "process_group")
# A channel group has one sample.
_OF_BATCHES = ("stats_batch_size", "process_group")


def convert(model: _M, *, layers: Sequence[str] = ("batch",), input_stats: InputStats | None = None,
            calibrate: bool | None = None, weight_standardization: bool = False, track_running_stats: bool = True,
            **options: Any) -> _M:  # fmt: skip
    """Replace a network's normalization layers by Kalman layers, in place, and connect them.

    The new layers hold the same parameter and buffer objects, so an existing optimizer keeps working;
    add the new gains and process noises to it. A list, dict or tuple of layers that a module holds gets
    the new ones, too. Device, dtype, training flags and ``requires_grad`` stay; a FrozenBatchNorm2d behind
    a convolution that is not trained stays frozen (:func:`freeze`). The output in ``eval()`` is
    bit-equal (up to rounding for FrozenBatchNorm2d, whose formula differs), but for layers without running
    statistics, which fuse in ``eval()`` too: correct their priors from data (:func:`kalmannorm.calibrate`). On a
    converted model, only ``input_stats`` change anything.

    Args:
        model: any network.
        layers: the kinds to replace: ``"batch"`` (BatchNorm1d/2d/3d, SyncBatchNorm, FrozenBatchNorm2d of torchvision
            and transformers, timm's BatchNormAct2d and its relatives), ``"group"`` (GroupNorm, timm's GroupNormAct),
            ``"instance"`` (InstanceNorm1d/2d/3d). A subclass with a forward of its own stays, with a warning.
        input_stats: mean and standard deviation of the network's first input, from which the first layer gets its
            prior: one number a channel each, or single numbers whichever axis has the channels; zeros and ones for an
            input that was normalized as usual. For several inputs: a mapping from names of the forward's arguments, or
            of places in them (``"batch['image']"``), to such pairs.
        calibrate: correct priors by running statistics (:func:`kalmannorm.calibrate`) at the first call that computes
            them, so that the first training step sees a pretrained network as it was trained. None: in each layer with
            trained running statistics. True: in every layer, or raise. False: in none.
        weight_standardization: also give the filters below normalization layers zero mean and unit norm, to train from
            scratch: see :func:`standardize_weights`. This changes the output in ``eval()``.
        track_running_stats: False drops running statistics: in ``eval()`` too, each sample (or each
            ``stats_batch_size`` samples) is normalized by its own statistics fused with the prior. In ``eval()``
            without gradients, priors are computed once, and again after parameters, the inputs' shape or the mode have
            changed (a write through ``.data``, or a fused optimizer's on a CPU, is not seen).
        options: keyword options of :class:`KalmanNorm2d`, for every layer. Layers that replace SyncBatchNorm share
            statistics if ``torch.distributed`` is initialized, unless ``stats_batch_size`` is given or
            ``track_running_stats`` is False.

    Returns:
        The model, or the replacement of a model that is itself a layer.

    Raises:
        TypeError: for what is no module.
        ValueError: for unknown kinds or options; without a layer to convert; for options of a converted model; with
            ``calibrate=True``, for a layer without trained running statistics; and as :func:`standardize_weights`.
            The model is then unchanged.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...     torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = kn.convert(model)
        >>> model(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"kalmannorm.convert got {type(model).__name__}, expected a torch.nn.Module")
    kinds = (layers,) if isinstance(layers, str) else tuple(layers)
    if not track_running_stats and "batch" in kinds:
        options.setdefault("stats_batch_size", 1)
    _check_names("layers", kinds, KINDS)
    input_beliefs(model, input_stats)  # raises before anything is changed
    _check_names("option", options, _OPTIONS)
    filters = filters_below_norms(model) if weight_standardization else []
    with torch.inference_mode(False):  # parameters of which could not be trained
        replaced = _stand_ins(model, kinds, options)
    if not replaced:
        asked = {**options, "calibrate": calibrate, "weight_standardization": weight_standardization or None,
                 "track_running_stats": None if track_running_stats else False}  # fmt: skip
        _refuse_unless_converted(model, kinds, [name for name, value in asked.items() if value is not None])
    for old, new in replaced.items():
        if calibrate and not new.has_known_statistics:
            has = "no running statistics"
            has = has if getattr(old, "running_mean", None) is None else "running statistics of no training"
            raise ValueError(
                f"kalmannorm.convert got calibrate=True, but {type(old).__name__} {new.layer_name!r} has {has}: load "
                "trained weights before, or correct its prior from data by kalmannorm.calibrate(model, loader)"
            )
        new.calibrates = calibrate
        if calibrate is not False and new.has_known_statistics:
            new.await_correction()
        if not track_running_stats and isinstance(new, KalmanNorm):
            new.drop_running_stats()
    _warn_of_trained_weights(replaced.values())
    if waiting := [new for new in replaced.values() if new.awaits_correction]:
        _warn_of_random_depth(model)
        _warn_of_few_batches(waiting)
    model = _replace_modules(model, replaced)
    for new in replaced.values():
        remove_freezing_hook(new)
    use_standardized(filters)
    return connect(model, input_stats=input_stats)


def _stand_ins(model: nn.Module, kinds: Sequence[str], options: dict[str, Any]) -> dict[nn.Module, KalmanLayer]:
    """The Kalman layers that are to replace layers of these kinds; warns of layers that none can replace."""
    replaced = {}
    of_model = device_and_dtype((*model.parameters(), *model.buffers()))  # for layers without tensors of their own
    is_fixed = False  # whether the last layer with parameters is
    for name, layer in model.named_modules():
        if own := list(layer.parameters(recurse=False)):
            is_fixed = not any(parameter.requires_grad for parameter in own)
        kind, kalman = stand_in(layer)
        if kind not in kinds:
            continue
        if kalman is None:
            warnings.warn(
                f"{type(layer).__name__} {name!r} is a kind of {stock_ancestor(layer).__name__} with a forward or "
                "train of its own, or tensors: kalmannorm.convert leaves it as it is",
                stacklevel=3,
            )
            continue
        left_out = _OF_BATCHES if kind != "batch" and "batch" in kinds else ()
        given = {option: value for option, value in options.items() if option not in left_out}
        replaced[layer] = kalman_layer(layer, name, kalman, of_model | given)
        if is_fixed and "weight" in layer._buffers:  # a FrozenBatchNorm2d, which has no `requires_grad` of its own
            freeze(replaced[layer])
    return replaced


def _refuse_unless_converted(model: nn.Module, kinds: Sequence[str], options: Sequence[str]) -> None:
    """Raise for a model without a layer to replace, unless it is converted and gets no options."""
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


def _warn_of_random_depth(model: nn.Module) -> None:
    """The first training step would correct priors for the blocks that it keeps."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith(_RANDOM_DEPTH) and any(getattr(module, n, 0) for n in ("p", "drop_prob")):
            warnings.warn(
                f"{type(module).__name__} {name!r} drops its input at random in training: before the first step call "
                "kalmannorm.calibrate(model, inputs), which corrects priors in eval(), or convert with calibrate=False",
                stacklevel=3,
            )
            return


def _warn_of_trained_weights(layers: Iterable[KalmanLayer]) -> None:
    """Nothing tells what a trained layer without running statistics was used to."""
    for layer in layers:
        weight = layer.weight
        unknown = getattr(layer, "running_mean", None) is None and layer.dropped_statistics is None
        asks = unknown and layer.calibrates is not False and weight is not None and not weight.is_meta
        if asks and bool((weight != weight[0]).any()):
            warnings.warn(
                f"{type(layer).__name__} {layer.layer_name!r} takes the place of a trained layer without running "
                "statistics, and fuses in eval() too, so the network's output changes: call "
                "kalmannorm.calibrate(model, loader), which corrects priors from data, and train on",
                stacklevel=3,
            )
            return


def _warn_of_few_batches(layers: Iterable[KalmanLayer]) -> None:
    """Running statistics of a network that was called once or twice are mostly zeros and ones."""
    for layer in layers:
        batches, momentum = getattr(layer, "num_batches_tracked", None), getattr(layer, "momentum", None)
        count = 0 if batches is None else int(batches)
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
        # Not only `_modules`: some networks call a list, dict or tuple of layers, and register them by name.
        for name, held in list(vars(parent).items()):
            if type(held) is tuple:
                vars(parent)[name] = replace(held, nn.Module, lambda layer: replaced.get(layer, layer))
            places = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, list) else ()
            for place, module in list(places):
                if isinstance(module, nn.Module) and module in replaced:
                    held[place] = replaced[module]
    return model


def to_batchnorm(model: _M) -> _M:
    """Replace Kalman layers by stock layers with the same output in ``eval()``, in place.

    You need it to deploy a model, or to load its checkpoint where this library is not installed.

    Parameters and buffers are the same objects; gain and process noise are dropped. Training flags and
    ``requires_grad`` stay; a frozen layer is in ``eval()`` until ``model.train()``. Standardized
    filters are written into the parameters of stock convolutions and linear layers.

    Args:
        model: a network with :class:`KalmanNorm` layers or standardized filters.

    Returns:
        The model, or the replacement of a model that is itself a layer. Its layers are those of torch.nn, or of the
        library whose layers :func:`convert` had replaced.

    Raises:
        ValueError: for a layer that fuses in ``eval()``, which no stock layer does: one without running statistics,
            unless its gain is 1. Also for a pruned or parametrized weight or bias; a warning lists such filters.

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
        if not layer._parameters.keys() >= {"weight", "bias"}:
            raise ValueError(
                f"{type(layer).__name__} {name!r} computes its weight or bias from other tensors, expected parameters: "
                "end that first, by torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )
        replaced[layer] = stock_layer(layer)
    model = _replace_modules(model, replaced)
    for module in model.modules():
        disconnect(module)
    return model


def fuse(model: _M) -> _M:
    """Fold normalization layers into the convolutions and linear layers before them, for the fastest inference.

    Args:
        model: a network in ``eval()``, with Kalman or BatchNorm layers. It is not changed.

    Returns:
        A fused copy, as a graph of ``torch.fx``, with a copy of a convolution for each of its calls.

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
    traced = _traced(to_batchnorm(copy.deepcopy(model)))
    for norm in (left := _not_folded(traced)):
        norm.track_running_stats = False  # by which torch leaves it
    fused = fuse_graph(traced, inplace=True, no_trace=True)
    for norm in left:
        norm.track_running_stats = True
    return fused  # type: ignore[return-value]


def _not_folded(traced: torch.fx.GraphModule) -> list[nn.BatchNorm1d]:
    """The layers behind linear ones that torch cannot fold: without a weight, or over an axis before the last."""
    inside = dict(traced.named_modules())
    calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.args]
    pairs = [(inside.get(getattr(node.args[0], "target", None)), inside[node.target]) for node in calls]
    return [
        norm for linear, norm in pairs
        if isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and norm.track_running_stats
        and (norm.weight is None or norm.num_features != linear.out_features)
    ]  # fmt: skip


def _traced(model: nn.Module) -> torch.fx.GraphModule:
    """The model's graph with a copy of a convolution for each call, as different layers may follow, and functions may
    read the weight of the first.
    """
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception as error:  # the model's own code runs on stand-ins, and may raise anything
        raise untraceable(
            model, error, "expected a forward whose course does not depend on its input: deploy "
            "kalmannorm.to_batchnorm(model), or fuse the parts of it that can be traced",
        ) from error  # fmt: skip
    called = {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        if node.target in called and isinstance(traced.get_submodule(node.target), _FOLDED_INTO):
            copied = f"{node.target}_copy{len(called)}"
            traced.add_submodule(copied, copy.deepcopy(traced.get_submodule(node.target)))
            node.target = copied
        called.add(node.target)
    return traced
