"""Small networks for one-dimensional signals, and for rows of a table."""

from collections.abc import Sequence

from torch import nn

from kalmannorm.lab.models.branches import Norm

# (channels, stride) of each convolution: signals of length 64 shrink to 8 steps.
LAYERS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2))


class SignalNet(nn.Sequential):
    """Convolutions over time, each with norm and ReLU, the mean over time and a classifier.

    Signals ``(N, in_channels, L)`` to logits ``(N, num_classes)``. ``layers`` has the channels and
    stride of each convolution; ``kernel`` is their odd width in steps.
    """

    def __init__(
        self,
        layers: Sequence[tuple[int, int]] = LAYERS,
        kernel: int = 5,
        num_classes: int = 10,
        in_channels: int = 1,
        norm_layer: Norm = nn.BatchNorm1d,
    ) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SignalNet got kernel={kernel}, expected an odd number of steps")
        modules: list[nn.Module] = []
        for channels, stride in layers:
            conv = nn.Conv1d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
            modules += [conv, norm_layer(channels), nn.ReLU()]
            in_channels = channels
        super().__init__(*modules, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
        for layer in modules[::3]:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]


class TabularNet(nn.Sequential):
    """A multi-layer perceptron: hidden layers with norm and ReLU, and a classifier.

    Rows ``(N, in_features)`` to logits ``(N, num_classes)``.
    """

    def __init__(
        self,
        in_features: int = 30,
        hidden: Sequence[int] = (64, 64, 64),
        num_classes: int = 2,
        norm_layer: Norm = nn.BatchNorm1d,
    ) -> None:
        modules: list[nn.Module] = []
        for width in hidden:
            modules += [nn.Linear(in_features, width, bias=False), norm_layer(width), nn.ReLU()]
            in_features = width
        super().__init__(*modules, nn.Linear(in_features, num_classes))
        for layer in modules[::3]:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
