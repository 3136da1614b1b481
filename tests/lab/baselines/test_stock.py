"""Layers of torch and of this library in BatchNorm's place."""

import copy

import pytest
import torch
from torch import nn

from kalmannorm.lab.baselines.stock import to_frozen, to_ghost, to_groupnorm, to_instancenorm, to_layernorm
from kalmannorm.lab.models.small import SmallConvNet


def test_groups_divide_the_channels_and_are_the_papers_32():
    model = to_groupnorm(nn.Sequential(*(nn.BatchNorm2d(channels) for channels in (64, 48, 58, 5))))
    assert [norm.num_groups for norm in model] == [32, 16, 2, 1]
    assert to_groupnorm(nn.Sequential(nn.BatchNorm2d(6)), 4)[0].num_groups == 2
    with pytest.raises(ValueError, match="groups must be at least 1; got 0"):
        to_groupnorm(nn.Sequential(nn.BatchNorm2d(6)), 0)


@pytest.mark.parametrize(("replace", "axes"), [(to_layernorm, (1, 2, 3)), (to_instancenorm, (2, 3))])
def test_the_plain_formula_of_layernorm_and_instancenorm(replace, axes):
    layer = replace(nn.Sequential(nn.BatchNorm2d(6))).double()
    nn.init.normal_(layer[0].weight)
    nn.init.normal_(layer[0].bias)
    x = torch.randn(3, 6, 4, 5).double()
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    weight, bias = layer[0].weight.view(1, 6, 1, 1), layer[0].bias.view(1, 6, 1, 1)
    assert torch.allclose(layer(x), (x - mean) / (var + 1e-5).sqrt() * weight + bias)


def test_each_group_of_ghost_batchnorm_is_a_batch_of_its_own_and_eval_is_batchnorms():
    model, images = SmallConvNet().double(), torch.randn(6, 1, 32, 32).double()
    expected = torch.cat([copy.deepcopy(model)(part) for part in images.split(2)])
    ghost = to_ghost(copy.deepcopy(model), 2)
    assert torch.allclose(ghost(images), expected)
    model.load_state_dict(ghost.state_dict())
    assert torch.allclose(ghost.eval()(images), model.eval()(images))


def test_frozen_layers_normalize_by_what_they_have_learned():
    model, images = SmallConvNet(), torch.randn(2, 1, 32, 32)
    model(torch.randn(8, 1, 32, 32))
    expected = copy.deepcopy(model).eval()(images)
    assert torch.equal(to_frozen(model).train()(images), expected)
    assert not any(parameter.requires_grad for parameter in model.norms.parameters())
    with pytest.raises(ValueError, match="nothing to freeze"):
        to_frozen(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="Sequential has no linear layer, expected one to train alone"):
        to_frozen(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), last_layer=True)
