"""A U-Net for volumes, which medical segmentation trains at one or two volumes a device.

Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation" (arXiv:1606.06650): two 3x3x3
convolutions on each level, each with norm and ReLU; max pooling on the way down, transposed convolutions on the way up,
and skip connections between them.
"""

import itertools

import torch
from torch import Tensor, fx, nn

from kalmannorm.lab.models.branches import Norm


class UNet3d(nn.Module):
    """A 3-d U-Net, wider inside a level than the paper's.

    Here a level's first convolution doubles the channels on the way down, and transposed
    convolutions halve them on the way up. In the paper a level's second convolution doubles them,
    and transposed convolutions keep them. At the paper's size, ``UNet3d(64, 4, 3, 3)``, this one has
    22.4 million parameters, the paper's 19.07. Convolutions before a norm have no bias.

    The first level has ``width`` channels; each further level has twice as many, on half the voxels
    a side. ``norm_layer`` takes the number of channels.

    Example:
        >>> UNet3d(width=4, levels=2)(torch.zeros(1, 1, 8, 8, 8)).shape
        torch.Size([1, 2, 8, 8, 8])
    """

    def __init__(
        self,
        width: int = 16,
        levels: int = 3,
        num_classes: int = 2,
        in_channels: int = 1,
        norm_layer: Norm = nn.BatchNorm3d,
    ) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"UNet3d got levels={levels}, expected at least 1")
        widths = [width * 2**level for level in range(levels)]
        pairs = list(itertools.pairwise(widths))[::-1]
        self.down = nn.ModuleList(_double(a, b, norm_layer) for a, b in itertools.pairwise([in_channels, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose3d(deep, shallow, 2, 2) for shallow, deep in pairs)
        self.merge = nn.ModuleList(_double(2 * shallow, shallow, norm_layer) for shallow, _ in pairs)
        self.pool = nn.MaxPool3d(2)
        self.head = nn.Conv3d(width, num_classes, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        """Volumes ``(N, in_channels, D, H, W)`` to logits ``(N, num_classes, D, H, W)``."""
        _check_sides(volumes, len(self.down))
        x, kept = volumes, []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((kept.pop(), up(x)), 1))
        logits: Tensor = self.head(x)
        return logits


@fx.wrap  # a traced shape cannot be checked
def _check_sides(volumes: Tensor, levels: int) -> None:
    factor = 2 ** (levels - 1)
    if any(side % factor for side in volumes.shape[2:]):
        raise ValueError(
            f"UNet3d with {levels} levels got volumes of {tuple(volumes.shape[2:])} voxels, expected sides that are "
            f"multiples of {factor}"
        )


def _double(in_channels: int, channels: int, norm_layer: Norm) -> nn.Sequential:
    units: list[nn.Module] = []
    for before in (in_channels, channels):
        units += [nn.Conv3d(before, channels, 3, padding=1, bias=False), norm_layer(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*units)
