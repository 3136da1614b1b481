"""The U-Net for volumes: its size and its levels; `test_segmentation` has what it learns."""

import pytest
import torch
from model_checks import parameters, shapes

from kalmannorm.lab.models.unet3d import UNet3d


@pytest.mark.parametrize(("levels", "in_channels"), [(1, 1), (2, 3), (3, 1)])
def test_shape(levels, in_channels):
    model = UNet3d(4, levels, num_classes=3, in_channels=in_channels)
    assert model(torch.randn(2, in_channels, 8, 4, 12)).shape == (2, 3, 8, 4, 12)


def test_what_the_papers_size_comes_to():
    """22.4 million, as the docstring says."""
    with torch.device("meta"):
        assert parameters(UNet3d(64, 4, num_classes=3, in_channels=3)) == 22_400_195


def test_each_level_halves_the_sides_and_doubles_the_channels():
    model = UNet3d(2, 3)
    *found, _ = shapes(model, (*model.down, *model.merge), 1, 8, 8, 8)
    assert found == [(2, 8, 8, 8), (4, 4, 4, 4), (8, 2, 2, 2), (4, 4, 4, 4), (2, 8, 8, 8)]


def test_what_the_way_down_found_goes_beside_the_way_up():
    model = UNet3d(2, 2).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    whole = model(x)
    with torch.no_grad():
        model.merge[0][0].weight[:, :2] = 0
    assert not torch.allclose(model(x), whole)


def test_bad_requests_say_what_was_wrong():
    with pytest.raises(ValueError, match="levels=0, expected at least 1"):
        UNet3d(levels=0)
    with pytest.raises(ValueError, match=r"3 levels got volumes of \(8, 8, 6\) voxels, .* multiples of 4"):
        UNet3d(2, 3)(torch.zeros(1, 1, 8, 8, 6))
