"""Every method of the table works on any network, and survives what is done to networks."""

import copy

import pytest
import timm
import torch
from learning import falls, stripes
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


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(steps):
        images, labels = stripes(4)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [small, Block])
class TestEvery:
    def test_each_parameter_learns(self, method, build):
        model = METHODS[method].replace(build())
        train(model, 1)
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def test_no_batchnorm_of_its_own_is_left(self, method, build):
        model = METHODS[method].replace(build())
        stock = [type(module) for module in model.modules() if type(module) is nn.BatchNorm2d]
        assert len(stock) == (2 if method in ("bn", "frozen") else 0)

    def test_eval_sees_each_image_by_itself(self, method, build):
        model = train(METHODS[method].replace(build()), 2).eval()
        images, _ = stripes(4)
        assert torch.allclose(model(images)[:1], model(images[:1]), atol=1e-5)

    def test_checkpoint(self, method, build):
        model, again = train(METHODS[method].replace(build())), METHODS[method].replace(build())
        again.load_state_dict(model.state_dict())
        images, _ = stripes(4)
        assert torch.equal(again.eval()(images), model.eval()(images))

    def test_double_precision_and_copies(self, method, build):
        model = train(METHODS[method].replace(build())).double()
        twin = copy.deepcopy(model)
        images = stripes(4)[0].double()
        assert model(images).dtype == torch.float64
        assert torch.equal(twin.eval()(images), twin.eval()(images))


@pytest.mark.parametrize("method", METHODS)
def test_timm_resnet(method):
    model = METHODS[method].replace(timm.create_model("resnet10t", num_classes=2))
    y = model(torch.randn(4, 3, 64, 64))
    y.sum().backward()
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "training"),
    [
        ("brn", {"schedule": {"start": 5, "r_until": 40, "d_until": 25}}, {}),
        ("mabn", {}, {}),
        ("mabn", {"warmup": 5, "renorm_start": 15, "buffer_size": 4}, {}),
        ("cbn", {}, {}),
        ("cbn", {"burn_in": 10}, {}),
        ("evonorm", {"groups": 4}, {}),
        ("frn", {}, {}),
        ("wn", {}, {}),
        ("ln", {}, {}),
        # The mean over pixels before the classifier sees little of features that each have mean 0 and variance 1.
        ("in", {}, {"rate": 0.3, "steps": 100}),
        ("ghost", {"samples": 4}, {}),
        ("frozen", {}, {}),
        ("gn", {"proxy": True, "groups": 2}, {}),
        ("kn", {"proxy": True}, {}),
        ("bn", {"proxy": True}, {}),
    ],
)
def test_it_learns(method, options, training):
    def replaced(model):
        for _ in range(20 if method == "frozen" else 0):  # which means something after a training
            model(torch.randn(16, 1, 16, 16))
        return normalize(model, method, **options)

    assert falls(replaced, **training)
