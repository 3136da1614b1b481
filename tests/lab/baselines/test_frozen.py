"""BN*: fixed BatchNorm."""

import copy

import pytest
import torch
from learning import falls
from torch import nn

from kalmannorm.lab.baselines.frozen import to_frozen
from kalmannorm.lab.models.small import SmallConvNet


def test_frozen_layers_normalize_by_what_they_have_learned():
    model = SmallConvNet()
    model(torch.randn(8, 1, 32, 32))
    images = torch.randn(2, 1, 32, 32)
    expected = copy.deepcopy(model).eval()(images)
    assert torch.equal(to_frozen(model).train()(images), expected)
    assert not any(parameter.requires_grad for parameter in model.norms.parameters())


def test_it_learns():
    def replace(model):
        for _ in range(20):
            model(torch.randn(16, 1, 16, 16))
        return to_frozen(model)

    assert falls(replace)


def test_without_batchnorm_it_raises():
    with pytest.raises(ValueError, match="nothing to freeze"):
        to_frozen(nn.Sequential(nn.ReLU()))
