"""The residual networks for 32x32 images that the paper trains on CIFAR-10 (section 4.3, Table 8, Fig. 4).

He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 4.2) and "Identity Mappings in
Deep Residual Networks" (arXiv:1603.05027): a 3x3 convolution, three stages of n blocks with two 3x3 convolutions each,
the mean over space, a linear classifier; 6n + 2 layers with weights.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kalmannorm.lab.models.branches import Norm


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


def _shortcut(x: Tensor, missing: int, stride: int, window: int) -> Tensor:
    """Option A: no weights. Averages ``window x window`` pixels, and adds channels of zeros on both sides.

    ``(N, C, H, W)`` to ``(N, C + missing, H / stride, W / stride)``.
    """
    if stride > 1:
        x = F.avg_pool2d(x, window, stride)
    return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2)) if missing else x


class Block(nn.Module):
    """A residual block: two convolutions with norms and ReLUs, and the sum with the shortcut.

    With ``preactivation`` (arXiv:1603.05027, Fig. 1b): norm, ReLU, convolution, norm, ReLU, convolution; the sum. With
    a stride, the shortcut averages 2x2 pixels, as in the KN authors' released code. The network's ``first`` block has
    no first norm (``norm0`` is None), since the stem ends in one.

    Otherwise (arXiv:1512.03385, Fig. 2): convolution, norm, ReLU, convolution, norm; the sum; ReLU. With a stride, the
    shortcut takes every other pixel.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm_layer: Norm, preactivation: bool, first: bool = False
    ) -> None:
        super().__init__()
        self.missing, self.stride = channels - in_channels, stride
        self.norm0 = norm_layer(in_channels) if preactivation and not first else None
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.norm1 = norm_layer(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.norm2 = None if preactivation else norm_layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        y = x if self.norm0 is None else F.relu(self.norm0(x))
        residual: Tensor = self.conv2(F.relu(self.norm1(self.conv1(y))))
        if self.norm2 is None:
            return residual + _shortcut(x, self.missing, self.stride, window=self.stride)
        return F.relu(self.norm2(residual) + _shortcut(x, self.missing, self.stride, window=1))


class CifarResNet(nn.Module):
    """A residual network for small images.

    With ``preactivation`` its blocks are those of arXiv:1603.05027, otherwise of arXiv:1512.03385.
    Both have the same number of parameters: ResNet-32 (``n = 5``) has 464,154 and ResNet-110
    (``n = 18``) 1,727,962, with 10 classes.

    ``depth`` is ``6n + 2``. The first of the three stages has ``width`` channels, the second twice, the
    third four times as many, on half the pixels a side each. ``norm_layer`` takes the number of
    channels.
    """

    def __init__(
        self,
        depth: int = 32,
        num_classes: int = 10,
        preactivation: bool = True,
        norm_layer: Norm = nn.BatchNorm2d,
        width: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        n, rest = divmod(depth - 2, 6)
        if rest or n < 1:
            raise ValueError(f"CifarResNet got depth {depth}, expected 6n + 2 for n >= 1: 8, 14, 20, 26, 32, ...")
        self.conv = _conv3x3(in_channels, width)
        self.norm = norm_layer(width)
        self.stages = nn.Sequential()
        before = width
        for stage in range(3):
            channels, blocks = width * 2**stage, nn.Sequential()
            for block in range(n):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(before, channels, stride, norm_layer, preactivation, first=stage == block == 0))
                before = channels
            self.stages.append(blocks)
        self.last_norm = norm_layer(4 * width) if preactivation else None
        self.classifier = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.stages(F.relu(self.norm(self.conv(images))))
        if self.last_norm is not None:
            x = F.relu(self.last_norm(x))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
