"""The U-Net for volumes: its size and its priors; `test_segmentation` has what it learns."""

import itertools

import pytest
import torch
from torch import nn

import kalmannorm
from kalmannorm.lab.models.unet3d import UNet3d


def by_hand(widths, classes, in_channels):
    """Two convolutions a level down and up, with two numbers a normed channel; a transposed one a level; the head."""
    down = sum(27 * b * (a + b) + 4 * b for a, b in zip((in_channels, *widths), widths, strict=False))
    up = sum(8 * a * b + a + 27 * a * (2 * a + a) + 4 * a for a, b in itertools.pairwise(widths))
    return down + up + widths[0] * classes + classes


@pytest.mark.parametrize(("levels", "in_channels"), [(1, 1), (2, 3), (3, 1)])
def test_size_and_shape(levels, in_channels):
    model = UNet3d(4, levels, num_classes=3, in_channels=in_channels)
    widths = (4, 8, 16)[:levels]
    assert sum(p.numel() for p in model.parameters()) == by_hand(widths, 3, in_channels)
    assert model(torch.randn(2, in_channels, 8, 4, 12)).shape == (2, 3, 8, 4, 12)


def test_what_the_papers_size_comes_to():
    """As the docstring says; the paper counts weights and biases of the convolutions, and none of the norms."""
    with torch.device("meta"):
        ours = UNet3d(64, 4, num_classes=3, in_channels=3)
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == 22.4
    down = [(3, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    merge = [pair for shallow in (256, 128, 64) for pair in ((3 * shallow, shallow), (shallow, shallow))]
    paper = sum(27 * a * b + b for a, b in down + merge) + sum(8 * deep**2 for deep in (512, 256, 128)) + 64 * 3 + 3
    assert paper == 19_069_955


def test_each_level_halves_the_sides_and_doubles_the_channels():
    model, shapes = UNet3d(2, 3), []
    for block in (*model.down, *model.merge):
        block.register_forward_hook(lambda _module, _args, out: shapes.append(tuple(out.shape[1:])))
    model(torch.randn(1, 1, 8, 8, 8))
    assert shapes == [(2, 8, 8, 8), (4, 4, 4, 4), (8, 2, 2, 2), (4, 4, 4, 4), (2, 8, 8, 8)]


def test_what_the_way_down_found_goes_beside_the_way_up():
    model = UNet3d(2, 2).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    whole = model(x)
    with torch.no_grad():
        model.merge[0][0].weight[:, :2] = 0
    assert not torch.allclose(model(x), whole)


@pytest.mark.parametrize(("input_stats", "without"), [(None, ["down.0.1"]), (([0.0], [1.0]), [])])
def test_every_layer_but_perhaps_the_first_has_a_prior(input_stats, without):
    model = kalmannorm.convert(UNet3d(4), input_stats=input_stats)
    description = kalmannorm.describe(model, torch.randn(1, 1, 8, 8, 8))
    assert len(description.rows) == 10
    assert [row.name for row in description.rows if row.reason] == without, str(description)


def test_group_norm_takes_every_place():
    model = UNet3d(4, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == 10
    assert not any(isinstance(module, nn.BatchNorm3d) for module in model.modules())


def test_bad_requests_say_what_was_wrong():
    with pytest.raises(ValueError, match="levels=0, expected at least 1"):
        UNet3d(levels=0)
    with pytest.raises(ValueError, match=r"3 levels got volumes of \(8, 8, 6\) voxels, .* multiples of 4"):
        UNet3d(2, 3)(torch.zeros(1, 1, 8, 8, 6))
