"""Parts of the two Inception networks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Row = Sequence[Sequence[tuple[int, int]]]
"""For each branch the filters and kernel size of its convolutions; those of the last branch follow the pooling."""


def unit(in_channels: int, channels: int, kernel_size: int, norm_layer: Norm, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU: ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``.

    The convolution has no bias, which the norm would remove, and Kaiming-normal weights (fan-out).
    """
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_layer(channels), nn.ReLU(inplace=True))


def chain(in_channels: int, norm_layer: Norm, *units: tuple[int, int], stride: int = 1) -> nn.Module:
    """A sequence of units with these channels and kernel sizes; the last one has the stride."""
    *before, last = units
    layers = []
    for channels, kernel_size in before:
        layers.append(unit(in_channels, channels, kernel_size, norm_layer))
        in_channels = channels
    layers.append(unit(in_channels, *last, norm_layer, stride))
    return nn.Sequential(*layers) if before else layers[0]


class Branches(nn.Module):
    """Runs each branch on the same input ``(N, C, H, W)``, and concatenates the outputs along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def inception(
    channels: int, row: Row, norm_layer: Norm, width: float = 1.0, stride: int = 1, pool: nn.Module | None = None
) -> tuple[Branches, int]:
    """An Inception module with ``channels`` inputs, each convolution ``width`` times as wide, and its output channels.

    The last convolution of a branch has the stride, and so has the default pooling, the maximum over 3x3. Without a
    convolution after the pooling, its branch keeps the input's channels.
    """
    *branches, after_pool = [[(round(width * filters), size) for filters, size in units] for units in row]
    pool = pool or nn.MaxPool2d(3, stride, 1)
    own = [chain(channels, norm_layer, *units, stride=stride) for units in branches]
    last = nn.Sequential(pool, chain(channels, norm_layer, *after_pool)) if after_pool else pool
    pooled = after_pool[-1][0] if after_pool else channels
    return Branches(*own, last), sum(units[-1][0] for units in branches) + pooled
