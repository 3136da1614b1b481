"""Small networks for what is no image: signals of one dimension, and rows of a table."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kalmannorm.lab.models.branches import Norm

__all__ = ["SignalNet", "TabularNet"]

# (channels, stride) of each convolution: signals of length 64 shrink to 8 steps.
LAYERS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2))


class SignalNet(nn.Module):
    """Convolution over time, norm and ReLU, as often as ``layers`` says, then the mean over time and a classifier.

    Args:
        layers: Channels and stride of each convolution.
        kernel: Their width in steps, odd.
        num_classes: Number of logits.
        in_channels: Channels of the signals.
        norm_layer: Makes a normalization layer of so many channels.

    Raises:
        ValueError: An even kernel.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]] = LAYERS,
        kernel: int = 5,
        num_classes: int = 10,
        in_channels: int = 1,
        norm_layer: Norm = nn.BatchNorm1d,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SignalNet got kernel={kernel}, expected an odd number of steps")
        widths = [in_channels, *(channels for channels, _ in layers)]
        self.convs = nn.ModuleList(
            nn.Conv1d(before, channels, kernel, stride, kernel // 2, bias=False)
            for before, (channels, stride) in zip(widths, layers, strict=False)
        )
        self.norms = nn.ModuleList(norm_layer(channels) for channels in widths[1:])
        self.classifier = nn.Linear(widths[-1], num_classes)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]

    def forward(self, signals: Tensor) -> Tensor:
        """Signals ``(N, in_channels, L)`` to logits ``(N, num_classes)``."""
        x = signals
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        logits: Tensor = self.classifier(x.mean(2))
        return logits


class TabularNet(nn.Module):
    """A multi-layer perceptron: linear, norm and ReLU, as often as there are hidden widths, and a classifier.

    Args:
        in_features: Numbers a row.
        hidden: Features after each hidden layer.
        num_classes: Number of logits.
        norm_layer: Makes a normalization layer of so many features.
    """

    def __init__(
        self,
        in_features: int = 30,
        hidden: Sequence[int] = (64, 64, 64),
        num_classes: int = 2,
        norm_layer: Norm = nn.BatchNorm1d,
    ) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(norm_layer(width) for width in hidden)
        self.classifier = nn.Linear(widths[-1], num_classes)
        for linear in self.linears:
            nn.init.kaiming_normal_(linear.weight)  # type: ignore[arg-type]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``(N, in_features)`` to logits ``(N, num_classes)``."""
        x = rows
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        logits: Tensor = self.classifier(x)
        return logits
