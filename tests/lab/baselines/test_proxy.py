"""Proxy Normalization."""

import copy

import pytest
import torch
from networks import prior_of
from torch import nn
from torch.nn import functional as F

import kalmannorm
from kalmannorm.lab.baselines.proxy import ProxyNormalized, to_proxy
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.small import SmallConvNet


def random_layer(activation, learned=True, norm=None):
    layer = ProxyNormalized(nn.GroupNorm(2, 4) if norm is None else norm, activation, learned).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def by_quadrature(layer, activation):
    """Mean and variance of the activation of each channel's proxy, on a grid of the standard Gaussian."""
    z = torch.linspace(-10, 10, 100_001).double()
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    shift, scale = layer.proxy if layer.proxy is not None else torch.zeros(2, 4).double()
    weight, bias = layer.norm.weight, layer.norm.bias
    y = activation(bias[:, None] + weight[:, None] * (shift[:, None] + (1 + scale[:, None]) * z))
    mean = (y * density).sum(1)
    return mean, ((y - mean[:, None]).square() * density).sum(1)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), F.relu, nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.ReLU6()]
)
def test_the_papers_equation(activation, learned):
    layer, x = random_layer(activation, learned), torch.randn(3, 4, 5, 5).double()
    mean, var = by_quadrature(layer, activation)
    y = activation(F.group_norm(x, 2, layer.norm.weight, layer.norm.bias))
    expected = (y - mean.view(4, 1, 1)) / (var + 0.03).sqrt().view(4, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(copy.deepcopy(layer).eval()(x), layer(x))


def test_gradients_flow_through_the_proxy():
    layer, x = random_layer(nn.ReLU()), torch.randn(2, 4, 3, 3).double()
    names = ["norm.weight", "norm.bias", "proxy"]
    moved = dict(layer.named_parameters())

    def loss(*values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(loss, [moved[name].detach().requires_grad_() for name in names])


def test_in_place_and_in_other_ranks_and_types():
    layer = ProxyNormalized(nn.BatchNorm1d(4), nn.ReLU(inplace=True))
    assert layer(torch.randn(6, 4)).shape == (6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model = to_proxy(SmallConvNet(((8, 2), (16, 2))))
        model(torch.randn(4, 1, 16, 16)).sum().backward()
    assert ProxyNormalized(nn.GroupNorm(2, 4), F.relu)(torch.randn(2, 4, 3, 3)).dtype == torch.float32
    assert layer.bfloat16()(torch.randn(6, 4).bfloat16()).dtype == torch.bfloat16


def network(method, **options):
    return normalize(SmallConvNet(((8, 2), (16, 2))), method, proxy=True, statistics_batch=2, **options)


def test_a_prior_behind_it_is_moved_by_the_same_numbers():
    torch.manual_seed(0)
    model = network("kn", input_stats=([0.0], [1.0]))
    layer = next(layer for layer in model.modules() if isinstance(layer, ProxyNormalized))
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    seen = {}
    for name, module in (("norm", layer.norm), ("all", layer)):
        module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: prior_of(y, 2)}) or None)
    images = torch.randn(4, 1, 16, 16)
    model(images)
    before, behind = seen["norm"], seen["all"]
    rectified = kalmannorm.rules.RULES[F.relu](before)
    mean, scale = layer.moments()
    assert torch.allclose(behind.mean, (rectified.mean - mean) * scale, atol=1e-5)
    assert torch.allclose(behind.var, rectified.var * scale.square(), atol=1e-5)
    assert kalmannorm.describe(model, images).with_prior == 2


def test_a_copy_has_the_same_priors():
    model, images = network("kn", input_stats=([0.0], [1.0])), torch.randn(4, 1, 16, 16)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    assert kalmannorm.describe(twin, images).with_prior == 2


def test_a_residual_network_keeps_all_priors_and_activations_behind_additions():
    resnet = pytest.importorskip("torchvision").models.resnet18
    images = torch.randn(2, 3, 32, 32)
    plain = kalmannorm.describe(normalize(resnet(num_classes=3), "kn"), images)
    model = normalize(resnet(num_classes=3), "kn", proxy="fixed")
    described = kalmannorm.describe(model, images)
    assert (described.with_prior, len(described.rows)) == (plain.with_prior, 20)
    proxied = [name for name, layer in model.named_modules() if isinstance(layer, ProxyNormalized)]
    assert len(proxied) == 9
    assert all(name.endswith("bn1") for name in proxied)
    assert all(layer.proxy is None for layer in model.modules() if isinstance(layer, ProxyNormalized))


def test_errors():
    with pytest.raises(ValueError, match="expected a layer with a weight and a bias of each channel"):
        to_proxy(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()))
    with pytest.raises(ValueError, match="expected one with a rule in kalmannorm"):
        ProxyNormalized(nn.BatchNorm2d(4), lambda x: x)
    for method in ("frn", "evonorm", "wn"):
        with pytest.raises(ValueError, match=f"before an activation; got it with '{method}'"):
            network(method)
    with pytest.raises(ValueError, match="proxy must be False, True or 'fixed'; got 'learned'"):
        normalize(SmallConvNet(), "gn", proxy="learned")
