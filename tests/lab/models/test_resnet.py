"""ResNet-50 and ResNet-101 are torchvision's; their parameters against the paper's Table 2."""

import pytest
from model_checks import check_learns, check_one_step, check_priors, parameters
from torch import nn
from torchvision.models import resnet50, resnet101

import kalmannorm

every_norm = pytest.mark.parametrize("kind", ["batch", "group", "kalman"])

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


def small(norm_layer=nn.BatchNorm2d):
    return resnet50(num_classes=4, norm_layer=norm_layer)


def test_every_layer_but_the_first_has_a_prior():
    assert len(check_priors(small, size=64).rows) == 53


@every_norm
def test_one_step(kind):
    check_one_step(small, kind, size=64)


@pytest.mark.slow
@every_norm
def test_learns(kind):
    check_learns(small, kind, rate=0.002)
