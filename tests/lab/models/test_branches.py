"""The parts of the Inception networks."""

import pytest
import torch
from model_checks import group_norm
from torch import nn

from kalmannorm.lab.models.branches import Branches, inception, unit


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (7, 2)])
def test_a_unit_divides_the_size_by_its_stride(kernel_size, stride):
    conv, norm, act = layers = unit(3, 8, kernel_size, group_norm, stride)
    assert layers(torch.randn(2, 3, 16, 16)).shape == (2, 8, 16 // stride, 16 // stride)
    assert conv.bias is None
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(act, nn.ReLU)


def test_weights_are_kaiming_fan_out():
    conv = unit(64, 128, 3, nn.BatchNorm2d)[0]
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_branches_are_joined_in_order():
    x = torch.randn(2, 3, 4, 4)
    out = Branches(nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1))(x)
    assert out.shape == (2, 9, 4, 4)
    assert torch.equal(out[:, :3], x)
    assert torch.equal(out[:, 3:6], x.relu())


def test_an_inception_module_tells_the_channels_it_gives():
    branches = ((8, 1),), ((4, 1), (6, 3))
    for behind, channels in ((((2, 1),), 4 + 3 + 1), ((), 4 + 3 + 5)):
        module, given = inception(5, (*branches, behind), nn.BatchNorm2d, width=0.5, stride=2)
        assert module(torch.randn(2, 5, 8, 8)).shape == (2, given, 4, 4)
        assert given == channels
