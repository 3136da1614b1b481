"""Layers fixed at what they have learned."""

import copy
import pickle
import re

import pytest
import torch
from networks import prior_of
from torch import nn

import kalmannorm as kn
from kalmannorm.recording import is_open


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


def frozen_small(convert, seen=3):
    model = kn.convert(small()) if convert else small()
    for _ in range(seen):
        model(torch.randn(2, 3, 8, 8))
    return kn.freeze(model)


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize(
    "again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), kn.freeze],
    ids=["itself", "deepcopy", "pickle", "frozen twice"],
)  # fmt: skip
def test_a_frozen_model_trains_by_running_statistics(convert, again):
    model = again(frozen_small(convert)).train()
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    y = model(x)
    model(x * 3).square().sum().backward()
    torch.testing.assert_close(y, model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "0.weight", "0.bias", "3.weight", "3.bias"
    }  # fmt: skip
    assert all(p.requires_grad == (name[0] in "03") for name, p in model.named_parameters())


@pytest.mark.parametrize("convert", [True, False])
def test_what_is_frozen_can_be_thawed(convert):
    model = kn.freeze(copy.deepcopy(frozen_small(convert))).train()
    x = torch.randn(2, 3, 8, 8)
    by_running = model(x)
    assert kn.freeze(model, False) is model
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    never = kn.convert(small()) if convert else small()
    never.load_state_dict(model.state_dict())
    y = model(x)
    torch.testing.assert_close(y, never(x), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), never.state_dict(), rtol=0, atol=0)
    assert not torch.allclose(y, by_running)
    assert not model[1]._forward_pre_hooks
    assert not kn.freeze(kn.freeze(model.eval()), False)[1].training
    assert len(kn.freeze(kn.freeze(model))[1]._forward_pre_hooks) == (0 if convert else 1)


def test_what_else_freeze_changes_and_what_it_leaves():
    model = small()
    model[1].eval()
    assert not kn.freeze(model, False)[1].training  # it was never frozen
    assert not kn.freeze(model.train())[1].training  # before the first call
    layer = kn.freeze(kn.KalmanNormAct2d(4, act=nn.PReLU()))
    assert layer.act.weight.requires_grad


def test_other_hooks_of_a_stock_layer_stay():
    layer = nn.BatchNorm1d(2)
    layer.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    kn.freeze(kn.freeze(layer), False)
    layer.eval()
    torch.testing.assert_close(layer(torch.zeros(1, 2)), torch.ones(1, 2))


def test_a_freeze_between_backward_and_step_holds():
    model = kn.convert(small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    kn.freeze(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    after = model.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        "0.weight", "0.bias", "3.weight", "3.bias"
    }  # fmt: skip


def test_a_part_is_frozen_and_says_so():
    model = kn.convert(small())
    kn.freeze(model[:2])
    text = str(model).splitlines()
    assert "frozen=True" in text[2]
    assert "frozen" not in text[5]
    model(torch.randn(2, 3, 8, 8))
    assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [0, 1]


def test_a_frozen_network_is_not_watched_and_a_frozen_layer_hands_on():
    model = kn.convert(small())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(1, 2)
    seen = []

    def look(layer, args):
        seen.append(prior_of(args[0], 1) if is_open() else None)

    model[4].register_forward_pre_hook(look)
    kn.freeze(model)
    model(torch.randn(2, 3, 8, 8))
    assert seen == [None]
    kn.freeze(model[4], False)
    model(torch.randn(2, 3, 8, 8))
    # What leaves a frozen layer is not of variance 1, if its input is not; its running statistics say it is.
    scale = model[1].running_var / (model[1].running_var + model[1].eps)
    half = 0.5 * (1 - 1 / torch.pi)
    squared = 0.5 - half  # of the mean of a rectified standard normal
    weights = model[3].weight
    torch.testing.assert_close(
        seen[1].var[0], (weights.square() * (half * scale).view(-1, 1, 1)).sum((1, 2, 3)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        seen[1].mean[0],
        (weights * (squared * scale).sqrt().view(-1, 1, 1)).sum((1, 2, 3)) + model[3].bias,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_a_layer_without_running_statistics_still_fuses():
    group = kn.freeze(kn.GroupKalmanNorm(2, 4))
    batch = kn.freeze(kn.KalmanNorm2d(4, track_running_stats=False))
    x = 5 + 3 * torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(kn.connect(nn.Sequential(group))(x), nn.GroupNorm(2, 4)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kn.connect(nn.Sequential(batch))(x), nn.BatchNorm2d(4)(x), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in [*group.parameters(), *batch.parameters()])
    assert "frozen=True" in repr(group)


def test_a_frozen_layer_converts_and_deploys():
    x = torch.randn(2, 3, 8, 8)
    stock = frozen_small(convert=False)
    expected = stock(x)
    ours = kn.convert(stock).train()
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in ours[1].parameters())
    plain = kn.to_batchnorm(ours)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=0)
    assert type(plain[1]) is nn.BatchNorm2d
    assert not plain[1].training
    assert plain.training
    assert not any(p.requires_grad for p in plain[1].parameters())
    assert not plain[1]._forward_pre_hooks


def test_a_frozen_layer_of_another_library_comes_back_as_its_stand_in_was():
    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d
    model = kn.convert(kn.freeze(nn.Sequential(nn.Conv2d(3, 4, 3), norm_act(4))))
    assert model[1].frozen
    plain = kn.to_batchnorm(kn.freeze(model, False)).train()
    plain(torch.randn(2, 3, 8, 8))
    assert type(plain[1]) is norm_act
    assert plain[1].running_mean.any()


@pytest.mark.parametrize("convert", [True, False])
def test_a_frozen_model_compiles_whole(convert):
    torch.compiler.reset()
    model = frozen_small(convert).train()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert all(layer.num_batches_tracked.item() == 3 for layer in (model[1], model[4]))


def test_update_bn_leaves_a_frozen_layer_as_it_is():
    model = kn.freeze(kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    model[1].running_mean.fill_(3)
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 8, 8)], model)
    assert (model[1].running_mean == 3).all()
    model[1].reset_parameters()
    assert (model[1].running_mean == 0).all()
    assert model[1].frozen


def test_nothing_to_freeze():
    with pytest.raises(ValueError, match=re.escape("Linear has nothing to freeze: no Kalman layer and no BatchNorm")):
        kn.freeze(nn.Linear(2, 2))
