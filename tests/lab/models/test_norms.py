"""Each network's norms: GroupNorm takes every place, and of Kalman layers all but the first have a prior."""

import functools

import pytest
import torch
from model_checks import group_norm
from torch import nn
from torchvision.models import resnet50

import kalmannorm
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.signal import SignalNet, TabularNet
from kalmannorm.lab.models.unet3d import UNet3d
from kalmannorm.modules import is_stock_batchnorm

postactivation = functools.partial(CifarResNet, preactivation=False)
# What makes it, its norms, and the shape of an input.
NETWORKS = {
    "cifar_inception": (CifarInception, 1 + 3 * 6, (3, 32, 32)),
    "preactivation": (functools.partial(CifarResNet, 8), 7, (3, 32, 32)),
    "postactivation": (functools.partial(postactivation, 8), 7, (3, 32, 32)),
    "preactivation-32": (CifarResNet, 31, (3, 32, 32)),
    "postactivation-32": (postactivation, 31, (3, 32, 32)),
    # Two modules have no 1x1 branch and no convolution behind the pooling.
    "inception_v2": (InceptionV2, 3 + 8 * 7 + 2 * 5, (3, 64, 64)),
    "resnet50": (resnet50, 53, (3, 64, 64)),
    "signals": (SignalNet, 6, (1, 64)),
    "rows": (TabularNet, 3, (30,)),
    "volumes": (functools.partial(UNet3d, 8), 10, (1, 8, 8, 8)),
}
every_network = pytest.mark.parametrize("network", NETWORKS)


@every_network
def test_group_norm_takes_every_place(network):
    make, norms, _ = NETWORKS[network]
    model = make(norm_layer=group_norm)
    assert not any(map(is_stock_batchnorm, model.modules()))
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == norms


@every_network
@pytest.mark.parametrize("known", [False, True])
def test_every_layer_but_perhaps_the_first_has_a_prior(network, known):
    make, norms, shape = NETWORKS[network]
    stats = ([0.0] * shape[0], [1.0] * shape[0]) if known else None
    model = kalmannorm.convert(make(), input_stats=stats)
    description = kalmannorm.describe(model, torch.randn(2, *shape))
    assert not any(map(is_stock_batchnorm, model.modules()))
    assert len(description.rows) == norms
    without = [] if known else [description.rows[0].name]
    assert [row.name for row in description.rows if row.reason] == without, str(description)
