"""Logits by the statistics of small batches."""

import copy

import pytest
import torch

import kalmannorm
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.scoring import online_logits


def trained(method, **options):
    network = normalize(SmallConvNet(((8, 2), (16, 2))), method, **options)
    for _ in range(5):
        network(torch.randn(8, 1, 16, 16))
    return network.eval()


@pytest.mark.parametrize("method", ["bn", "kn", "brn", "cbn"])
@pytest.mark.parametrize("in_training", [None, 4])
def test_each_group_by_itself_and_a_last_one_that_overlaps(method, in_training):
    network = trained(method, statistics_batch=in_training)
    images = torch.randn(8, 1, 16, 16)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        logits = online_logits(network, images, 3)
        kalman = [layer for layer in network.modules() if isinstance(layer, kalmannorm.KalmanNorm)]
        assert all((layer.stats_batch_size, layer.online) == (in_training, False) for layer in kalman)
        alone = normalize(network, "bn") if method == "bn" else network
        for layer in alone.modules():
            if isinstance(layer, kalmannorm.KalmanNorm):
                layer.stats_batch_size = None
        with kalmannorm.online_statistics(alone):
            parts = [alone(part) for part in (images[:3], images[3:6], images[5:])]
            expected = torch.cat([*parts[:2], parts[2][1:]])
        assert torch.allclose(logits, expected, atol=1e-5)
        assert not torch.allclose(logits, network(images), atol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_fewer_images_than_a_group():
    network, images = trained("kn"), torch.randn(3, 1, 16, 16)
    with torch.no_grad(), kalmannorm.online_statistics(network):
        expected = network(images)
    with torch.no_grad():
        assert torch.allclose(online_logits(network, images, 8), expected, atol=1e-5)


def test_a_last_image_alone_is_no_batch_for_stock_batchnorm():
    """Its last maps are of one pixel: torch refuses to normalize a single value."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    assert online_logits(network.eval(), torch.randn(5, 1, 8, 8), 2).shape == (5, 4)


@pytest.mark.parametrize("method", ["gn", "gkn", "frozen", "wn"])
def test_without_running_statistics_it_is_the_network_itself(method):
    network, images = trained(method), torch.randn(4, 1, 16, 16)
    assert torch.equal(online_logits(network, images, 2), network(images))
