"""Each network with BatchNorm, with GroupNorm and with Kalman layers: its norms and priors, and some steps."""

import functools

import pytest
import torch
from model_checks import batch, group_norm, losses
from torch import nn
from torchvision.models import resnet50

import kalmannorm
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.inception_v2 import InceptionV2

postactivation = functools.partial(CifarResNet, preactivation=False)
# What makes it, its norms, and the sides of the images of one step; of a training, the side, the rate and the steps.
NETWORKS = {
    "cifar_inception": (CifarInception, 1 + 3 * 6, 32, (16, 0.02, 30)),
    "preactivation": (functools.partial(CifarResNet, 8), 7, 32, (16, 0.05, 30)),
    "postactivation": (functools.partial(postactivation, 8), 7, 32, (16, 0.05, 30)),
    # Two modules have no 1x1 branch and no convolution behind the pooling.
    "inception_v2": (InceptionV2, 3 + 8 * 7 + 2 * 5, 64, (48, 0.005, 12)),
    "resnet50": (resnet50, 53, 64, (32, 0.002, 12)),
}
DEEPER = {"preactivation-32": CifarResNet, "postactivation-32": postactivation}


def build(network, kind):
    """With BatchNorm, with GroupNorm, or with BatchNorm that is converted."""
    torch.manual_seed(0)
    make = functools.partial(NETWORKS[network][0], num_classes=4)
    if kind == "group":
        return make(norm_layer=group_norm)
    return kalmannorm.convert(make()) if kind == "kalman" else make()


@pytest.mark.parametrize("network", NETWORKS)
def test_group_norm_takes_every_place(network):
    model = build(network, "group")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == NETWORKS[network][1]


@pytest.mark.parametrize("network", [*NETWORKS, *DEEPER])
def test_every_layer_but_the_first_has_a_prior(network):
    make, norms, size, _ = NETWORKS.get(network) or (DEEPER[network], 31, 32, None)
    model = kalmannorm.convert(make())
    description = kalmannorm.describe(model, batch(size, images=2)[0])
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    assert len(description.rows) == norms
    assert [row.name for row in description.rows if row.reason] == [description.rows[0].name], str(description)


@pytest.mark.parametrize(
    "network",
    [pytest.param(each, marks=pytest.mark.slow if each in ("inception_v2", "resnet50") else []) for each in NETWORKS],
)
@pytest.mark.parametrize("kind", ["batch", "group", "kalman"])
def test_a_few_steps_on_one_batch_halve_the_loss(network, kind):
    size, rate, steps = NETWORKS[network][3]
    values = losses(build(network, kind), *batch(size), steps, rate)
    assert values[-1] < values[0] / 2, values
