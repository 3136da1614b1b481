"""The parts of the Inception networks."""

import pytest
import torch
from torch import nn

from kalmannorm.lab.models.branches import Branches, unit


def test_weights_are_kaiming_fan_out():
    conv = unit(64, 128, 3, nn.BatchNorm2d)[0]
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_branches_are_joined_in_order():
    x = torch.randn(2, 3, 4, 4)
    out = Branches(nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1))(x)
    assert out.shape == (2, 9, 4, 4)
    assert torch.equal(out[:, :3], x)
    assert torch.equal(out[:, 3:6], x.relu())
