"""Why eval() is worse than training."""

import copy
import math

import pytest
import torch
from networks import made_of
from torch import nn

import kalmannorm as kn


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def kalman():
    return kn.convert(network(), input_stats=([0.0] * 3, [1.0] * 3))


def batches(count=6, samples=2):
    torch.manual_seed(1)
    return [torch.randn(samples, 3, 10, 10) for _ in range(count)]


def trained(model, loader):
    model.train()
    for _ in range(60 // len(loader)):
        for x in loader:
            model(x)
    return kn.recalibrate(model, loader, progress=False)


@pytest.mark.parametrize("make", [network, kalman])
def test_nothing_is_wrong_after_recalibration(make):
    loader = batches(samples=16)
    found = kn.diagnose(trained(make(), loader), loader, progress=False)
    assert [row.advice for row in found.rows] == ["", ""]
    for row in found.rows:
        assert row.running == pytest.approx(1, abs=0.01)  # not exactly: early batches saw other statistics below
        assert row.mean < 0.01
        assert row.in_eval == pytest.approx(1, abs=0.1)
        assert math.isnan(row.prior) == (make is network)
    assert found.outputs < 0.3
    assert "0 of 2 layers need attention" in str(found)


@pytest.mark.parametrize("make", [network, kalman])
def test_statistics_are_compared_with_those_of_inputs_as_in_eval(make):
    loader = batches(samples=16)
    model = trained(make(), loader)
    with torch.no_grad():
        model[1].running_var /= 4  # so that the layer above gets inputs of four times the variance
    row = kn.diagnose(model, loader, progress=False).rows[1]
    assert row.running < 0.5
    assert "recalibrate" in row.advice
    kn.recalibrate(model, loader, progress=False)
    assert kn.diagnose(model, loader, progress=False).rows[1].advice == ""


def test_the_numbers_are_those_of_their_definitions():
    loader = batches()
    model = trained(network(), loader)
    with torch.no_grad():
        model[1].running_var *= 4
        model[1].running_mean += 3 * model[1].running_var.sqrt() / 2
    row = kn.diagnose(model, loader, progress=False).rows[0]
    assert row.running == pytest.approx(4, rel=1e-4)
    assert row.mean == pytest.approx(3, rel=1e-4)
    assert row.in_eval == pytest.approx((1 + 9) / 4, rel=1e-3)
    maps = [model[0](x).detach() for x in loader]
    variances = torch.stack([m.var((0, 2, 3), correction=0) for m in maps])
    expected = (variances.std(0, correction=0) / variances.mean(0)).square().mean().sqrt()
    means = torch.stack([m.mean((0, 2, 3)) for m in maps])
    true = torch.cat(maps).var((0, 2, 3), correction=0)
    assert row.spread == pytest.approx(max(float(expected), float((means.var(0, correction=0) / true).mean().sqrt())))
    assert "recalibrate" in row.advice


def test_it_says_which_kind_of_fault():
    loader = batches(samples=8)
    assert "initial ones" in kn.diagnose(network(), loader, progress=False).rows[0].advice
    model = trained(network(), loader)
    shifted = kn.diagnose(model, loader, [x + 3 for x in loader], progress=False)
    assert shifted.rows[0].advice.startswith("validation batches differ from training batches")
    assert math.isnan(shifted.outputs)
    other = copy.deepcopy(model)
    other[1].running_mean += 3
    assert "recalibrate" in kn.diagnose(other, loader, progress=False).rows[0].advice
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight *= 3  # after its statistics, so the next layer's are off
    rows = kn.diagnose(other, loader, progress=False).rows
    assert rows[0].advice == ""
    assert "recalibrate" in rows[1].advice
    noisy = [x * scale for x, scale in zip(loader, [0.1, 0.2, 0.4, 1, 4, 8], strict=True)]
    row = kn.diagnose(trained(network(), noisy), noisy, progress=False).rows[0]
    assert "differ much from batch to batch" in row.advice
    model[1].running_var.fill_(math.nan)
    assert "not finite" in kn.diagnose(model, loader, progress=False).rows[0].advice


def test_a_prior_that_is_off_shows():
    model = kn.convert(network(), input_stats=([0.0] * 3, [2.0] * 3))
    loader = batches()
    row = kn.diagnose(trained(model, loader), loader, progress=False).rows[0]
    assert 3 < row.prior < 5
    assert "calibrate(model, loader, source='data')" in row.advice
    kn.calibrate(model, loader, source="data", progress=False)
    row = kn.diagnose(trained(model, loader), loader, progress=False).rows[0]
    assert (row.prior, row.advice) == (pytest.approx(1, abs=0.2), "")


def test_a_narrow_prior_leaves_a_layer_to_its_batches():
    loader = [x * scale for x, scale in zip(batches(), [0.1, 0.2, 0.4, 1, 4, 8], strict=True)]
    advice = {}
    for deviation in (0.1, 4.0):
        model = kn.convert(network(), input_stats=([0.0] * 3, [deviation] * 3))
        advice[deviation] = kn.diagnose(trained(model, loader), loader, progress=False).rows[0].advice
    assert advice[0.1].startswith("its prior is too narrow, so it follows its batch: train on after kalmannorm.freeze")
    assert "narrow" not in advice[4.0]
    model = kn.convert(network(), input_stats=([0.0] * 3, [4.0] * 3))  # the second layer's prior is wide enough
    with torch.no_grad():
        trained(model, loader)[1].running_var *= 16
    row = kn.diagnose(model, loader, progress=False).rows[1]
    assert row.prior > 0.5
    assert row.advice.startswith("its input differs in eval(), or a layer below is off")


def test_dead_channels_do_not_count():
    loader = batches()
    model = network()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[0].bias[3] = 0
    found = kn.diagnose(trained(model, loader), loader, progress=False)
    assert found.rows[0].running == pytest.approx(1, abs=1e-5)
    model[1].running_var[4] = 0  # where the channel is not dead
    assert 0.5 < kn.diagnose(model, loader, progress=False).rows[0].running < 2
    with torch.no_grad():
        model[0].weight.zero_()
    assert kn.diagnose(model, loader, progress=False).rows[0].advice == "all of its channels are constant"


@pytest.mark.parametrize("make", [network, kalman])
def test_the_model_stays_as_it_was(make):
    model = make()
    model[6].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    loader, state = batches(), torch.get_rng_state()
    kn.diagnose(model, loader, progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer._forward_pre_hooks for layer in (model[1], model[4]))


def test_a_correction_that_is_awaited_still_is():
    loader = batches()
    model = kn.convert(trained(network(), loader), input_stats=([0.0] * 3, [1.0] * 3))
    kn.diagnose(model, loader, progress=False)
    assert model[1].awaits_correction


def test_a_layer_that_no_batch_came_through_and_one_that_is_frozen():
    model = made_of(
        lambda self, x: {"logits": self.net(self.frozen(x)), "size": 3},
        net=network(), unused=nn.BatchNorm2d(3), frozen=kn.freeze(nn.BatchNorm2d(3)),
    )  # fmt: skip
    found = kn.diagnose(model, batches(), progress=False, max_batches=2)
    assert [row.name for row in found.rows] == ["net.1", "net.4", "unused"]
    assert found.rows[2].advice == "no batch came through it"
    assert found.outputs > 0  # found in the mapping


def test_bad_input():
    with pytest.raises(ValueError, match=r"kalmannorm\.diagnose got an empty loader for Sequential"):
        kn.diagnose(network(), [], progress=False)
    with pytest.raises(ValueError, match="Linear has no layer with running statistics"):
        kn.diagnose(nn.Linear(2, 2), [torch.randn(2, 2)])


def test_a_channel_that_is_constant_but_for_rounding_does_not_count():
    loader = batches()
    model = kn.convert(network())
    with torch.no_grad():
        model[0].weight[3:] = 0  # their biases are left, whose mean over a batch is not quite themselves
    for _ in range(20):
        for x in loader:
            model(x)
    row = kn.diagnose(model, loader, progress=False).rows[0]
    assert row.running == pytest.approx(1, rel=0.1)
    assert row.mean < 0.1


def test_a_validation_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches())

    model = trained(network(), batches())
    found = kn.diagnose(model, batches(), torch.utils.data.DataLoader(Stream(), batch_size=None), progress=False)
    assert found.rows == kn.diagnose(model, batches(), batches(), progress=False).rows
