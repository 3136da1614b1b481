"""CIFAR ResNets: their size and their blocks."""

import pytest
import torch
from model_checks import parameters, shapes
from torch import nn
from torch.nn import functional as F

from kalmannorm.lab.models.cifar_resnet import CifarResNet, PreActivationBlock, _shortcut

both_forms = pytest.mark.parametrize("preactivation", [True, False])


@both_forms
@pytest.mark.parametrize(("n", "expected"), [(5, 464_154), (18, 1_727_962)])
def test_parameters_are_those_of_the_literature(n, expected, preactivation):
    model = CifarResNet(6 * n + 2, preactivation=preactivation)
    assert parameters(model) == expected
    weighted = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 6 * n + 2


@pytest.mark.parametrize("depth", [2, 7, 18, 33, -4])
def test_depth_must_be_six_n_plus_two(depth):
    with pytest.raises(ValueError, match=rf"got depth {depth}, expected 6n \+ 2"):
        CifarResNet(depth)


@both_forms
def test_sizes_of_the_stages(preactivation):
    model = CifarResNet(14, num_classes=7, preactivation=preactivation, width=8)
    assert shapes(model, model.stages, 3, 32, 32) == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (7,)]


@pytest.mark.parametrize("window", [1, 2])
def test_shortcut_has_zeros_on_both_sides(window):
    x = torch.randn(2, 4, 6, 6)
    out = _shortcut(x, 4, 2, window)
    assert out.shape == (2, 8, 3, 3)
    assert out[:, :2].abs().sum() == out[:, 6:].abs().sum() == 0
    expected = x[:, :, ::2, ::2] if window == 1 else F.avg_pool2d(x, 2)
    assert torch.equal(out[:, 2:6], expected)
    assert _shortcut(x, 0, 1, window) is x


def test_preactivation_leaves_the_sum_alone():
    """With its last convolution at zero a pre-activation block is its shortcut; the other form still rectifies."""
    x = torch.randn(2, 16, 8, 8)
    block = PreActivationBlock(16, 16, 1, nn.BatchNorm2d)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)


def test_kaiming_fan_out():
    model = CifarResNet(32)
    weight = model.stages[2][1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
