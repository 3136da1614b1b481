"""The small Inception network that the paper trains on CIFAR-10, CIFAR-100 and SVHN (table in section 4.3.2).

    type             conv     inception  inception  inception  avg pool
    spatial size     16 x 16  16 x 16    16 x 16    16 x 16    1 x 1
    filters          32       256        480        512        512
    1x1                       64         128        192
    1x1/3x3                   96, 128    128, 192   96, 208
    1x1/5x5                   16, 32     32, 96     16, 48
    pool/1x1                  32         64         64

The three modules are 3a, 3b and 4a of GoogLeNet (Szegedy et al., arXiv:1409.4842, Table 1), with a norm between each
convolution and its ReLU. Choices where the table is ambiguous:

- The first convolution, which takes 32 x 32 images to 16 x 16, is 3x3 with stride 2, as no pooling is listed.
- The pooling in a module is GoogLeNet's: the maximum over 3x3, stride 1.
- The text's "fully connected layer with 1,000 output channels" is taken to be ImageNet's classifier: there is one
  linear layer, with ``num_classes`` outputs, and no dropout.
- The 5x5 branch has one 5x5 convolution, not two of 3x3 as in Inception-v2.
"""

from torch import Tensor, nn

from kalmannorm.lab.models.branches import Norm, inception, unit

# For each module's branches, the filters and kernel size of each convolution; the last branch begins with pooling.
MODULES = (
    (((64, 1),), ((96, 1), (128, 3)), ((16, 1), (32, 5)), ((32, 1),)),
    (((128, 1),), ((128, 1), (192, 3)), ((32, 1), (96, 5)), ((64, 1),)),
    (((192, 1),), ((96, 1), (208, 3)), ((16, 1), (48, 5)), ((64, 1),)),
)
LEAST = 16


class CifarInception(nn.Module):
    """A convolution, three Inception modules at 16 x 16, the mean over space, a linear classifier.

    With 10 classes it has 903,018 parameters. ``width`` multiplies all numbers of filters, rounded;
    0.25 is small enough for a CPU. ``norm_layer`` takes the number of channels.
    """

    def __init__(
        self, num_classes: int = 10, norm_layer: Norm = nn.BatchNorm2d, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        channels = round(32 * width)
        if round(width * LEAST) < 1:
            raise ValueError(f"width must leave 1 or more of {LEAST} filters; got {width}")
        self.conv = unit(in_channels, channels, 3, norm_layer, stride=2)
        self.inceptions = nn.Sequential()
        for row in MODULES:
            module, channels = inception(channels, row, norm_layer, width)
            self.inceptions.append(module)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, 32, 32)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.classifier(self.inceptions(self.conv(images)).mean((2, 3)))
        return logits
