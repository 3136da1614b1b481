"""Layers in the place of a BatchNorm and the ReLU behind it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.baselines.replacing import replace_batchnorm
from kalmannorm.traversal import untraceable

Activation = Callable[[Tensor], Tensor]

_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU)
_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, F.leaky_relu, F.silu, F.hardswish, F.gelu, F.elu)
_METHODS = ("relu", "relu_")


def replace_batchnorm_relu(model: nn.Module, make: Callable[[_BatchNorm, Activation | None], nn.Module]) -> nn.Module:
    """Replace every BatchNorm of a network, and take away the ReLU that directly follows it.

    `torch.fx` traces the network to find which ReLU belongs to which layer, so ``F.relu``, and one
    ``nn.ReLU`` called in many places, are told apart. An activation elsewhere, such as behind a
    residual addition, stays. ReLU means here: it, its relatives, SiLU, GELU and ELU; the activation
    inside timm's ``BatchNormAct2d`` too.

    Tracing fixes what depends on Python values: the network cannot take other branches later, and
    ``F.dropout`` in a module with a BatchNorm or an activation keeps the mode it was traced in.
    Modules with neither, such as ``nn.Dropout`` and stochastic depth, stay as they are. Build a
    network that cannot be traced with such a ``norm_layer``, and ``nn.Identity`` as activation.

    Args:
        model: Any network with BatchNorm layers; use it no more.
        make: From a BatchNorm, and the activation that follows or None, to what replaces both.

    Returns:
        A traced network that shares everything else with ``model``, whose names it keeps.
    """
    traced = _trace(model)
    removed = _remove_activations(traced)
    return replace_batchnorm(traced, lambda norm: make(norm, removed.get(norm)))


class _Tracer(fx.Tracer):
    def __init__(self, whole: set[nn.Module]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Other libraries' BatchNorm layers stay whole, too, and what there is nothing to take from."""
        return isinstance(m, _BatchNorm) or m in self.whole or super().is_leaf_module(m, module_qualified_name)


class _Traced(fx.GraphModule):
    """Keeps forward hooks when it is copied, by which a network is connected to its Kalman layers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Any = super().__deepcopy__(memo)
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
                     "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):  # fmt: skip
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied  # type: ignore[no-any-return]


def _has_nothing_to_take(module: nn.Module) -> bool:
    """Whether a module is without BatchNorm and activation; False where that cannot be told."""
    if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return False
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # whatever its own code raises; where it stands it may get other arguments
        return False
    modules = dict(module.named_modules(remove_duplicate=False))
    *calls, output = graph.nodes
    # A network may look into a list or a dict that it gets, which one call's output does not let it do.
    return isinstance(output.args[0], fx.Node) and not any(_is_activation(node, modules) for node in calls)


def _trace(model: nn.Module) -> fx.GraphModule:
    # A module that is a leaf of its own tracing would not be called at all. Inside of those with nothing to take,
    # tracing would fix what they did in training, as stochastic depth draws.
    root = nn.Sequential(model) if isinstance(model, _BatchNorm) else model
    try:
        graph = _Tracer({module for module in root.modules() if _has_nothing_to_take(module)}).trace(root)
    except Exception as error:  # whatever the network's own code raises where it meets a proxy
        raise untraceable(
            model, error, "which finds the ReLU behind each BatchNorm: expected one that can, or build it with this "
            "layer as norm_layer and nn.Identity as activation",
        ) from error  # fmt: skip
    return _Traced(root, graph, type(model).__name__)


def _remove_activations(traced: fx.GraphModule) -> dict[nn.Module, Activation]:
    """The BatchNorm layers that had an activation behind them, and which."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    found: dict[nn.Module, set[bool]] = {}
    removed: dict[nn.Module, Activation] = {}
    for node in list(traced.graph.nodes):
        layer = modules[node.target] if node.op == "call_module" else None
        if not isinstance(layer, _BatchNorm):
            continue
        activation = _activation_behind(node, modules)
        inside: Any = getattr(layer, "act", None)
        found.setdefault(layer, set()).add(activation is not None or isinstance(inside, _MODULES))
        if activation is not None:
            removed[layer] = _called(activation, modules)
            activation.replace_all_uses_with(activation.all_input_nodes[0])
            traced.graph.erase_node(activation)
        if isinstance(inside, _MODULES):
            removed[layer], layer.act = inside, nn.Identity()
        if len(found[layer]) > 1:
            raise ValueError(
                f"BatchNorm {node.target!r} is called twice, expected an activation behind both calls or none"
            )
    traced.recompile()
    traced.delete_all_unused_submodules()
    return removed


@dataclass(frozen=True)
class _Function:
    """A function or method of torch, and its arguments behind the first."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> Activation:
    """The function or module that a node of an activation calls."""
    if node.op == "call_module":
        return modules[str(node.target)]
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    settings = {name: value for name, value in node.kwargs.items() if not isinstance(value, fx.Node)}
    return _Function(function, tuple(node.args[1:]), settings)


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The call that alone uses a layer's output, if it is an activation; timm has an ``nn.Identity`` between them."""
    while len(node.users) == 1:
        (node,) = node.users
        if _is_activation(node, modules):
            return node
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.Identity):
            return None
    return None


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _MODULES)
    return (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
