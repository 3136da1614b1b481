"""Inception-v2, or BN-Inception: the network of the paper's ImageNet tables 1, 2, 3 and 5.

Ioffe and Szegedy, "Batch Normalization" (arXiv:1502.03167), appendix and Figure 5. Two points are settled by the
11.29M parameters in the paper's Table 2, which no other reading of the two gives:

- Convolutions in front of a norm have no bias: 11,285,224 parameters. With biases they would be 11,295,240 (11.30M).
- Modules 4c and 4d have 128 channels after pooling, as Figure 5 lists, and so 608 channels; the output size of 576
  that the figure states asks for 96, and the network would have 11.19M. The first convolution is a full one: the
  separable one of the appendix ("depth multiplier 8") has other weights.

Average pooling leaves the border's padding out of the mean, as TensorFlow does. No auxiliary classifiers, no dropout.
"""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from kalmannorm.lab.models.branches import Branches, Norm, chain, unit

__all__ = ["InceptionV2"]


@dataclass(frozen=True)
class Module:
    """One row of Figure 5; a width of 0 is a branch, or a convolution, that is not there."""

    single: int
    """Channels of the 1x1 branch."""
    three: tuple[int, int]
    """Of the 1x1 and the 3x3 convolution of the second branch."""
    double: tuple[int, int]
    """Of the 1x1 and of the two 3x3 convolutions of the third branch."""
    pooled: int
    """Of the 1x1 convolution behind the pooling."""
    maximum: bool = False
    """Max pooling; else average pooling."""
    stride: int = 1
    """Of the last convolution of a branch, and of the pooling."""

    def widened(self, width: float) -> Self:
        """The same with so many times the channels, rounded."""
        three, double = ((round(a * width), round(b * width)) for a, b in (self.three, self.double))
        single, pooled = round(self.single * width), round(self.pooled * width)
        return replace(self, single=single, three=three, double=double, pooled=pooled)


FIGURE_5 = {
    "3a": Module(64, (64, 64), (64, 96), 32),
    "3b": Module(64, (64, 96), (64, 96), 64),
    "3c": Module(0, (128, 160), (64, 96), 0, maximum=True, stride=2),
    "4a": Module(224, (64, 96), (96, 128), 128),
    "4b": Module(192, (96, 128), (96, 128), 128),
    "4c": Module(160, (128, 160), (128, 160), 128),
    "4d": Module(96, (128, 192), (160, 192), 128),
    "4e": Module(0, (128, 192), (192, 256), 0, maximum=True, stride=2),
    "5a": Module(352, (192, 320), (160, 224), 128),
    "5b": Module(352, (192, 320), (192, 224), 128, maximum=True),
}


class InceptionV2(nn.Module):
    """A stem of three convolutions, ten modules, the mean over space, a linear classifier.

    Args:
        num_classes: Number of logits.
        norm_layer: Makes a normalization layer of so many channels.
        in_channels: Channels of the images.
        width: Multiplies the channels of every convolution, rounded.

    Raises:
        ValueError: where the width leaves a convolution no channel.
    """

    def __init__(
        self, num_classes: int = 1000, norm_layer: Norm = nn.BatchNorm2d, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        if round(32 * width) < 1:
            raise ValueError(f"InceptionV2 got width {width:g}, expected one that leaves 32 channels at least 1")
        first, channels = round(64 * width), round(192 * width)
        self.stem = nn.Sequential(
            unit(in_channels, first, 7, norm_layer, stride=2),
            nn.MaxPool2d(3, 2, 1),
            unit(first, first, 1, norm_layer),
            unit(first, channels, 3, norm_layer),
            nn.MaxPool2d(3, 2, 1),
        )
        self.inceptions = nn.ModuleDict()
        for name, row in FIGURE_5.items():
            row = row.widened(width)
            self.inceptions[name] = _branches(channels, row, norm_layer)
            channels = row.single + row.three[1] + row.double[1] + (row.pooled or channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)``, 224 x 224 in the paper, to logits ``(N, num_classes)``."""
        x = self.stem(images)
        for inception in self.inceptions.values():
            x = inception(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def _branches(channels: int, row: Module, norm_layer: Norm) -> Branches:
    """A module, for an input of so many channels."""
    pool: nn.Module = nn.AvgPool2d(3, row.stride, 1, count_include_pad=False)
    if row.maximum:
        pool = nn.MaxPool2d(3, row.stride, 1)
    (reduced, three), (also_reduced, double) = row.three, row.double
    branches: list[nn.Module] = [unit(channels, row.single, 1, norm_layer)] if row.single else []
    branches += [
        chain(channels, norm_layer, (reduced, 1), (three, 3), stride=row.stride),
        chain(channels, norm_layer, (also_reduced, 1), (double, 3), (double, 3), stride=row.stride),
        # The input passes through where no convolution follows.
        nn.Sequential(pool, unit(channels, row.pooled, 1, norm_layer)) if row.pooled else pool,
    ]
    return Branches(*branches)
