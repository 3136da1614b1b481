"""ResNet-50 and ResNet-101 are torchvision's; their parameters against the paper's Table 2."""

import pytest
from model_checks import parameters
from torch import nn
from torchvision.models import resnet50, resnet101

import kalmannorm

# A stage's blocks have norms of w, w and 4w channels, its first block one more of 4w, with w of 64, 128, 256, 512.
WIDTHS = (64, 128, 256, 512)


def normed(blocks):
    """Number of norms and of their channels."""
    norms = 1 + sum(3 * count + 1 for count in blocks)
    channels = 64 + sum(width * (6 * count + 4) for width, count in zip(WIDTHS, blocks, strict=True))
    return norms, channels


@pytest.mark.parametrize(
    ("make", "blocks", "stock", "exact", "kalman"),
    [
        (resnet50, (3, 4, 6, 3), "25.56M", (25_557_032, 25_583_645), "25.58M"),
        (resnet101, (3, 4, 23, 3), "44.55M", (44_549_160, 44_601_936), "44.60M"),
    ],
)
def test_parameters_are_those_of_table_2(make, blocks, stock, exact, kalman):
    model = make()
    before = parameters(model)
    norms, channels = normed(blocks)
    after = parameters(kalmannorm.convert(model))
    assert (before, after) == exact
    assert after - before == channels + norms
    assert f"{before / 1e6:.2f}M" == stock
    assert f"{after / 1e6:.2f}M" == kalman


def test_group_norm_has_as_many_parameters_as_batch_norm():
    assert parameters(resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels))) == 25_557_032
