"""What takes BatchNorm's place keeps its tensors, and takes all its places."""

import pytest
import timm
import torch
from torch import nn

from kalmannorm.lab.baselines.replacing import in_groups, replace_batchnorm


def group(norm):
    return nn.GroupNorm(2, norm.num_features)


def test_parameters_type_and_flag_stay():
    old = nn.BatchNorm2d(4).double().eval()
    nn.init.zeros_(old.weight)
    new = replace_batchnorm(nn.Sequential(old), group)[0]
    assert new.weight is old.weight
    assert new.bias is old.bias
    assert not new.training
    assert new(torch.ones(1, 4, 2, 2).double()).dtype == torch.float64


def test_a_layer_without_parameters_hands_on_its_type_and_statistics():
    old = nn.BatchNorm2d(4, affine=False).double()
    new = replace_batchnorm(old, lambda norm: nn.BatchNorm2d(4, affine=norm.affine))
    assert new.running_mean is old.running_mean
    assert replace_batchnorm(nn.BatchNorm2d(4, affine=False).double(), group).weight.dtype == torch.float64


def test_a_shared_layer_stays_shared():
    old = nn.BatchNorm2d(4)
    new = replace_batchnorm(nn.ModuleDict({"first": old, "second": old}), group)
    assert new["first"] is new["second"]
    assert isinstance(new["first"], nn.GroupNorm)


def test_the_activation_inside_a_timm_layer_stays():
    norm_act = timm.layers.BatchNormAct2d(4)
    new = replace_batchnorm(nn.Sequential(norm_act), group)
    assert new(torch.randn(2, 4, 3, 3)).min() == 0


def test_nothing_to_replace_raises():
    with pytest.raises(ValueError, match="Sequential has nothing to replace: expected at least one BatchNorm"):
        replace_batchnorm(nn.Sequential(nn.ReLU()), group)


def test_a_batch_that_groups_do_not_divide():
    with pytest.raises(ValueError, match="got a batch of 5, expected a multiple of the statistics batch, 2"):
        in_groups(torch.randn(5, 3, 4, 4), 2)
