"""The ReLU behind a BatchNorm is found, and no other."""

import copy

import pytest
import timm
import torch
from networks import made_of
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from kalmannorm.lab.baselines.activated import replace_batchnorm_relu
from kalmannorm.lab.models.small import SmallConvNet


class Activated(nn.Module):
    """A BatchNorm, and the activation if there was one behind it: the network as it was."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm, self.activation = copy.deepcopy(norm), activation

    def forward(self, x):
        return self.norm(x) if self.activation is None else self.activation(self.norm(x))


class Residual(nn.Module):
    """One ReLU module for all places, one of them behind the addition."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first, self.second, self.third = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.second(self.relu(self.first(x)))
        return self.third(self.relu(x + y)).relu()


class Dropping(nn.Module):
    """A branch that training leaves out by chance, and a module that begins with an activation."""

    def __init__(self, drop):
        super().__init__()
        self.drop, self.relu = drop, made_of(lambda self, x: F.relu(x))
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.relu(self.second(x + self.drop(self.first(x))))


def flags(model):
    return [layer.activation is not None for layer in model.modules() if isinstance(layer, Activated)]


def before(activate):
    return made_of(lambda self, x: self.activate(self.norm(x)), norm=nn.BatchNorm2d(3), activate=activate)


def norm_acts():
    return nn.Sequential(
        timm.layers.BatchNormAct2d(3), nn.Conv2d(3, 3, 1), timm.layers.BatchNormAct2d(3, apply_act=False)
    )


@pytest.mark.parametrize(
    ("make", "channels", "expected"),
    [
        (SmallConvNet, 1, [True] * 6),
        (lambda: before(lambda x: F.leaky_relu(x, 0.3)), 3, [True]),
        (lambda: before(lambda x: F.gelu(input=x, approximate="tanh")), 3, [True]),
        (lambda: before(torch.relu), 3, [True]),
        (lambda: before(nn.ELU(0.5)), 3, [True]),
        (Residual, 3, [True, False, True]),
        (norm_acts, 3, [True, False]),
        (lambda: timm.create_model("resnet10t", num_classes=3), 3, [True] * 4 + [False] + [True, False, False] * 3),
    ],
    ids=["a function", "a slope", "a keyword", "torch", "a module", "one behind an addition", "inside", "timm"],
)
def test_the_activations_directly_behind_go_and_nothing_else_changes(make, channels, expected):
    model, images = make(), torch.randn(2, channels, 32, 32)
    output, names = copy.deepcopy(model)(images), set(model.state_dict())
    replaced = replace_batchnorm_relu(model, Activated)
    assert flags(replaced) == expected
    assert torch.allclose(copy.deepcopy(replaced)(images), output, atol=1e-5)
    if make is not norm_acts:
        assert {name.replace(".norm.", ".") for name in replaced.state_dict()} == names


@pytest.mark.parametrize("drop", [lambda p: StochasticDepth(p, "row"), timm.layers.DropPath, nn.Dropout])
def test_what_draws_in_training_does_not_in_eval(drop):
    model, x = Dropping(drop(0.5)), torch.randn(16, 3, 4, 4)
    replaced = replace_batchnorm_relu(model, Activated)
    assert flags(replaced) == [False, True]
    assert torch.equal(replaced.eval()(x), model.eval()(x))
    assert not torch.equal(replaced.train()(x), replaced(x))
    assert torch.equal(replaced.eval()(x), replaced(x))


def test_a_batchnorm_by_itself():
    replaced = replace_batchnorm_relu(nn.BatchNorm2d(3), Activated)
    assert flags(replaced) == [False]
    assert replaced(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_a_layer_with_and_without_a_relu_raises():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="BatchNorm '0' is called twice, expected an activation behind both"):
        replace_batchnorm_relu(nn.Sequential(norm, nn.ReLU(), norm), Activated)


def test_a_network_that_cannot_be_traced_raises():
    class Branch(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"Branch cannot be traced by torch\.fx"):
        replace_batchnorm_relu(Branch(nn.BatchNorm2d(3)), Activated)
