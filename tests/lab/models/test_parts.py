"""The parts of networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kalmannorm.lab.models.branches import Branches
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import Block, _shortcut
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.unet3d import UNet3d


def test_branches_are_joined_in_order():
    x = torch.randn(2, 3, 4, 4)
    out = Branches(nn.Identity(), nn.ReLU(), nn.MaxPool2d(3, 1, 1))(x)
    assert out.shape == (2, 9, 4, 4)
    assert torch.equal(out[:, :3], x)
    assert torch.equal(out[:, 3:6], x.relu())


def test_branches_of_the_papers_small_inception_have_the_filters_of_its_table():
    """Section 4.3.2."""
    model = CifarInception()
    found = [
        [[conv.out_channels for conv in branch.modules() if isinstance(conv, nn.Conv2d)] for branch in module.branches]
        for module in model.inceptions
    ]
    assert found == [
        [[64], [96, 128], [16, 32], [32]],
        [[128], [128, 192], [32, 96], [64]],
        [[192], [96, 208], [16, 48], [64]],
    ]
    kernels = [conv.kernel_size[0] for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    assert kernels == [3] + 3 * [1, 1, 3, 1, 5, 1]


@pytest.mark.parametrize("window", [1, 2])
def test_shortcut_has_zeros_on_both_sides(window):
    x = torch.randn(2, 4, 6, 6)
    out = _shortcut(x, 4, 2, window)
    assert out.shape == (2, 8, 3, 3)
    assert out[:, :2].abs().sum() == out[:, 6:].abs().sum() == 0
    expected = x[:, :, ::2, ::2] if window == 1 else F.avg_pool2d(x, 2)
    assert torch.equal(out[:, 2:6], expected)
    assert _shortcut(x, 0, 1, window) is x


@pytest.mark.parametrize("preactivation", [True, False])
def test_a_block_without_a_residual_is_its_shortcut(preactivation):
    """With a stride: the mean of 2x2 pixels before the activation; every other pixel, rectified, after it."""
    x = torch.randn(2, 16, 8, 8)
    block = Block(16, 16, 2, nn.BatchNorm2d, preactivation)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), F.avg_pool2d(x, 2) if preactivation else x[:, :, ::2, ::2].relu())


def test_what_the_way_down_of_a_unet_found_goes_beside_the_way_up():
    model = UNet3d(2, 2).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    whole = model(x)
    with torch.no_grad():
        model.merge[0][0].weight[:, :2] = 0
    assert not torch.allclose(model(x), whole)


def test_pooling_of_inception_v2_is_that_of_figure_5():
    pools = [
        (name, type(module).__name__, module.stride)
        for name, inception in InceptionV2().inceptions.named_children()
        for module in inception.modules()
        if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d))
    ]
    assert len(pools) == 10
    assert [pool for pool in pools if pool[1] == "MaxPool2d"] == [
        ("3c", "MaxPool2d", 2), ("4e", "MaxPool2d", 2), ("5b", "MaxPool2d", 1),
    ]  # fmt: skip
    assert all(stride == 1 for _, kind, stride in pools if kind == "AvgPool2d")


def test_the_input_passes_through_where_a_module_of_inception_v2_strides():
    """The last channels of 3c are the maxima of its input."""
    x = torch.randn(2, 320, 8, 8)
    out = InceptionV2().eval().get_submodule("inceptions.3c")(x)
    assert torch.equal(out[:, 160 + 96 :], F.max_pool2d(x, 3, 2, 1))
