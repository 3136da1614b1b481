"""Inception-v2, or BN-Inception: the network of the paper's ImageNet tables 1, 2, 3 and 5.

Ioffe and Szegedy, "Batch Normalization" (arXiv:1502.03167), appendix and Figure 5. Two choices follow from the 11.29M
parameters in the KN paper's Table 2:

- Convolutions before a norm have no bias: 11,285,224 parameters. With biases there would be 11,295,240 (11.30M).
- Modules 4c and 4d have 128 channels after pooling, as Figure 5 lists, and so 608 channels. The figure's output size
  of 576 needs 96, which gives 11.19M.

The first convolution is a full one, not the separable one of the appendix ("depth multiplier 8"). Average pooling
leaves padding out of the mean, as in TensorFlow. There are no auxiliary classifiers and no dropout.
"""

from torch import Tensor, nn

from kalmannorm.lab.models.branches import Norm, Row, inception, unit

# For each module the branches, the stride, and whether the pooling is the maximum.
FIGURE_5: dict[str, tuple[Row, int, bool]] = {
    "3a": ((((64, 1),), ((64, 1), (64, 3)), ((64, 1), (96, 3), (96, 3)), ((32, 1),)), 1, False),
    "3b": ((((64, 1),), ((64, 1), (96, 3)), ((64, 1), (96, 3), (96, 3)), ((64, 1),)), 1, False),
    "3c": ((((128, 1), (160, 3)), ((64, 1), (96, 3), (96, 3)), ()), 2, True),
    "4a": ((((224, 1),), ((64, 1), (96, 3)), ((96, 1), (128, 3), (128, 3)), ((128, 1),)), 1, False),
    "4b": ((((192, 1),), ((96, 1), (128, 3)), ((96, 1), (128, 3), (128, 3)), ((128, 1),)), 1, False),
    "4c": ((((160, 1),), ((128, 1), (160, 3)), ((128, 1), (160, 3), (160, 3)), ((128, 1),)), 1, False),
    "4d": ((((96, 1),), ((128, 1), (192, 3)), ((160, 1), (192, 3), (192, 3)), ((128, 1),)), 1, False),
    "4e": ((((128, 1), (192, 3)), ((192, 1), (256, 3), (256, 3)), ()), 2, True),
    "5a": ((((352, 1),), ((192, 1), (320, 3)), ((160, 1), (224, 3), (224, 3)), ((128, 1),)), 1, False),
    "5b": ((((352, 1),), ((192, 1), (320, 3)), ((192, 1), (224, 3), (224, 3)), ((128, 1),)), 1, True),
}


class InceptionV2(nn.Module):
    """A stem of three convolutions, ten modules, the mean over space, a linear classifier.

    ``width`` multiplies the channels of every convolution, rounded; ``norm_layer`` takes the number
    of channels.
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
        self.inceptions = nn.Sequential()
        for name, (row, stride, maximum) in FIGURE_5.items():
            pool = None if maximum else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
            module, channels = inception(channels, row, norm_layer, width, stride, pool)
            self.inceptions.add_module(name, module)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)``, 224 x 224 in the paper, to logits ``(N, num_classes)``."""
        logits: Tensor = self.classifier(self.inceptions(self.stem(images)).mean((2, 3)))
        return logits
