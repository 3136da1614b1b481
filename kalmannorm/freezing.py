"""Normalization layers with fixed statistics and parameters."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.modules import KalmanLayer

_M = TypeVar("_M", bound=nn.Module)


def freeze(model: _M, frozen: bool = True) -> _M:
    """Fix statistics and parameters of normalization layers, in training too (the paper's BN*).

    :class:`KalmanNorm` and stock BatchNorm layers normalize by their running statistics even in ``train()``, and their
    parameters get no gradient. A layer without running statistics, such as :class:`GroupKalmanNorm`, still fuses. The
    belief about a frozen Kalman layer's output comes from its running statistics.

    Called after 70 % of the steps, and after :func:`kalmannorm.recalibrate`, it closes a gap between training and
    ``eval()``, which single samples leave: the network then trains as ``eval()`` uses it.

    Layers stay frozen through ``model.train()``, copying and pickling; the ``state_dict`` does not say so.
    ``reset_running_stats()``, and so ``torch.optim.swa_utils.update_bn``, leaves a frozen Kalman layer as it is, and
    empties a stock one. Wrap the model for distributed training after it, or again.

    Args:
        model: the network, or a part of one, changed in place.
        frozen: False undoes it: all of these parameters get gradients, and stock BatchNorm layers the model's training
            flag.

    Returns:
        The model.

    Raises:
        ValueError: for a model without Kalman and BatchNorm layers.

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
                parameter.grad = None  # the optimizer's next step would use it
        if isinstance(layer, KalmanLayer):
            layer.frozen = frozen
        elif frozen:
            layer.training = False
            if not is_frozen(layer):
                layer.register_forward_pre_hook(_to_eval)
        elif is_frozen(layer):
            remove_freezing_hook(layer)
            layer.training = model.training
    return model


def is_frozen(layer: nn.Module) -> bool:
    """Whether :func:`freeze` has frozen a layer."""
    if isinstance(layer, KalmanLayer):
        return layer.frozen
    return _to_eval in layer._forward_pre_hooks.values()


def unfrozen_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm and :class:`KalmanNorm` layers that are not frozen, by name."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm))
    return {name: layer for name, layer in layers if not is_frozen(layer)}


def _to_eval(layer: nn.Module, args: Any) -> None:
    """Forward pre-hook of a frozen stock layer."""
    if layer.training:
        layer.training = False


def remove_freezing_hook(layer: nn.Module) -> None:
    """Remove the hook that keeps a frozen stock layer in ``eval()``, if it is there."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _to_eval:
            del layer._forward_pre_hooks[key]
