"""GroupNorm in BatchNorm's place."""

import pytest
import torch
from torch import nn

from kalmannorm.lab.baselines.group import to_groupnorm
from kalmannorm.lab.models.small import SmallConvNet


def test_every_batchnorm_is_replaced_and_nothing_else():
    torch.manual_seed(0)
    model = SmallConvNet()
    weights = [conv.weight for conv in model.convs]
    assert to_groupnorm(model, 8) is model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms[:3]] == [(8, 16), (8, 32), (8, 32)]
    assert all(conv.weight is weight for conv, weight in zip(model.convs, weights, strict=True))


def test_an_image_no_longer_depends_on_its_neighbours():
    torch.manual_seed(0)
    model = to_groupnorm(SmallConvNet())
    images = torch.randn(4, 1, 32, 32)
    assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)


def test_groups_divide_the_channels_and_are_the_papers_32():
    model = to_groupnorm(nn.Sequential(*(nn.BatchNorm2d(channels) for channels in (64, 48, 58, 5))))
    assert [norm.num_groups for norm in model] == [32, 16, 2, 1]
    assert to_groupnorm(nn.Sequential(nn.BatchNorm2d(6)), 4)[0].num_groups == 2


def test_no_groups_raise():
    with pytest.raises(ValueError, match="groups must be at least 1; got 0"):
        to_groupnorm(nn.Sequential(nn.BatchNorm2d(6)), 0)
