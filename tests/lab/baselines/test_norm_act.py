"""EvoNorm-S0 and Filter Response Normalization."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from kalmannorm.lab.baselines.norm_act import EvoNorm2d, FilterResponseNorm2d


def random_layer(kind, **options):
    layer = kind(6, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def evonorm(x, layer, n, c):
    group = x[n, :3] if c < 3 else x[n, 3:]
    std = (((group - group.mean()) ** 2).mean() + 1e-5).sqrt()
    gate = 1 / (1 + (-layer.v[c] * x[n, c]).exp())
    return x[n, c] * gate / std * layer.weight[c] + layer.bias[c]


def frn(x, layer, n, c):
    nu2 = sum(float(pixel) ** 2 for pixel in x[n, c].flatten()) / x[n, c].numel()
    eps = 0.1 + (0 if layer.more_eps is None else abs(layer.more_eps.item()))
    y = layer.weight[c] * x[n, c] / (nu2 + eps) ** 0.5 + layer.bias[c]
    return y if layer.threshold is None else torch.where(y > layer.threshold[c], y, layer.threshold[c])


@pytest.mark.parametrize(
    ("plain", "kind", "options"),
    [
        (evonorm, EvoNorm2d, {"groups": 2}),
        *((frn, FilterResponseNorm2d, {"eps": 0.1, "activation": a, "learned_eps": b}) for a in (0, 1) for b in (0, 1)),
    ],
)
def test_the_plain_formula(plain, kind, options):
    layer, x = random_layer(kind, **options), torch.randn(2, 6, 4, 5).double()
    expected = torch.stack([torch.stack([plain(x, layer, n, c) for c in range(6)]) for n in range(2)])
    assert torch.allclose(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer).eval()(x), layer(x))


def test_evonorm_without_activation_is_affine():
    layer, x = random_layer(EvoNorm2d, activation=False), torch.randn(2, 6, 3, 3).double()
    assert torch.allclose(layer(x), x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
    assert layer.v is None


def test_groups_divide_the_channels():
    assert [EvoNorm2d(channels).groups for channels in (64, 48, 6, 5)] == [32, 16, 2, 1]


def test_at_first_evonorm_is_silu_of_standardized_images_scaled():
    x = torch.randn(1, 2, 50, 50)
    x = x / x.std(correction=0)
    assert math.isclose(EvoNorm2d(2, groups=1)(x).mean().item(), nn.functional.silu(x).mean().item(), rel_tol=1e-3)


def test_frn_loses_the_scale():
    layer, x = random_layer(FilterResponseNorm2d, eps=0.0), torch.randn(2, 6, 4, 4).double()
    scales = torch.rand(2, 6, 1, 1).double() + 0.1
    assert torch.allclose(layer(scales * x), layer(x))


def test_frns_gradient_is_orthogonal_to_the_input():
    # What scale invariance means for training.
    layer = random_layer(FilterResponseNorm2d, eps=0.0, activation=False)
    x = torch.randn(2, 6, 4, 4).double().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x), x, torch.randn(2, 6, 4, 4).double())
    assert (gradient * x).sum((2, 3)).abs().max() < 1e-12


def test_at_first_frns_threshold_is_relu():
    assert FilterResponseNorm2d(3)(torch.randn(2, 3, 4, 4)).min() == 0


@pytest.mark.parametrize(("kind", "options"), [(EvoNorm2d, {"groups": 3}), (FilterResponseNorm2d, {"learned_eps": 1})])
class TestBoth:
    def test_gradcheck(self, kind, options):
        layer = random_layer(kind, **options)
        assert torch.autograd.gradcheck(layer, torch.randn(2, 6, 2, 2).double().requires_grad_())

    def test_half_precision(self, kind, options):
        assert kind(6, **options)(torch.randn(2, 6, 4, 4).bfloat16()).dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(2, 6), (2, 4, 5, 5)])
    def test_a_wrong_shape_raises(self, kind, options, shape):
        message = f"{kind.__name__} got an input of shape {shape}, expected (N, 6, H, W)"
        with pytest.raises(ValueError, match=re.escape(message)):
            kind(6, **options)(torch.randn(shape))
