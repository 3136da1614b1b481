"""EvoNorm-S0 and Filter Response Normalization, as timm's layers are put in."""

import pytest
import torch
from torch import nn

from kalmannorm.lab.baselines.norm_act import to_evonorm, to_frn


def replaced(replace, *layers, **options):
    """A network in float64, each of whose parameters is drawn."""
    network = replace(nn.Sequential(*layers).double(), **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def first(network):
    return network.get_submodule("0")


def by_channel(values):
    return values.view(-1, 1, 1)


def test_evonorm_by_its_formula():
    network, x = replaced(to_evonorm, nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), groups=2), torch.randn(2, 6, 4, 5).double()
    layer = first(network)
    groups = x.reshape(2, 2, -1)
    std = (((groups - groups.mean(2, keepdim=True)) ** 2).mean(2) + 0.1).sqrt().repeat_interleave(3, 1)
    gated = x / (1 + (-by_channel(layer.v) * x).exp()) / std[..., None, None]
    expected = gated * by_channel(layer.weight) + by_channel(layer.bias)
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert torch.equal(network.eval()(x), network.train()(x))


def test_frn_by_its_formula():
    network, x = replaced(to_frn, nn.BatchNorm2d(6), nn.ReLU()), torch.randn(2, 6, 4, 5).double() / 1000
    layer = first(network)
    y = x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()  # so small that the paper's eps shows
    expected = torch.maximum(y * by_channel(layer.weight) + by_channel(layer.bias), by_channel(layer.tau))
    assert torch.allclose(network(x), expected, atol=1e-6)
    assert torch.equal(network.eval()(x), network.train()(x))


def test_without_a_relu_behind_it_there_is_no_activation():
    x = torch.randn(2, 6, 3, 3).double()
    layer = first(replaced(to_evonorm, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)))
    assert torch.allclose(layer(x), x * by_channel(layer.weight) + by_channel(layer.bias))
    layer = first(replaced(to_frn, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)))
    y = x / x.square().mean((2, 3), keepdim=True).sqrt()
    assert torch.allclose(layer(x), y * by_channel(layer.weight) + by_channel(layer.bias), atol=1e-5)


def test_groups_divide_the_channels():
    networks = [to_evonorm(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())) for channels in (64, 48, 6, 5)]
    assert [first(network).groups for network in networks] == [32, 16, 2, 1]


@pytest.mark.parametrize("replace", [to_evonorm, to_frn])
def test_they_are_of_images(replace):
    with pytest.raises(ValueError, match="got a BatchNorm1d to replace, expected BatchNorm of images"):
        replace(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU()))
