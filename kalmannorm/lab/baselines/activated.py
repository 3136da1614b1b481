"""Replacing a BatchNorm and the ReLU after it by one layer."""

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
    """Replace every BatchNorm of a network, and remove the ReLU that directly follows it.

    `torch.fx` traces the network to find the ReLU of each layer, so ``F.relu`` and an ``nn.ReLU``
    that is called in many places work too. Other activations, such as after a residual addition,
    stay. "ReLU" includes its relatives, SiLU, GELU and ELU, and the activation inside timm's
    ``BatchNormAct2d``.

    Tracing fixes Python control flow: the network cannot take other branches later, and
    ``F.dropout`` in a module with a BatchNorm or an activation keeps the mode it was traced in.
    Modules with neither, such as ``nn.Dropout`` and stochastic depth, are not traced. A network that
    cannot be traced must be built with the replacement as ``norm_layer`` and ``nn.Identity`` as
    activation.

    Args:
        model: Any network with BatchNorm layers; do not use it afterwards.
        make: From a BatchNorm, and the activation that follows or None, to the layer that replaces both.

    Returns:
        A traced network that shares all other modules with ``model``, under the same names.
    """
    traced = _trace(model)
    removed = _remove_activations(traced)
    return replace_batchnorm(traced, lambda norm: make(norm, removed.get(norm)))


class _Tracer(fx.Tracer):
    def __init__(self, whole: set[nn.Module]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not trace into BatchNorm layers of any library, or into the modules in ``whole``."""
        return isinstance(m, _BatchNorm) or m in self.whole or super().is_leaf_module(m, module_qualified_name)


class _Traced(fx.GraphModule):
    """A GraphModule whose copies keep the forward hooks, which connect a network to its Kalman layers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Any = super().__deepcopy__(memo)
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
                     "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):  # fmt: skip
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied  # type: ignore[no-any-return]


def _has_no_activation(module: nn.Module) -> bool:
    """Whether a module has neither BatchNorm nor activation; False if it cannot be traced."""
    if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        return False
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # the module's own code may raise anything
        return False
    modules = dict(module.named_modules(remove_duplicate=False))
    *calls, output = graph.nodes
    # The network may index a list or dict output, which the output of a single traced call does not support.
    return isinstance(output.args[0], fx.Node) and not any(_is_activation(node, modules) for node in calls)


def _trace(model: nn.Module) -> fx.GraphModule:
    # A root that is a leaf module would not be called at all, so it is wrapped. Modules without an activation are
    # leaves, because tracing would fix their random behaviour, such as stochastic depth.
    root = nn.Sequential(model) if isinstance(model, _BatchNorm) else model
    try:
        graph = _Tracer({module for module in root.modules() if _has_no_activation(module)}).trace(root)
    except Exception as error:  # the network's own code may raise anything on a proxy
        raise untraceable(
            model, error, "which finds the ReLU behind each BatchNorm: expected one that can, or build it with this "
            "layer as norm_layer and nn.Identity as activation",
        ) from error  # fmt: skip
    return _Traced(root, graph, type(model).__name__)


def _remove_activations(traced: fx.GraphModule) -> dict[nn.Module, Activation]:
    """Remove the activations after BatchNorm layers, and return them by layer."""
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
    """A function or method of torch, and its arguments after the first."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args, **self.kwargs)


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> Activation:
    """The function or module that an activation's node calls."""
    if node.op == "call_module":
        return modules[str(node.target)]
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    settings = {name: value for name, value in node.kwargs.items() if not isinstance(value, fx.Node)}
    return _Function(function, tuple(node.args[1:]), settings)


def _activation_behind(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The only user of a layer's output, if it is an activation; timm has an ``nn.Identity`` between them."""
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
