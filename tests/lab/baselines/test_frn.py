"""Filter Response Normalization."""

import copy

import pytest
import torch
from learning import falls
from torch import nn

from kalmannorm.lab.baselines.frn import FilterResponseNorm2d, to_frn


def random_layer(**options):
    layer = FilterResponseNorm2d(3, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("learned_eps", [True, False])
def test_the_plain_formula(activation, learned_eps):
    layer = random_layer(eps=0.1, activation=activation, learned_eps=learned_eps)
    x, expected = torch.randn(2, 3, 4, 5).double(), torch.empty(2, 3, 4, 5).double()
    for n in range(2):
        for c in range(3):
            nu2 = sum(float(pixel) ** 2 for pixel in x[n, c].flatten()) / 20
            eps = 0.1 + (abs(layer.more_eps.item()) if learned_eps else 0)
            y = layer.weight[c] * x[n, c] / (nu2 + eps) ** 0.5 + layer.bias[c]
            expected[n, c] = torch.where(y > layer.threshold[c], y, layer.threshold[c]) if activation else y
    assert torch.allclose(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer).eval()(x), layer(x))


def test_scale_is_lost():
    layer, x = random_layer(eps=0.0), torch.randn(2, 3, 4, 4).double()
    scales = torch.rand(2, 3, 1, 1).double() + 0.1
    assert torch.allclose(layer(scales * x), layer(x))


def test_gradient_is_orthogonal_to_the_input():
    # What scale invariance means for training.
    layer = random_layer(eps=0.0, activation=False)
    x = torch.randn(2, 3, 4, 4).double().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x), x, torch.randn(2, 3, 4, 4).double())
    assert (gradient * x).sum((2, 3)).abs().max() < 1e-12


def test_gradcheck():
    layer = random_layer(learned_eps=True)
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 2, 2).double().requires_grad_())


def test_state_dict_and_type():
    layer, again = random_layer(), FilterResponseNorm2d(3).double()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(again(x.double()), layer(x.double()))
    assert layer.float()(x.bfloat16()).dtype == torch.bfloat16


def test_at_first_the_threshold_is_relu():
    assert FilterResponseNorm2d(3)(torch.randn(2, 3, 4, 4)).min() == 0


def test_a_wrong_shape_raises():
    with pytest.raises(
        ValueError, match=r"FilterResponseNorm2d got an input of shape \(2, 4, 5, 5\), expected \(N, 3, H"
    ):
        FilterResponseNorm2d(3)(torch.randn(2, 4, 5, 5))


def test_it_learns():
    assert falls(to_frn)
