"""Normalization layers fixed at what they have learned."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.modules import KalmanLayer

__all__ = ["freeze", "is_frozen", "remove_freezing_hook"]

_M = TypeVar("_M", bound=nn.Module)


def freeze(model: _M, frozen: bool = True) -> _M:
    """Fix normalization layers at what they have learned, in training too (the paper's BN*).

    :class:`KalmanNorm` and stock BatchNorm layers normalize by their running statistics even in
    ``train()``, and their affine map, gain and process noise get no gradient. A layer without running
    statistics, such as :class:`GroupKalmanNorm`, still fuses; only its parameters are fixed. To the
    layers above, a frozen Kalman layer hands on what its running statistics say.

    It holds through ``model.train()``, copying and pickling; like the training flag, it is not in the
    ``state_dict``. A frozen stock BatchNorm layer keeps its class: a forward pre-hook holds it in
    ``eval()``. Freeze before the model is wrapped for distributed training.

    Args:
        model: the network, changed in place; or a part of one.
        frozen: False undoes it. All these parameters then get gradients, whatever they did before, and
            stock BatchNorm layers the model's training flag.

    Returns:
        The model.

    Raises:
        ValueError: where the model has no Kalman and no BatchNorm layer.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), kn.KalmanNorm2d(8))
        >>> [name for name, parameter in kn.freeze(model).named_parameters() if parameter.requires_grad]
        ['0.weight', '0.bias']
    """
    layers = [m for m in model.modules() if isinstance(m, KalmanLayer | _BatchNorm)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has nothing to freeze: no Kalman layer and no BatchNorm layer")
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None  # or the optimizer's next step would still use it
        if isinstance(layer, KalmanLayer):
            layer.frozen = frozen
        elif frozen:
            _hold_in_eval(layer)
        elif is_frozen(layer):
            remove_freezing_hook(layer)
            layer.training = model.training
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether :func:`freeze` has frozen a layer."""
    if isinstance(layer, KalmanLayer):
        return layer.frozen
    return _to_eval in layer._forward_pre_hooks.values()


def _to_eval(layer: nn.Module, args: Any) -> None:
    """Forward pre-hook of a frozen stock layer."""
    if layer.training:
        layer.training = False


def _hold_in_eval(layer: nn.Module) -> None:
    layer.training = False
    if not is_frozen(layer):
        layer.register_forward_pre_hook(_to_eval)


def remove_freezing_hook(layer: nn.Module) -> None:
    """Remove the hook that keeps a frozen stock layer in ``eval()``, if it is there."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _to_eval:
            del layer._forward_pre_hooks[key]
