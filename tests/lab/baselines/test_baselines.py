"""Every method of the table works on any network, and survives what is done to networks."""

import copy
import math

import pytest
import timm
import torch
from short_trainings import descent
from torch import nn
from torch.nn import functional as F

from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.models.small import SmallConvNet


class Block(nn.Module):
    """A residual block in a plain network, with one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False)
        self.norms, self.relu = nn.Sequential(nn.BatchNorm2d(8), nn.Identity()), nn.ReLU(inplace=True)
        self.last, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images):
        x = self.relu(self.norms(self.stem(images)))
        x = self.relu(x + self.last(self.conv(x)))
        return self.classifier(x.mean((2, 3)))


def small():
    return SmallConvNet(((8, 2), (16, 2)), num_classes=4)


def stripes(count):
    """Images of stripes, and which of four directions they have: no contrast or brightness tells it."""
    labels = torch.randint(4, (count,))
    angle = (labels * math.pi / 4).view(-1, 1, 1, 1)
    grid = torch.arange(16.0)
    along = grid * angle.cos() + grid.view(-1, 1) * angle.sin()
    return (along * 1.5 + 6 * torch.rand(count, 1, 1, 1)).sin() + 0.1 * torch.randn(count, 1, 16, 16), labels


def losses(model, batch, **options):
    """Each step on stripes that it has not seen."""

    def loss():
        images, labels = stripes(batch)
        return F.cross_entropy(model(images), labels)

    return descent(model, loss, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [small, Block])
def test_on_any_network(method, build):
    model, again = (METHODS[method].replace(build()) for _ in range(2))
    losses(model, 4, steps=3, rate=0.01)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    stock = [type(module) for module in model.modules() if type(module) is nn.BatchNorm2d]
    assert len(stock) == (2 if method in ("bn", "frozen") else 0)
    # In eval() each image is by itself, and a checkpoint and a copy are the same.
    images, _ = stripes(4)
    expected = model.eval()(images)
    assert torch.allclose(expected[:1], model(images[:1]), atol=1e-5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images), expected)
    twin = copy.deepcopy(model.double())
    assert torch.equal(twin(images.double()), model(images.double()))
    assert model.train()(images.double()).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_timm_resnet(method):
    model = METHODS[method].replace(timm.create_model("resnet10t", num_classes=2))
    y = model(torch.randn(4, 3, 64, 64))
    y.sum().backward()
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("brn", {"schedule": {"start": 5, "r_until": 40, "d_until": 25}}),
        ("mabn", {"warmup": 5, "renorm_start": 15, "buffer_size": 4}),
        ("cbn", {"burn_in": 10}),
        ("frozen", {}),
        ("gn", {"proxy": True, "groups": 2}),
        ("kn", {"proxy": True}),
        ("bn", {"proxy": True}),
    ],
)
def test_it_learns(method, options):
    """With options that `test_every_method` does not give."""
    model = SmallConvNet(((8, 2), (16, 2), (16, 1)), num_classes=4)
    for _ in range(20 if method == "frozen" else 0):  # which means something after a training
        model(torch.randn(16, 1, 16, 16))
    found = losses(normalize(model, method, **options), 16)
    assert sum(found[-5:]) < 0.6 * sum(found[:5])
