"""LayerNorm and InstanceNorm in BatchNorm's place."""

import pytest
import torch
from learning import falls
from torch import nn

from kalmannorm.lab.baselines.layer_instance import to_instancenorm, to_layernorm


@pytest.mark.parametrize(("replace", "axes"), [(to_layernorm, (1, 2, 3)), (to_instancenorm, (2, 3))])
def test_the_plain_formula(replace, axes):
    layer = replace(nn.Sequential(nn.BatchNorm2d(6))).double()
    nn.init.normal_(layer[0].weight)
    nn.init.normal_(layer[0].bias)
    x = torch.randn(3, 6, 4, 5).double()
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    weight, bias = layer[0].weight.view(1, 6, 1, 1), layer[0].bias.view(1, 6, 1, 1)
    assert torch.allclose(layer(x), (x - mean) / (var + 1e-5).sqrt() * weight + bias)


def test_layernorm_learns():
    assert falls(to_layernorm)


def test_instancenorm_learns_slowly():
    # The mean over pixels before the classifier sees little of features that each have mean 0 and variance 1.
    assert falls(to_instancenorm, rate=0.3, steps=100)
