"""The paper's small Inception, against its table in section 4.3.2."""

import pytest
import torch
from model_checks import parameters, shapes
from torch import nn

import kalmannorm
from kalmannorm.lab.models.cifar_inception import CifarInception


def test_stages_have_the_sizes_of_the_table():
    model = CifarInception()
    found = shapes(model, (model.conv, *model.inceptions), 3, 32, 32)
    assert found == [(32, 16, 16), (256, 16, 16), (480, 16, 16), (512, 16, 16), (10,)]


def test_branches_have_the_filters_of_the_table():
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


def test_parameters():
    model = CifarInception()
    assert parameters(model) == 903_018
    assert parameters(kalmannorm.convert(model)) == 904_701


def test_a_quarter_of_the_width():
    model = CifarInception(width=0.25)
    found = [conv.out_channels for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    assert found == [each.out_channels // 4 for each in CifarInception().modules() if isinstance(each, nn.Conv2d)]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [0.03, 0.0, -1.0])
def test_a_width_that_leaves_nothing(width):
    with pytest.raises(ValueError, match=rf"width must leave 1 or more of 16 filters; got {width}"):
        CifarInception(width=width)
