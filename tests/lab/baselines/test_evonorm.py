"""EvoNorm-S0."""

import copy
import math

import pytest
import torch
from learning import falls
from torch import nn

from kalmannorm.lab.baselines.evonorm import EvoNorm2d, to_evonorm


def random_layer(**options):
    layer = EvoNorm2d(6, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_the_plain_formula():
    layer = random_layer(groups=2)
    x, expected = torch.randn(2, 6, 4, 5).double(), torch.empty(2, 6, 4, 5).double()
    for n in range(2):
        for c in range(6):
            group = x[n, :3] if c < 3 else x[n, 3:]
            std = (((group - group.mean()) ** 2).mean() + 1e-5).sqrt()
            gate = 1 / (1 + (-layer.v[c] * x[n, c]).exp())
            expected[n, c] = x[n, c] * gate / std * layer.weight[c] + layer.bias[c]
    assert torch.allclose(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer).eval()(x), layer(x))


def test_without_activation_it_is_affine():
    layer, x = random_layer(activation=False), torch.randn(2, 6, 3, 3).double()
    assert torch.allclose(layer(x), x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
    assert layer.v is None


def test_groups_divide_the_channels():
    assert [EvoNorm2d(channels).groups for channels in (64, 48, 6, 5)] == [32, 16, 2, 1]


def test_gradcheck():
    layer = random_layer(groups=3)
    assert torch.autograd.gradcheck(layer, torch.randn(2, 6, 2, 2).double().requires_grad_())


def test_state_dict_and_type():
    layer, again = random_layer(), EvoNorm2d(6).double()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(again(x.double()), layer(x.double()))
    assert layer.float()(x.bfloat16()).dtype == torch.bfloat16


def test_at_first_it_is_silu_of_standardized_images_scaled():
    x = torch.randn(1, 2, 50, 50)
    x = x / x.std(correction=0)
    assert math.isclose(EvoNorm2d(2, groups=1)(x).mean().item(), nn.functional.silu(x).mean().item(), rel_tol=1e-3)


def test_a_wrong_shape_raises():
    with pytest.raises(ValueError, match=r"EvoNorm2d got an input of shape \(2, 4\), expected \(N, 6, H, W\)"):
        EvoNorm2d(6)(torch.randn(2, 4))


def test_it_learns():
    assert falls(lambda model: to_evonorm(model, groups=4))
