"""Filters of zero mean and unit norm, for which a prior's assumption of independence nearly holds.

After a ReLU, activations rise and fall together. A filter whose weights do not sum to zero adds up these common
changes, which the rules take for independent, so the prior variance of its output is too small.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kalmannorm.kernels.formulas import at_least_float32
from kalmannorm.modules import KalmanLayer
from kalmannorm.recording import paused
from kalmannorm.steps import found_in
from kalmannorm.traversal import attributes_kept, random_state_kept, untraceable

_M = TypeVar("_M", bound=nn.Module)
_Filters = frozenset[str]  # names of convolutions and linear layers
_Norms = defaultdict[str, list[str]]  # the normalization layers that a filter's output reaches, by names
_EPS = 1e-4

# Functions between a filter and a norm: linear maps, maxima, and changes of shape.
_FUNCTIONS = frozenset("""
    add iadd sub isub neg cat concat stack chunk split tensor_split unbind getitem mean sum amax amin max min avg_pool1d
    avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d dropout dropout1d dropout2d dropout3d stochastic_depth
    drop_path reshape view flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze contiguous clone
    roll flip pad interpolate upsample pixel_shuffle pixel_unshuffle channel_shuffle to float
""".split())  # noqa: SIM905 - shorter
_SCALINGS = frozenset({"mul", "imul", "truediv", "itruediv", "div", "multiply", "divide"})
_TORCH_HOMES = frozenset(
    f"torch.nn.modules.{home}" for home in ("dropout", "flatten", "padding", "pixelshuffle", "pooling", "upsampling")
)
_PASSED = frozenset({"ChannelShuffle", "DropBlock2d", "DropBlock3d", "DropPath", "Identity", "StochasticDepth"})


@fx.wrap
def standardized(weight: Tensor) -> Tensor:
    """Each filter of ``(C_out, ...)`` with zero mean and unit norm: ``(W - mean) / sqrt(var * fan_in + 1e-4)``.

    Qiao et al. 2019, arXiv:1903.10520, Eq. 7, with the unit norm of a filter in place of unit variance. Computed in
    float32 at least; typed as the weight.
    """
    with paused():
        shape = weight.shape[1:]
        wide = at_least_float32(weight)
        unit = wide.new_full(shape, shape.numel() ** -0.5)
        return F.layer_norm(wide, shape, unit, None, _EPS / shape.numel()).to(weight.dtype)


class _StandardizedConv:
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardized(weight), bias)  # type: ignore[misc,no-any-return]


class StandardizedConv1d(_StandardizedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` by standardized filters."""


class StandardizedConv2d(_StandardizedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` by standardized filters."""


class StandardizedConv3d(_StandardizedConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` by standardized filters."""


class StandardizedLinear(nn.Linear):
    """:class:`torch.nn.Linear` by standardized rows; its parameter is the raw matrix."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, in_features)`` to ``(*, out_features)``."""
        return F.linear(input, standardized(self.weight), self.bias)


_STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
    nn.Linear: StandardizedLinear,
}
_STOCK = {new: stock for stock, new in _STANDARDIZED.items()}


def standardize_weights(model: _M, names: Iterable[str] | None = None, *, inputs: Any = None) -> _M:
    """Give the convolutions and linear layers below normalization layers filters of zero mean and unit norm, in place.

    Layers keep their parameters, hooks and names. ``weight`` is still the raw filter for ``state_dict``
    and optimizer; each call standardizes it (Qiao et al. 2019). Priors are then closer to right from the
    first step on. This is for training from scratch: it changes a trained network's outputs.

    A layer is standardized if its output reaches a Kalman, batch, group or instance normalization layer
    through sums, concatenation, pooling, dropout and changes of shape alone. The model's graph is found
    by ``torch.fx``, or by one call with ``inputs``, which works for every model. :func:`to_batchnorm`
    writes standardized filters into ``weight``; call it before other code folds a normalization layer.

    Args:
        model: the network, with or without Kalman layers.
        names: qualified names of the layers to standardize, whatever the graph and the normalization layers are.
        inputs: a tensor, positional arguments (a tuple), or keyword arguments (a mapping) to call a copy of the model
            with, in training mode.

    Returns:
        The model. A warning lists layers that cannot be standardized: with filters of one weight, or a forward or
        parameters of their own; and transposed convolutions, whose outputs each meet only some taps.

    Raises:
        ValueError: for a model that ``torch.fx`` cannot trace; without a layer to standardize; for names that are
            unknown or of other layers; for normalization layers that have tracked batches.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
        >>> [type(layer).__name__ for layer in kn.standardize_weights(model)]
        ['StandardizedConv2d', 'BatchNorm2d', 'ReLU', 'Conv2d']
    """
    use_standardized(filters_below_norms(model, inputs) if names is None else _named(model, names))
    return model


def use_standardized(layers: Iterable[nn.Module]) -> None:
    """Let stock layers compute with standardized filters."""
    for layer in layers:
        layer.__class__ = _STANDARDIZED[type(layer)]


def bake(model: nn.Module) -> None:
    """Write standardized filters into the parameters of stock layers; warn of those that stay as they are."""
    left = []
    written: set[int] = set()  # filters that layers share are written once
    for name, layer in model.named_modules():
        if type(layer) in _STOCK and "weight" in layer._parameters:
            with torch.no_grad():
                if id(layer.weight) not in written:
                    layer.weight.copy_(standardized(layer.weight))  # type: ignore[operator,arg-type]
            written.add(id(layer.weight))
            layer.__class__ = _STOCK[type(layer)]
        elif isinstance(layer, _StandardizedConv | StandardizedLinear):
            left.append(name)
    if left:
        warnings.warn(
            f"kalmannorm.to_batchnorm leaves {left} standardized, whose weights are pruned or parametrized: no stock "
            "layer computes the same from these tensors. Call torch.nn.utils.prune.remove or "
            "parametrize.remove_parametrizations first",
            stacklevel=3,
        )


def filters_below_norms(model: nn.Module, inputs: Any = None) -> list[nn.Module]:
    """The layers that :func:`standardize_weights` changes; warns of those that it cannot change."""
    reached, read = _norms_in_a_trace(model) if inputs is None else _norms_in_a_call(model, inputs)
    if not reached:
        raise ValueError(
            f"{type(model).__name__} has nothing to standardize: no convolution or linear layer whose output reaches a "
            "normalization layer without an activation in between, expected at least one"
        )
    layers = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name in reached}
    reasons = {
        name: _why_not(model, layer) or ("has a weight that another function uses" if f"{name}.weight" in read else "")
        for name, layer in layers.items()
    }
    found = {name: layer for name, layer in layers.items() if not reasons[name] and type(layer) not in _STOCK}
    for norm in (norm for name in found for norm in reached[name]):
        _refuse_trained(norm, model.get_submodule(norm))
    if left := [f"{name!r} {why}" for name, why in reasons.items() if why]:
        warnings.warn(f"kalmannorm.standardize_weights leaves {'; '.join(left)}", stacklevel=3)
    return list(found.values())


def _named(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The layers of these names."""
    if isinstance(names, str):
        raise ValueError(f"kalmannorm.standardize_weights got names={names!r}, expected a list of layers' names")
    layers = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, None] = {}  # each once, in this order
    for name in names:
        if name not in layers:
            raise ValueError(f"{type(model).__name__} has no layer {name!r}, expected names of model.named_modules()")
        if why := _why_not(model, layers[name]):
            raise ValueError(f"kalmannorm.standardize_weights cannot standardize {name!r}: it {why}")
        found[layers[name]] = None
    return [layer for layer in found if type(layer) not in _STOCK]


def _why_not(model: nn.Module, layer: nn.Module) -> str:
    """Why a layer cannot be standardized; empty if it can."""
    kind = type(layer)
    if kind in _STOCK:
        return ""
    if isinstance(layer, _ConvTransposeNd):
        return f"is a {kind.__name__}, whose outputs meet only some taps of a filter each"
    if kind not in _STANDARDIZED:
        return f"is a {kind.__module__}.{kind.__name__}, not a torch.nn.Conv1d, Conv2d, Conv3d or Linear itself"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight from other tensors"
    if "forward" in vars(layer) or "_conv_forward" in vars(layer):
        return "has a forward of its own"
    if weight.shape[1:].numel() == 1:
        return "has filters of one weight"
    for name, other in model.named_modules():
        if other is not layer and any(parameter is weight for parameter in other._parameters.values()):
            return f"shares its weight with {name!r}"
    return ""


def _refuse_trained(name: str, norm: nn.Module) -> None:
    """Raise for a normalization layer with statistics of the function that standardized filters would change."""
    batches, so_far = getattr(norm, "num_batches_tracked", None), ""
    if isinstance(batches, Tensor):
        so_far = "" if batches.is_meta or int(batches) == 0 else f"has tracked {int(batches)} batches"
    elif isinstance(getattr(norm, "running_var", None), Tensor):
        so_far = "holds statistics of a trained network"
    if not so_far:
        return
    raise ValueError(
        f"{type(norm).__name__} {name!r} {so_far}: standardized filters would change the network's function. Expected "
        "a network with fresh weights. A pretrained one is converted by kalmannorm.convert(model), which corrects its "
        "priors by the running statistics (calibrate); weights trained with standardized filters are loaded after "
        "kalmannorm.standardize_weights(model)"
    )


# -- which filters reach a norm --------------------------------------------------------------------


def _is_norm(layer: nn.Module) -> bool:
    """Whether a layer is Kalman, batch, group or instance normalization, of any library."""
    return isinstance(layer, KalmanLayer | nn.GroupNorm) or hasattr(layer, "running_var")


class _Tracer(fx.Tracer):
    """Keeps layers with weights and random depth whole, and runs no hooks."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, _ConvNd | nn.Linear) or _is_norm(m) or type(m).__name__ in _PASSED
        return is_layer or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _traced_in_training(model: nn.Module) -> fx.Graph:
    """The model's graph in training mode."""
    attributes = set(vars(model))
    try:
        with attributes_kept(model.modules(), "training"):
            for module in model.modules():
                module.training = True
            return _Tracer().trace(model)
    except Exception as error:  # the model's own code runs on stand-ins, and may raise anything
        raise untraceable(
            model, error, "so kalmannorm.standardize_weights cannot tell which filters reach a normalization layer. "
            "Give it an input to call the model with: kalmannorm.standardize_weights(model, inputs=images)",
        ) from error  # fmt: skip
    finally:
        for name in set(vars(model)) - attributes:  # tensors that its forward makes
            delattr(model, name)


def _norms_in_a_trace(model: nn.Module) -> tuple[_Norms, set[str]]:
    """In a trace of the model: the normalization layers that each filter's output reaches, and the names of the
    parameters that functions outside of layers read.
    """
    norms: _Norms = defaultdict(list)
    read: set[str] = set()
    if _is_norm(model):
        return norms, read
    filters: dict[fx.Node, _Filters | None] = {}  # None: computed from parameters and buffers alone
    for node in _traced_in_training(model).nodes:
        inputs = [filters[each] for each in node.all_input_nodes]
        below = [each for each in inputs if each is not None]
        filters[node] = frozenset()
        if node.op == "call_module":
            name, layer = str(node.target), model.get_submodule(str(node.target))
            if _is_norm(layer):
                for each in _union(below):
                    norms[each].append(name)
            elif isinstance(layer, _ConvNd | nn.Linear):
                filters[node] = frozenset({name})
            elif type(layer).__module__ in _TORCH_HOMES or type(layer).__name__ in _PASSED:
                filters[node] = _union(below)
        elif node.op == "get_attr":
            filters[node] = None
            read.add(str(node.target))
        elif node.op in ("call_function", "call_method"):
            function = node.target if isinstance(node.target, str) else node.target.__name__
            filters[node] = None if inputs and not below else _after(function, below)
    return norms, read


def _after(function: str, below: Sequence[_Filters]) -> _Filters:
    """The filters that a function's output is made of, given those of its arguments that are not constant.

    None where it mixes in weights, or a nonlinearity other than a maximum.
    """
    name = function.strip("_")
    passes = name in _FUNCTIONS or (name in _SCALINGS and len(below) == 1)
    return _union(below) if passes else frozenset()


def _union(below: Sequence[_Filters]) -> _Filters:
    return frozenset().union(*below)


class _Following(TorchFunctionMode):
    """Finds the filters whose outputs the tensors of a call are made of; tensors without an entry are constant."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = WeakTensorKeyDictionary()
        self.read: set[int] = set()  # parameters, by `id`, that functions outside of layers read
        self.in_layer = False

    def of(self, values: Any) -> list[_Filters]:
        return [self.filters[t] for t in found_in((values,), Tensor) if t in self.filters]

    def put(self, values: Any, filters: _Filters) -> None:
        self.filters.update(dict.fromkeys(found_in((values,), Tensor), filters))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.in_layer:
            self.read.update(map(id, found_in((args, kwargs or {}), nn.Parameter)))
        if below := self.of((args, kwargs or {})):
            self.put(output, _after(func.__name__, below))
        return output


def _norms_in_a_call(model: nn.Module, inputs: Any) -> tuple[_Norms, set[str]]:
    """As :func:`_norms_in_a_trace`, by a call of a copy."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    norms: _Norms = defaultdict(list)
    following = _Following()

    def enter_norm(name: str, norm: nn.Module, args: Any) -> None:
        for each in _union(following.of(args)):
            norms[each].append(name)

    def enter(layer: nn.Module, args: Any) -> None:
        following.in_layer = True

    def leave(filters: _Filters, layer: nn.Module, args: Any, output: Any) -> None:
        following.in_layer = False
        following.put(output, filters)

    followed = copy.deepcopy(model).train()
    for name, module in followed.named_modules():
        if _is_norm(module):
            module.register_forward_pre_hook(partial(enter_norm, name))
            module.register_forward_hook(partial(leave, frozenset()))
        elif isinstance(module, _ConvNd | nn.Linear):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(partial(leave, frozenset({name})))
    following.put((args, kwargs), frozenset())
    with torch.no_grad(), random_state_kept(model), following:
        followed(*args, **kwargs)
    return norms, {name for name, p in followed.named_parameters(remove_duplicate=False) if id(p) in following.read}
