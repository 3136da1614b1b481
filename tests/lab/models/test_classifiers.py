"""Each network with BatchNorm, with GroupNorm and with Kalman layers: its norms and priors, one step, and some."""

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
KINDS = ["batch", "group", "kalman"]

every_network = pytest.mark.parametrize("network", NETWORKS)
every_norm = pytest.mark.parametrize("kind", KINDS)


def build(network, kind):
    """With BatchNorm, with GroupNorm, or with BatchNorm that is converted."""
    torch.manual_seed(0)
    make = functools.partial(NETWORKS[network][0], num_classes=4)
    if kind == "group":
        return make(norm_layer=group_norm)
    return kalmannorm.convert(make()) if kind == "kalman" else make()


@every_network
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


@every_network
@every_norm
def test_one_step_gives_every_parameter_a_finite_gradient_and_moves_it(network, kind):
    model = build(network, kind)
    images, labels = batch(NETWORKS[network][2], images=2)
    before = [parameter.clone() for parameter in model.parameters()]
    assert torch.isfinite(torch.tensor(losses(model, images, labels, steps=1))).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    moved = sum(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    assert moved >= 0.9 * len(before)


@pytest.mark.parametrize(
    "network",
    [pytest.param(each, marks=pytest.mark.slow if each in ("inception_v2", "resnet50") else []) for each in NETWORKS],
)
@every_norm
def test_a_few_steps_on_one_batch_halve_the_loss(network, kind):
    size, rate, steps = NETWORKS[network][3]
    values = losses(build(network, kind), *batch(size), steps, rate)
    assert values[-1] < values[0] / 2, values
