"""Proxy Normalization after an activation (Labatie et al., NeurIPS 2021, arXiv:2106.03743)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from kalmannorm import Gaussian
from kalmannorm.lab.baselines.activated import Activation, replace_batchnorm_relu
from kalmannorm.rules.table import RULES, as_rule_is_called

# A function of torch, and the arguments of its rule after the belief.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class ProxyNormalized(nn.Module):
    """A normalization layer, the activation after it, and Proxy Normalization.

        y = activation(norm(x))
        z = (y - E[activation(Y)]) / sqrt(Var[activation(Y)] + eps)

    Each channel's proxy ``Y`` is the layer's affine map, ``weight`` and ``bias``, of a Gaussian:

        Y ~ N(bias + weight * shift, (weight * (1 + scale))^2)

    Its moments come from the library's rule for the activation, most in closed form (the authors'
    code uses 200 quantiles). Gradients flow through them to weight, bias, shift and scale. A prior
    that is propagated through the layer is transformed in the same way.

    Args:
        norm: A layer with ``weight`` and ``bias``, ``(C,)`` each; so must be a later replacement.
        activation: One that has a rule.
        learned: Learn ``shift`` and ``scale``, which begin at 0; otherwise they stay 0. They are the
            rows of the parameter ``proxy``, ``(2, C)``, which is decayed like weights, as in the
            authors' released code (``proxy_norm.py`` of Graphcore's examples).
        eps: Added to the variance, with the authors' default.
    """

    proxy: Tensor | None

    def __init__(self, norm: nn.Module, activation: Activation, learned: bool = True, eps: float = 0.03) -> None:
        super().__init__()
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"ProxyNormalized got {norm}, expected a layer with a weight and a bias of each channel")
        self.norm, self.activation, self.eps = norm, activation, eps
        self._called = _first_call(activation)
        self.register_parameter("proxy", nn.Parameter(torch.zeros(2, len(weight))) if learned else None)

    def forward(self, input: Tensor) -> Tensor:
        y = self.activation(self.norm(input))
        mean, scale = self.moments()
        shape = (-1, *[1] * (y.ndim - 2))
        return ((y - mean.view(shape)) * scale.view(shape)).to(y.dtype)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The proxy's mean and the inverse of its standard deviation: ``(C,)`` each, in float32 at least."""
        weight: Any = self.norm.weight
        bias: Any = self.norm.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight, bias = weight.to(wide), bias.to(wide)
        if self.proxy is not None:
            shift, scale = self.proxy.to(wide)
            weight, bias = weight * (1 + scale), bias + weight * shift
        function, args, kwargs = self._called
        moments = RULES[function](Gaussian(bias, weight.square()), *args, **kwargs)
        return moments.mean, (moments.var + self.eps).rsqrt()

    def extra_repr(self) -> str:
        return f"learned={self.proxy is not None}, eps={self.eps}"


class _FirstCall(TorchFunctionMode):
    """Records the first call of a function that has a rule, and returns its input instead."""

    def __init__(self) -> None:
        super().__init__()
        self.call: _Call | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = as_rule_is_called(RULES[func], args, kwargs or {}) if func in RULES else None
        if called is None or self.call is not None:
            return func(*args, **(kwargs or {}))
        (x, *others), settings = called
        self.call = func, tuple(others), settings
        return x


def _first_call(activation: Activation) -> _Call:
    """The first function with a rule that an activation calls."""
    first = _FirstCall()
    with first:
        activation(torch.zeros(1))
    if first.call is None:
        raise ValueError(f"ProxyNormalized got the activation {activation}, expected one with a rule in kalmannorm")
    return first.call


def to_proxy(model: nn.Module, learned: bool = True) -> nn.Module:
    """Replace every BatchNorm before an activation, and that activation, by `ProxyNormalized`.

    The BatchNorm stays inside, where it can be replaced later. Activations after an addition stay.
    For how an activation is found see `kalmannorm.lab.baselines.activated.replace_batchnorm_relu`.

    Example:
        >>> to_proxy(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())).get_submodule("0").activation
        ReLU()
    """

    def proxied(norm: _BatchNorm, activation: Activation | None) -> nn.Module:
        return norm if activation is None else ProxyNormalized(norm, activation, learned)

    return replace_batchnorm_relu(model, proxied)
