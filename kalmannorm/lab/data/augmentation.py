"""Crops, flips and scaling of whole batches, on their device.

Transforms of torchvision's v2 draw once for a batch; these draw for each image.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def draw_moves(count: int, generator: torch.Generator, *, padding: int = 4, flip: bool = True) -> Tensor:
    """Random crop offsets, from 0 to 2 ``padding``, and flips, 0 or 1: ``(count, 3)``, int64.

    The generator is on the CPU, so that the draws do not depend on the device.
    """
    corners = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    flips = torch.randint(0, 2, (count, 1), generator=generator) * int(flip)
    return torch.cat([corners, flips], 1)


def mean_colour(images: Tensor) -> Tensor:
    """The mean of each channel of ``images`` ``(N, C, H, W)``, uint8, rounded: ``(C,)``, uint8."""
    total = images.sum((0, 2, 3), dtype=torch.int64).double()
    return (total / (images.numel() / images.shape[1])).round().to(torch.uint8)


def crop_and_flip(images: Tensor, moves: Tensor, padding: int = 4, border: Tensor | None = None) -> Tensor:
    """Pad images ``(N, C, H, W)``, crop each at its own offset, and flip some left to right.

    ``moves`` are from `draw_moves`, on the images' device. ``border`` is the colour of the padding,
    ``(C,)``, of the images' dtype; None for black.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    if border is not None:
        around = F.pad(torch.zeros_like(images[:1, :1]), [padding] * 4, fill=1).bool()
        padded = torch.where(around, border[:, None, None], padded)
    top, left, flip = moves[:, :, None].unbind(1)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    columns = torch.where(flip.bool(), columns.flip(1), columns)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    cut: Tensor = padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return cut


@dataclass(frozen=True)
class Scaling:
    """Scales pixels, 0 to 255, to ``(pixels - mean) / scale``, float32.

    Attributes:
        mean: In pixel values, broadcastable to ``(N, C, H, W)``.
        scale: Likewise.
        size: Side of the square images after bilinear resizing; None does not resize.
    """

    mean: Tensor
    scale: Tensor
    size: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        scaled = (images.float() - self.mean) / self.scale
        return scaled if self.size is None else F.resize(scaled, [self.size, self.size])

    def to(self, device: torch.device | str) -> Self:
        return replace(self, mean=self.mean.to(device), scale=self.scale.to(device))


def channel_scaling(images: Tensor) -> Scaling:
    """Mean 0 and standard deviation 1 in each channel of ``images`` ``(N, C, H, W)``, uint8."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    value = torch.arange(256.0, dtype=torch.float64, device=images.device)
    mean = (share * value).sum(1)
    std = (share * value.square()).sum(1).sub(mean.square()).sqrt()
    return Scaling(mean.float()[:, None, None], std.float().clamp(min=1.0)[:, None, None])


def standardization(inputs: Tensor) -> Scaling:
    """Mean 0 and deviation 1 in each channel of ``(N, C, *)``; constant ones become 0."""
    variance, mean = torch.var_mean(inputs.double(), [0, *range(2, inputs.ndim)], correction=0, keepdim=True)
    std = variance.sqrt()
    return Scaling(mean[0].float(), torch.where(std > 0, std, 1.0)[0].float())


def pixel_scaling(images: Tensor) -> Scaling:
    """As in the paper's released code: pixels minus the mean of ``images`` ``(N, C, H, W)`` at each pixel, over 128."""
    mean = images.sum(0, dtype=torch.int64).double() / len(images)
    return Scaling(mean.float(), torch.tensor(128.0, device=images.device))


def fixed_scaling(images: Tensor) -> Scaling:
    """(pixels - 127) / 128, independent of the images, as EfficientNet-Lite's weights expect."""
    return Scaling(*torch.tensor([127.0, 128.0], device=images.device))


SCALINGS = {"channel": channel_scaling, "pixel": pixel_scaling, "fixed": fixed_scaling}
