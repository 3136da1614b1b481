"""The demo's network; a training step on two images takes milliseconds on one core."""

from torch import Tensor, nn
from torch.nn import functional as F

# (channels, stride) of each 3x3 convolution. 32x32 images shrink to 2x2 features: as in networks for large images,
# the last layers have few pixels an image for their statistics.
LAYERS = ((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2))


class SmallConvNet(nn.Module):
    """3x3 convolutions with norm and ReLU, then the mean over space and a classifier.

    ``layers`` has the channels and stride of each convolution. The norms are ``nn.BatchNorm2d``; other
    normalizations replace them afterwards, so every method starts from the same weights.
    """

    def __init__(
        self, layers: tuple[tuple[int, int], ...] = LAYERS, num_classes: int = 10, in_channels: int = 1
    ) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for channels, stride in layers:
            self.convs.append(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False))
            self.norms.append(nn.BatchNorm2d(channels))
            in_channels = channels
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
