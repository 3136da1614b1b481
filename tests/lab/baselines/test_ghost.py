"""Ghost BatchNorm."""

import copy

import torch
from learning import falls
from torch import nn

from kalmannorm.lab.baselines.ghost import to_ghost
from kalmannorm.lab.models.small import SmallConvNet


def test_each_group_is_a_batch_of_its_own():
    model = SmallConvNet().double()
    images = torch.randn(6, 1, 32, 32).double()
    expected = torch.cat([copy.deepcopy(model)(part) for part in images.split(2)])
    assert torch.allclose(to_ghost(model, 2)(images), expected)


def test_eval_is_batchnorms():
    stock = nn.Sequential(nn.BatchNorm2d(3))
    ghost = to_ghost(copy.deepcopy(stock), 2)
    stock.load_state_dict(ghost.state_dict())
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(ghost.eval()(x), stock.eval()(x))


def test_it_learns():
    assert falls(lambda model: to_ghost(model, 4))
