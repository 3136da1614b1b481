"""Weight Normalization (Salimans & Kingma, 2016, arXiv:1602.07868) instead of BatchNorm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrizations

from kalmannorm.lab.baselines.replacing import replace_batchnorm
from kalmannorm.traversal import attributes_kept


def to_weight_norm(model: nn.Module) -> nn.Module:
    """Weight-normalize convolutions and linear layers, in place, and remove BatchNorm.

    ``w = g v / |v|``, with a norm over all but the output channels
    (`torch.nn.utils.parametrizations`); layers without a bias get one. Transposed convolutions in
    groups stay as they are: torch's norm does not separate their output channels.

    The initialization depends on data: at its first forward pass in training, each layer sets ``g``
    and the bias so that its output has mean 0 and variance 1 in each channel, over that batch,
    before the next layer is called (the paper's section 3). The buffer ``awaits_data`` is True until
    then, so weights of a checkpoint are not initialized again. On several devices, where the first
    batches differ, call `initialize` before the network is wrapped.

    Example:
        >>> to_weight_norm(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)))[0].bias.shape
        torch.Size([2])
    """
    model = replace_batchnorm(model, lambda norm: nn.Identity())
    for layer in list(model.modules()):
        if _can_be_normalized(layer) and not hasattr(layer, "awaits_data"):
            _normalize(layer)
    return model


def initialize(model: nn.Module, images: Tensor) -> nn.Module:
    """Initialize ``g`` and biases of a network from `to_weight_norm` by a training batch, in place."""
    for layer in model.modules():
        awaits_data = getattr(layer, "awaits_data", None)
        if isinstance(awaits_data, Tensor):
            awaits_data.fill_(True)
    with attributes_kept(model.modules(), "training"), torch.no_grad():
        model.train()(images)
    return model


def _can_be_normalized(layer: nn.Module) -> bool:
    if isinstance(layer, _ConvTransposeNd):
        return layer.groups == 1
    return isinstance(layer, _ConvNd | nn.Linear)


def _normalize(layer: Any) -> None:
    weight: Tensor = layer.weight
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    if layer.bias is None:
        layer.bias = nn.Parameter(weight.new_zeros(weight.shape[axis]))
    parametrizations.weight_norm(layer, dim=axis)
    layer.register_buffer("awaits_data", torch.tensor(True, device=weight.device))
    layer.register_forward_pre_hook(_initialize_once)


@torch.no_grad()
def _initialize_once(layer: Any, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook: initialize ``g`` and the bias before the forward pass, which saves ``g`` for backward."""
    if not layer.training or not layer.awaits_data:
        return
    y = layer.forward(*args)
    channels = 1 if isinstance(layer, _ConvNd) else y.ndim - 1
    if y.ndim == 3 and isinstance(layer, _ConvNd) and len(layer.kernel_size) == 2:
        channels = 0  # an image without a batch axis
    var, mean = torch.var_mean(y, [axis for axis in range(y.ndim) if axis != channels], correction=0)
    # A constant channel keeps its scale.
    scale = torch.where(var > 1e-12, var.clamp_min(1e-12).rsqrt(), 1)
    g: Tensor = layer.parametrizations.weight.original0
    g.mul_(scale.view([-1 if size > 1 else 1 for size in g.shape]))
    layer.bias.copy_((layer.bias - mean) * scale)
    layer.awaits_data.fill_(False)
