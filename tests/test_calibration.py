"""Priors corrected by running statistics, or by data."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from network import in_two_processes
from networks import made_of, through_a_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import FrozenBatchNorm2d

import kalmannorm as kn
from kalmannorm import passes

INPUT_STATS = ([0.0] * 3, [1.0] * 3)


def network(norm=nn.BatchNorm2d):
    """Three layers, whose ReLUs make channels depend on each other."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 3), norm(4)
    )


def images(samples=8):
    return torch.randn(samples, 3, 12, 12) * torch.linspace(0.5, 2, samples)[:, None, None, None]


@pytest.fixture(scope="module")
def trained():
    """Trained with BatchNorm for a few steps."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(60):
        loss = (model(images()) - 1).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def converted(model, **options):
    return kn.convert(copy.deepcopy(model), **{"input_stats": INPUT_STATS, **options})


def kalman_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, kn.KalmanNorm | kn.GroupKalmanNorm)]


def priors(model, x):
    """Mean and variance of each layer's prior at a call, process noise included."""
    found = []

    def look(layer, args):
        prior = layer.prior(args[0], 1)
        found.append((prior.mean[0].detach(), prior.var[0].detach()))

    handles = [layer.register_forward_pre_hook(look) for layer in kalman_layers(model)]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def corrections(model):
    return [(layer.prior_shift, layer.prior_scale) for layer in kalman_layers(model)]


def assert_same_corrections(model, other):
    for mine, its in zip(corrections(model), corrections(other), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("process_noise", [True, False])
@pytest.mark.parametrize("spelled", ["by default", "calibrate=True", "by kn.calibrate"])
def test_the_first_priors_are_the_running_statistics(trained, process_noise, spelled):
    calibrate = {"by default": None, "calibrate=True": True, "by kn.calibrate": False}[spelled]
    model = converted(trained, calibrate=calibrate, process_noise=process_noise).eval()
    if calibrate is False:
        assert len(kn.calibrate(model).rows) == 3
    with kn.online_statistics(model):
        found = priors(model, images(2))
    for (mean, var), layer in zip(found, kalman_layers(model), strict=True):
        torch.testing.assert_close(mean, layer.running_mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(var, layer.running_var, atol=1e-6, rtol=1e-4)


def test_a_converted_network_still_works_at_one_sample(trained):
    """Where its own statistics are used before any step: an uncorrected prior is much too narrow here."""
    x = images()
    expected = copy.deepcopy(trained).eval()(x)

    def error(model):
        with kn.online_statistics(model.eval()):
            outputs = torch.cat([model(each[None]) for each in x])
        return float((outputs - expected).square().mean() / expected.var())

    assert error(converted(trained)) < 0.5 * error(converted(trained, calibrate=False))


def test_the_correction_is_constant_and_gradients_flow_through_the_prior(trained):
    model = converted(trained)
    model(images(2))
    before = [(shift.clone(), scale.clone()) for shift, scale in corrections(model)]
    with torch.no_grad():
        model[3].weight.mul_(2)
    expected_var = [var for _, var in priors(model, images(2))]
    for mine, its in zip(before, corrections(model), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    torch.testing.assert_close(expected_var[1] / 4, model[4].running_var, rtol=0.2, atol=0.1)  # four times as wide
    model(images(1)).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[4].process_noise.grad.abs().sum() > 0


def test_a_fresh_network_is_as_before_to_the_bit():
    x = images(2)
    default, off = converted(network()), converted(network(), calibrate=False)
    assert all(torch.equal(shift, torch.zeros_like(shift)) for shift, _ in corrections(default))
    assert all(torch.equal(scale, torch.ones_like(scale)) for _, scale in corrections(default))
    torch.testing.assert_close(default(x), off(x), rtol=0, atol=0)


def test_true_insists():
    with pytest.raises(ValueError, match=r"calibrate=True, but BatchNorm2d '1' has running statistics of no training"):
        converted(network(), calibrate=True)
    with pytest.raises(ValueError, match=r"calibrate=True, but GroupNorm '1' has no running statistics"):
        converted(network(lambda c: nn.GroupNorm(2, c)), layers=("group",), calibrate=True)


def test_variances_alone_are_those_of_a_training():
    """As behind a layer that has zero mean by itself."""
    model = network()
    model[4].running_var.fill_(2.0)
    assert [layer.awaits_correction for layer in kalman_layers(converted(model))] == [False, True, False]


def test_statistics_without_a_count_are_those_of_a_training(trained):
    """Checkpoints older than ``num_batches_tracked`` load as 0 batches."""
    model = copy.deepcopy(trained)
    for layer in (model[1], model[4], model[7]):
        layer.num_batches_tracked.zero_()
    assert all(layer.awaits_correction for layer in kalman_layers(converted(model)))


def test_frozen_batch_norm_counts_as_trained(trained):
    model = copy.deepcopy(trained)
    frozen = FrozenBatchNorm2d(8)
    frozen.load_state_dict(model[4].state_dict())
    model[4] = frozen
    model = converted(model).eval()
    with kn.online_statistics(model):
        found = priors(model, images(2))
    torch.testing.assert_close(found[1][1], model[4].running_var, atol=1e-6, rtol=1e-4)


def test_dead_channels(trained):
    """Running variances of exactly 0, and of 1e-5, as EfficientNet-Lite's weights have them."""
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model[3].weight[:2] = 0
        model[3].bias[:2] = 0
        model[4].running_mean[:2] = 0
        model[4].running_var[0] = 0
        model[4].running_var[1] = 1e-5
        model[0].weight[0] = 0
    expected = copy.deepcopy(model).eval()(images(2))
    model = converted(model)
    output = model(images(2))
    assert model[4].prior_scale[0] == 0
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())
    assert output.shape == expected.shape


def test_no_scale_is_too_large_for_half_precision():
    layer = kn.KalmanNorm2d(2, process_noise=False)
    prior = kn.Gaussian(torch.zeros(1, 2), torch.tensor([[1e-30, 1.0]]))
    target = kn.Gaussian(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
    _, scale = layer.correction_to(prior, target)
    assert scale.half().isfinite().all()
    torch.testing.assert_close(scale[1], torch.tensor(2.0))


def test_a_channel_that_is_not_finite_is_left_as_it_is():
    layer = kn.KalmanNorm2d(3)
    prior = kn.Gaussian(torch.zeros(1, 3), torch.ones(1, 3))
    target = kn.Gaussian(torch.tensor([[math.nan, 1.0, 1.0]]), torch.tensor([[1.0, math.inf, 2.0]]))
    shift, scale = layer.correction_to(prior, target)
    torch.testing.assert_close(shift, torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 2 / 1.01]))


def test_nothing_known_of_the_input(trained):
    """Without ``input_stats`` the first layer's prior is its running statistics, without noise."""
    model = converted(trained, input_stats=None)
    mean, var = priors(model, images(2))[0]
    assert (model[1].prior_scale < 0).all()  # nothing to correct
    before = converted(trained, input_stats=None, calibrate=False)
    torch.testing.assert_close(mean, before[1].running_mean)
    torch.testing.assert_close(var, before[1].running_var)
    description = kn.describe(model, images(2))
    assert description.rows[0].prior_from == ("its running statistics",)
    assert description.with_prior == 3
    model(images(1)).sum().backward()
    torch.testing.assert_close(model[1].process_noise.grad, torch.zeros(8))
    assert model[1].gain.grad is not None
    assert kn.describe(before, images(2)).with_prior == 2


def test_a_layer_called_twice_has_one_correction():
    torch.manual_seed(0)
    model = made_of(
        lambda self, x: self.norm(self.first(x)) + self.norm(self.second(x)),
        first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    for _ in range(30):
        model(images())
    model = converted(model)
    model.eval()
    with kn.online_statistics(model):
        model(images(2))
    first = model.norm.prior_scale.clone()
    found = []
    handle = model.norm.register_forward_pre_hook(lambda layer, args: found.append(layer.prior(args[0], 1).var[0]))
    with kn.online_statistics(model):
        model(images(2))
    handle.remove()
    torch.testing.assert_close(found[0], model.norm.running_var, rtol=1e-4, atol=1e-6)
    ratio = found[1] / found[0]
    kn.calibrate(model, images(2))  # for the mean of both calls' priors
    unscaled = found[0] / first
    expected = model.norm.running_var / (unscaled * (1 + ratio) / 2)
    torch.testing.assert_close(model.norm.prior_scale, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"stats_batch_size": 2}, {"stats_batch_size": 2, "carry": "posterior"}])
def test_statistic_groups(trained, options):
    model = converted(trained, **options).eval()
    with kn.online_statistics(model):
        found = priors(model, images(4))
    for layer, (_, scale) in zip(kalman_layers(model), corrections(model), strict=True):
        assert scale.shape == layer.running_var.shape
        assert scale.isfinite().all()
    torch.testing.assert_close(found[0][1], model[1].running_var, atol=1e-6, rtol=1e-4)


def test_state_dict_round_trip(trained):
    model = converted(trained)
    early = model.state_dict()
    assert "1.prior_scale" in early  # from the start, so that keys never change
    model(images(2))
    late = converted(trained)
    late.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_same_corrections(late, model)
    assert not any(layer.awaits_correction for layer in kalman_layers(late))
    fresh = converted(network())  # a network without a correction takes one
    fresh.load_state_dict(model.state_dict())
    assert_same_corrections(fresh, model)
    waiting = converted(network())
    waiting.load_state_dict(converted(trained).state_dict())
    assert all(layer.awaits_correction for layer in kalman_layers(waiting))
    assert_same_corrections(through_a_file(model), model)


def test_a_checkpoint_leaves_the_tensors_of_a_correction_in_place(trained):
    model = converted(trained)
    model(images(2))
    scale, state = model[4].prior_scale, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert model[4].prior_scale is scale
    for key in [key for key in state if key.startswith("4.")]:
        del state[key]
    model.load_state_dict(state, strict=False)  # of the other layers
    assert model[4].prior_scale is scale


@pytest.mark.parametrize("gain", ["prior-strength", 0.1])
def test_checkpoints_of_either_kind_load_strictly(trained, gain):
    options = {"gain": gain, "process_noise": gain != 0.1}
    model = converted(network(), **options)
    model.load_state_dict(trained.state_dict())  # of BatchNorm: running statistics that mean something
    assert all(layer.awaits_correction for layer in kalman_layers(model))
    uncorrected = converted(trained, calibrate=False, **options)
    model.load_state_dict(uncorrected.state_dict())  # of Kalman layers, without a correction
    assert not any(layer.is_corrected for layer in kalman_layers(model))
    off = converted(network(), calibrate=False, **options)
    off.load_state_dict(trained.state_dict())
    assert not any(layer.is_corrected for layer in kalman_layers(off))


def test_to_batchnorm_drops_it(trained):
    model = converted(trained)
    model(images(2))
    model.eval()
    expected = model(images(2).clone().fill_(0.3))
    plain = kn.to_batchnorm(model)
    assert not any("prior_" in key for key in plain.state_dict())
    torch.testing.assert_close(plain(images(2).clone().fill_(0.3)), expected, rtol=0, atol=0)


def test_describe_shows_it_and_changes_nothing(trained):
    model = converted(trained)
    description = kn.describe(model, images(2))
    assert all(layer.awaits_correction and (layer.prior_scale < 0).all() for layer in kalman_layers(model))
    assert "corrected" in str(description).splitlines()[0]
    model(images(2))
    scale = model[4].prior_scale
    assert description.rows[1].correction == pytest.approx(float(scale.log().mean().exp()), rel=1e-4)
    plain = kn.describe(converted(trained, calibrate=False), images(2))
    assert "corrected" not in str(plain)
    assert plain.rows[1].correction is None


def test_the_table_says_how_far_priors_were_off(trained):
    model = converted(trained, calibrate=False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "prior_" not in name}
    table = kn.calibrate(model, images(2))
    for name, buffer in before.items():
        torch.testing.assert_close(buffer, model.get_buffer(name), rtol=0, atol=0)
    assert model.training
    row, layer = table.rows[1], model[4]
    assert row.name == "4"
    assert row.source == "running statistics"
    torch.testing.assert_close(row.variance, float(layer.prior_scale.log().mean().neg().exp()), rtol=1e-4, atol=0)
    assert row.mean == pytest.approx(float((layer.prior_shift.square() / layer.running_var).mean().sqrt()), rel=1e-4)
    assert str(table).splitlines()[-1] == "3 of 3 priors corrected"


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(2, c), lambda c: nn.BatchNorm2d(c, track_running_stats=False)])
def test_without_running_statistics_by_data(norm):
    data = images(32)
    model = converted(network(norm), layers=("batch", "group"))
    table = kn.calibrate(model, data.split(16))
    assert [row.source for row in table.rows] == ["data"] * 3
    seen = []
    handle = model[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    mean, var = priors(model, data)[0]
    handle.remove()
    torch.testing.assert_close(mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(var, seen[0].var((0, 2, 3), correction=0), atol=1e-4, rtol=1e-3)


def test_data_in_place_of_running_statistics(trained):
    """Running statistics of a Kalman layer are fused ones, and so not what a prior should be."""
    data = images(32)
    model = converted(trained)
    with torch.no_grad():
        for layer in kalman_layers(model):
            layer.running_var.mul_(3)
    kn.calibrate(model, [data[:16], data[16:]], source="data")
    model.eval()
    found = priors_in_eval(model, data)
    stock, seen = copy.deepcopy(trained).train(), []
    for place in (1, 4, 7):
        stock[place].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    for part in (data[:16], data[16:]):
        stock(part)
    for i, (_, var) in enumerate(found):  # as in BatchNorm of the same batches
        together = torch.cat(seen[i::3])
        torch.testing.assert_close(var, together.var((0, 2, 3), correction=0), atol=1e-3, rtol=1e-2)


def test_dropped_statistics_correct_priors_too(trained):
    model = converted(trained, track_running_stats=False)
    table = kn.calibrate(model, images(4))
    assert [row.source for row in table.rows] == ["running statistics"] * 3
    expected = converted(trained)
    kn.calibrate(expected, images(4))
    for mine, its in zip(corrections(model), corrections(expected), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    assert not any(layer.awaits_correction for layer in kalman_layers(model))


def priors_in_eval(model, x):
    with kn.online_statistics(model):
        return priors(model, x)


def test_a_fresh_network_by_data_sees_itself_normalized():
    """Its running statistics of 0 and 1 say nothing: each layer of the pass normalizes by what it sees."""
    model = converted(network())
    with torch.no_grad():
        model[0].weight.mul_(10)
    data = images(64)
    kn.calibrate(model, data)
    stock = network()
    with torch.no_grad():
        stock[0].weight.mul_(10)
    seen = []
    stock[4].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    stock(data)
    model.eval()
    mean, var = priors_in_eval(model, data)[1]
    torch.testing.assert_close(mean, seen[0].mean((0, 2, 3)), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(var, seen[0].var((0, 2, 3), correction=0), atol=1e-3, rtol=1e-2)
    assert not any(layer.online or layer.is_observed for layer in kalman_layers(model))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda model: kn.calibrate(nn.Linear(1, 1)), ValueError, "no Kalman layer whose prior could be corrected"),
        (lambda model: kn.calibrate(model, images(), source="both"), ValueError, "expected 'running' or 'data'"),
        (kn.calibrate, ValueError, "no Kalman layer with running statistics of a training"),
        (lambda model: kn.calibrate(model, []), ValueError, "empty loader"),
        (lambda model: kn.calibrate(model, ["text"]), TypeError, "gave a batch of type str"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call(converted(network()))


def test_a_correction_that_is_loaded_in_inference_mode_can_be_trained_with(trained):
    model, other = converted(trained), converted(trained, calibrate=False)
    model(images(2))
    with torch.inference_mode():
        other.load_state_dict(model.state_dict())
    other(images(2)).square().sum().backward()
    assert torch.equal(other[4].prior_scale, model[4].prior_scale)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_fills_a_fresh_network(trained, tmp_path):
    """torch.distributed.checkpoint reads the keys that a network has."""
    model, fresh = converted(trained), converted(network())
    model(images(2))
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    state = fresh.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state)
    x = images(2)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert_same_corrections(fresh, model)


def test_a_whole_state_dict_of_batchnorm_corrects_priors(trained):
    """torch.distributed adds what a checkpoint lacks, from the network itself: the correction, or all of a layer."""
    model, fresh = converted(trained), converted(network())
    x, whole = images(2), {"full_state_dict": True}
    set_model_state_dict(fresh, trained.state_dict(), options=StateDictOptions(**whole))
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert_same_corrections(fresh, model)
    set_model_state_dict(fresh, {"6.bias": torch.ones(4)}, options=StateDictOptions(**whole, strict=False))
    assert_same_corrections(fresh, model)
    assert torch.equal(fresh[6].bias, torch.ones(4))


def test_batchnorms_state_merged_into_the_networks_own_corrects_priors(trained):
    model, fresh = converted(trained), converted(network())
    x, merged = images(2), fresh.state_dict()
    merged.update(trained.state_dict())
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert_same_corrections(fresh, model)
    merged = fresh.state_dict()  # and its own state, of which a part is other, keeps them
    merged["6.bias"] = torch.ones(4)
    fresh.load_state_dict(merged)
    assert_same_corrections(fresh, model)


def swap(model, other):
    """As Lightning's averages of weights do: torch does not count a write through ``.data``."""
    for one, two in zip([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()], strict=True):
        kept = one.data.clone()
        one.data.copy_(two.data)
        two.data.copy_(kept)


def test_weights_that_are_swapped_for_a_validation_leave_the_correction_to_training(trained):
    model, expected = converted(trained), converted(trained)
    average, x = copy.deepcopy(model), images(2)
    model.eval()
    swap(model, average)
    with torch.no_grad(), kn.online_statistics(model):
        model(images(4))
    swap(model, average)
    torch.testing.assert_close(model.train()(x), expected(x), rtol=0, atol=0)
    assert_same_corrections(model, expected)


def test_a_fresh_networks_checkpoint_drops_a_correction(trained):
    model, fresh = converted(trained), converted(network())
    model.load_state_dict(fresh.state_dict())
    x = images(2)
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)


def loss_with(weights, buffers, model, x):
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    return torch.func.functional_call(model, (weights, copies), (x,)).square().sum()


@pytest.mark.parametrize("stats", [INPUT_STATS, None])
def test_inside_of_torch_func_it_is_as_the_given_buffers_say(trained, stats):
    """Of a network that has found its corrections, with the buffers from before; and the other way round."""
    model, x = converted(trained, input_stats=stats), images(2)
    weights, waiting = dict(model.named_parameters()), {k: b.clone() for k, b in model.named_buffers()}
    model(x)
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for buffers in (waiting, found):
        expected = loss_with(weights, buffers, copy.deepcopy(model), x)
        for other in (model, converted(trained, input_stats=stats), converted(network(), input_stats=stats)):
            _, value = torch.func.grad_and_value(loss_with)(weights, buffers, other, x)
            torch.testing.assert_close(value, expected)


def test_buffers_in_the_memory_of_earlier_ones_are_read_too(trained):
    """Each call's buffers are gone after it: the next ones may have their place and their count of changes."""
    model, x = converted(trained), images(2)
    model(x)
    weights, found = dict(model.named_parameters()), dict(model.named_buffers())
    plain = {name: torch.full_like(b, "scale" in name) if "prior" in name else b for name, b in found.items()}
    expected = [loss_with(weights, buffers, copy.deepcopy(model), x).item() for buffers in (plain, found)]
    for _ in range(100):
        values = [loss_with(weights, buffers, model, x).item() for buffers in (plain, found)]
        assert values == pytest.approx(expected)


def test_inside_of_torch_func_layers_without_running_statistics_are_as_the_given_buffers_say():
    model, fresh = (converted(network(lambda c: nn.GroupNorm(2, c)), layers=("group",)) for _ in range(2))
    kn.calibrate(model, images(8))
    weights, buffers, x = dict(model.named_parameters()), dict(model.named_buffers()), images(2)
    expected = model(x).square().sum()
    _, value = torch.func.grad_and_value(loss_with)(weights, buffers, fresh, x)
    torch.testing.assert_close(value, expected)
    both = {name: torch.stack([buffer, buffer]) for name, buffer in buffers.items()}
    values = torch.vmap(loss_with, (None, 0, None, None))(weights, both, fresh, x)
    torch.testing.assert_close(values, torch.stack([expected, expected]))


@pytest.mark.parametrize("change", ["drop_running_stats", "reset_running_stats"])
def test_a_correction_is_looked_at_before_its_target_goes(trained, change):
    """One call with found buffers says that nothing is awaited; the layers' own buffers still wait."""
    model, found = converted(trained), converted(trained)
    x = images(2)
    found(x)
    torch.func.functional_call(model, {k: b.clone() for k, b in found.named_buffers()}, (x,))
    for layer in kalman_layers(model):
        getattr(layer, change)()
        assert layer.awaits_correction
        assert layer.dropped_statistics is not None


def test_a_replica_of_data_parallel_does_not_read_its_copies_of_buffers(trained, monkeypatch):
    model = converted(trained)
    model(images(2))
    for layer in kalman_layers(model):
        layer.__dict__["_is_replica"] = True
        layer.prior_shift, layer.prior_scale = layer.prior_shift.clone(), layer.prior_scale.clone()
        monkeypatch.setattr(layer, "_read_correction", lambda: pytest.fail("read"))
    model(images(2))


def test_an_exported_training_that_still_waits_has_gradients(trained):
    x = images(2)
    exported = torch.export.export(converted(trained).train(), (x,)).module()
    for _ in range(2):
        exported(x).square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in exported.parameters())


def test_averages_of_a_fresh_network_correct_nothing():
    model = converted(network())
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda old, new, _: 0.7 * old + 0.3 * new, use_buffers=True
    )
    for _ in range(20):
        average.update_parameters(model)
    average(images(2))
    assert not any(layer.is_corrected for layer in kalman_layers(average.module))


def test_layers_that_use_no_prior_have_no_row(trained):
    model = converted(trained)
    kn.freeze(model[1])
    model[4] = kn.KalmanNorm2d(8, gain=1.0)
    assert [row.name for row in kn.calibrate(kn.connect(model), images(2)).rows] == ["7"]


def test_empty_batches_and_constant_channels_count_for_nothing():
    model = converted(network())
    rows = kn.calibrate(model, [images(0), images(4)], source="data", progress=False).rows
    assert all(math.isfinite(row.variance) and math.isfinite(row.mean) for row in rows)
    assert scales(model).isfinite().all()
    rows = kn.calibrate(model, torch.zeros(4, 3, 12, 12), source="data").rows
    assert {row.reason for row in rows} == {"all of its channels are constant"}


def test_an_error_leaves_flags_as_they_were(trained):
    model = converted(trained)
    with pytest.raises(ValueError, match=r"expected \(N, 3"):
        kn.calibrate(model, torch.randn(2, 5, 12, 12))
    assert model.training
    assert not any(layer.online or layer.is_observed for layer in kalman_layers(model))
    assert not any(hook for layer in kalman_layers(model) for hook in layer._forward_pre_hooks)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_a_checkpointed_region_fills_it_once(trained):
    plain, model = converted(trained), kn.convert(Checkpointed(copy.deepcopy(trained)), input_stats=INPUT_STATS)
    x = images(2)
    for each in (plain, model):
        each(x).square().sum().backward()
    assert_same_corrections(model, plain)
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_compiled(trained):
    plain, model = converted(trained), converted(trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images(2)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), plain(x))
    assert_same_corrections(model, plain)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)


def test_functional_call_derives_it_each_time(trained):
    model = converted(trained).eval()
    parameters = dict(model.named_parameters())
    x = images(2)

    def loss(parameters):
        with kn.online_statistics(model):
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    assert all(layer.awaits_correction for layer in kalman_layers(model))
    loss(parameters).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_an_average_of_weights_takes_it_along(trained):
    model = converted(trained)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(images(2))
    average.update_parameters(model)
    average.module.eval()
    with kn.online_statistics(average.module):
        average(images(2))
    assert_same_corrections(average.module, model)


def test_reset_parameters_forgets_it(trained):
    model = converted(trained)
    model(images(2))
    model[1].reset_parameters()
    assert not model[1].is_corrected
    assert torch.equal(model[1].prior_scale, torch.ones(8))


def one_at_a_time(model, **options):
    return converted(model, track_running_stats=False, **options).eval()


def test_describe_leaves_statistics_that_are_still_to_correct(trained):
    model, x = one_at_a_time(trained), images(2)
    expected = copy.deepcopy(model)(x)
    kn.describe(model, x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("data", [None, images(2)], ids=["at the next call", "by a pass"])
def test_calibrate_a_network_whose_running_statistics_are_dropped(trained, data):
    model, tracking, x = one_at_a_time(trained), converted(trained), images(2)
    table = kn.calibrate(model, data)
    assert [row.source for row in table.rows] == ["running statistics"] * 3
    assert "nan" not in str(table)
    model(x)
    with kn.online_statistics(tracking.eval()):
        tracking(x)
    for (shift, scale), (its_shift, its_scale) in zip(corrections(model)[:1], corrections(tracking)[:1], strict=True):
        torch.testing.assert_close(shift, its_shift)
        torch.testing.assert_close(scale, its_scale)


def test_a_batchnorm_checkpoint_loads_where_running_statistics_are_dropped(trained):
    model, x = one_at_a_time(network()), images(2)
    model.load_state_dict(trained.state_dict())
    torch.testing.assert_close(model(x), one_at_a_time(trained)(x))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**trained.state_dict(), "1.other": torch.zeros(1)})


def test_running_statistics_that_are_taken_away_correct_nothing(trained):
    """As `torch.func.replace_all_batch_norm_modules_` and test-time adaptation do, before any call."""
    model, late, x = converted(trained), converted(trained), images(2)
    late(x)
    for each in (model, late):
        torch.func.replace_all_batch_norm_modules_(each)
        each.eval()
    late(x)  # is corrected already: a warning would be an error here
    with pytest.warns(UserWarning, match="'1' lost its running statistics before they corrected its prior"):
        model(x)
    assert not any(layer.is_corrected for layer in model if isinstance(layer, kn.KalmanNorm))
    model(x)
    for _, layer in kn.traversal.kalman_layers(late):
        layer.drop_correction()
    torch.testing.assert_close(model(x), late(x))


def test_a_checkpoint_that_waits_says_so_where_nothing_can_correct(trained):
    waiting = one_at_a_time(trained).state_dict()
    fresh = one_at_a_time(network())
    with pytest.warns(UserWarning, match=r"KalmanNorm2d '1' loads a checkpoint .* before its prior was corrected"):
        fresh.load_state_dict(waiting)
    assert not fresh[1].is_corrected


@pytest.mark.parametrize("of_kalman", [True, False])
def test_parameters_alone_leave_a_correction_as_it_is(trained, of_kalman):
    model, x = converted(trained), images(2)
    model(x)
    before = copy.deepcopy(model)
    source = model if of_kalman else trained
    model.load_state_dict({name: each.detach() for name, each in source.named_parameters()}, strict=False)
    assert_same_corrections(model, before)


def test_an_average_of_buffers_that_began_too_early_is_no_correction(trained):
    """An average of the whole state_dict, as timm has it, moves from what waits to the correction."""
    model, x = one_at_a_time(trained), images(2)
    average = copy.deepcopy(model)
    model(x)
    with torch.no_grad():
        for _ in range(1000):
            for mine, its in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mine.lerp_(its, 0.001)
    torch.testing.assert_close(average(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_error_leaves_corrections_as_they_were(trained):
    model = one_at_a_time(trained)
    model(images(2))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"expected \(N, 3"):
        kn.calibrate(model, [images(2), torch.randn(2, 5, 12, 12)], source="data", progress=False)
    assert_same_corrections(model, before)


@torch.no_grad()
def test_shapes_on_the_meta_device(trained):
    model = one_at_a_time(trained).to("meta")
    assert model(images(2).to("meta")).shape == (2, 4, 6, 6)


def test_random_depth_asks_for_a_correction_in_eval(trained):
    """Else the correction would be of the blocks that the first step keeps."""
    model = nn.Sequential(copy.deepcopy(trained), StochasticDepth(0.2, "row"))
    with pytest.warns(UserWarning, match=r"StochasticDepth '1' drops its input at random .* kalmannorm.calibrate"):
        converted(model)
    model[1].p = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(model)
        converted(nn.Sequential(network(), StochasticDepth(0.2, "row")))  # nothing to correct
    of_transformers = type("SwiftFormerDropPath", (StochasticDepth,), {})
    with pytest.warns(UserWarning, match="SwiftFormerDropPath '1' drops its input at random"):
        converted(nn.Sequential(copy.deepcopy(trained), of_transformers(0.2, "row")))


def test_a_network_that_was_only_tried_is_not_pretrained():
    """One call moves running statistics a tenth of the way from zeros and ones."""
    model = network()
    model(images())
    with pytest.warns(UserWarning, match=r"'1' has running statistics of 1 batches, which are mostly their initial"):
        converted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(model, calibrate=False)


# -- a correction that is awaited, and what happens before or beside it ----------------------------


def scales(model):
    return torch.cat([scale for _, scale in corrections(model)])


def by_functional_call(model, x, of=None):
    of = of or model
    tensors = {name: t.detach().clone() for name, t in (*of.named_parameters(), *of.named_buffers())}
    torch.func.functional_call(model, tensors, (x,))


def restored_afterwards(model, x):
    """As a search for a rate does, say, or a count of operations."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(x)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(saved[name])


def with_an_infinite_pixel(model, x):
    x = x.clone()
    x[0, 0, 0, 0] = math.inf
    model(x)


def update_bn(model, x):
    torch.optim.swa_utils.update_bn([x, x], model)


def averaged(model, x):
    """Long after the average was begun."""
    with torch.no_grad():
        for _, scale in corrections(model):
            scale.mul_(0.99**1000).add_(1.2)


def by_a_found_one_for_one_call(model, x):
    other = copy.deepcopy(model)
    kn.calibrate(other, x)
    other(x)
    by_functional_call(model, x, of=other)


@pytest.fixture
def a_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}], ids=["tracks", "drops"])
def test_a_correction_for_one_call_is_not_the_layers_own(trained, options):
    model, x = converted(trained, **options), images()
    by_a_found_one_for_one_call(model, x)
    other = converted(trained, **options)
    assert torch.equal(model(x), other(x))
    assert_same_corrections(model, other)


def calibrated_where_one_has_no_data(rank, has_data):
    model = kn.convert(network(), input_stats=INPUT_STATS)
    data = [images()] if rank == has_data else []
    group = torch.distributed.group.WORLD
    table = kn.calibrate(model, data, source="data", progress=False, process_group=group)
    return scales(model), [row.source for row in table.rows]


def calibrated_in_each_way(rank):
    return [*(calibrated_where_one_has_no_data(rank, has_data) for has_data in range(2)), calibrated_by_two(rank)]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Of each way what the first process and what the second one found."""
    return list(zip(*in_two_processes(calibrated_in_each_way, tmp_path_factory.mktemp("by_two")), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("has_data", [0, 1])
def test_a_process_without_data_gets_the_corrections_of_the_other(has_data, by_two):
    first, second = by_two[has_data]
    assert torch.equal(first[0], second[0])
    assert (first[0] != 1).all()
    assert first[1] == second[1] == ["data"] * 3


@pytest.mark.usefixtures("a_process_group")
@pytest.mark.parametrize("before", [by_a_found_one_for_one_call, restored_afterwards], ids=lambda it: it.__name__)
def test_with_a_process_group_too(trained, before):
    test_the_first_call_that_can_finds_the_correction(trained, before)


@pytest.mark.parametrize(
    "before", [by_functional_call, by_a_found_one_for_one_call, restored_afterwards, with_an_infinite_pixel, update_bn,
               averaged],
    ids=lambda before: before.__name__,
)  # fmt: skip
def test_the_first_call_that_can_finds_the_correction(trained, before):
    model, x = converted(trained), images()
    model(x)
    expected = scales(model)
    model = converted(trained)
    before(model, x)
    assert torch.isfinite(model(x)).all()
    torch.testing.assert_close(scales(model), expected)
    assert not any(layer.awaits_correction for layer in kalman_layers(model))


def test_a_correction_that_was_found_stays_where_tensors_take_its_place(trained):
    model, x = converted(trained), images()
    model(x)
    expected = scales(model)
    by_functional_call(model, x)
    model(x)
    torch.testing.assert_close(scales(model), expected, rtol=0, atol=0)


def test_in_a_transform_a_correction_that_was_found_is_used_as_it_is(trained):
    model, x = converted(trained), images(2)
    model(x)
    model.eval()
    with torch.no_grad():
        model[3].weight.mul_(2)
    state = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    with kn.online_statistics(model):
        y, _ = torch.func.vjp(lambda x: torch.func.functional_call(model, state, (x,)), x)
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_calibrated_after_running_statistics_were_reset(trained):
    model, other, x = converted(trained), converted(trained), images()
    for layer in kalman_layers(model):
        layer.reset_running_stats()
    kn.calibrate(model, x)
    kn.calibrate(other, x)
    assert_same_corrections(model[:2], other[:2])  # those above see what a reset layer gives in eval()


@pytest.mark.parametrize("data", [(), ([images()],)], ids=["at the next call", "from data"])
def test_calibrated_in_inference_mode_it_trains(trained, data):
    model = converted(trained)
    with torch.inference_mode():
        kn.calibrate(model, *data, progress=False)
    model(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_that_eval_leaves_out_keeps_its_correction():
    def forward(self, x):
        x = self.body(x)
        return self.head(x) if self.training else x

    model = made_of(forward, body=network()[:5], head=network()[3:5])
    for _ in range(30):
        model(images())
    kn.convert(model, input_stats=INPUT_STATS)(images())
    before = model.head[1].prior_scale
    row = kn.calibrate(model, images(), source="data").rows[-1]
    assert (row.source, row.reason) == ("", "it was not called, and stays as it was")
    assert model.head[1].prior_scale is before
    assert not model.head[1].awaits_correction


def test_a_copy_that_is_made_in_inference_mode_knows_its_correction(trained):
    """torch counts no changes of its tensors."""
    model, x = converted(trained), images(2)
    model(x)
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_the_correction_of_a_half_precision_network_is_float32(trained):
    model = converted(copy.deepcopy(trained).half())
    model(images(2).half())
    for buffer in (buffer for both in corrections(model) for buffer in both):
        assert buffer.dtype == torch.float32


@pytest.mark.parametrize("find", [nn.Module.__call__, kn.calibrate], ids=["by a call", "by calibrate"])
def test_a_target_is_forgotten_once_a_correction_has_led_to_it(trained, find):
    model = converted(trained, track_running_stats=False)
    find(model, images())
    assert kn.calibrate(model, images()).rows[0].source == "data"


def test_a_correction_that_is_loaded_takes_the_place_of_one_that_was_awaited(trained):
    model, found = (converted(trained, track_running_stats=False) for _ in range(2))
    found(images())
    model.load_state_dict(found.state_dict())
    assert kn.calibrate(model, images()).rows[0].source == "data"


def test_a_checkpoint_of_a_kalman_layer_without_a_correction_asks_for_none(trained):
    model = converted(trained)
    state = {key: tensor for key, tensor in model.state_dict().items() if "prior_s" not in key}
    assert any(key.endswith("gain") for key in state)
    model.load_state_dict(state)
    assert not any(layer.is_corrected for layer in kalman_layers(model))


def test_a_checkpoint_of_a_fresh_batchnorm_network_drops_a_correction(trained):
    model = converted(trained)
    model(images())
    model.load_state_dict(network().state_dict())
    assert not any(layer.is_corrected for layer in kalman_layers(model))


def test_a_target_does_not_move_with_the_network_that_it_was_loaded_from(trained):
    model, other = (converted(network(), track_running_stats=False) for _ in range(2))
    source, x = copy.deepcopy(trained), images()
    model.load_state_dict(source.state_dict())
    other.load_state_dict(source.state_dict())
    other(x)
    for layer in (source[1], source[4], source[7]):
        layer.reset_running_stats()
    model(x)
    assert_same_corrections(model, other)


def test_a_checkpoint_that_waits_loads_on_the_meta_device_without_a_word(trained):
    """The values that could correct it come later."""
    model = converted(trained).to("meta")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.load_state_dict(converted(trained).state_dict())
    assert not any("its prior stays uncorrected" in str(warning.message) for warning in seen)


def test_a_shift_alone_is_a_correction(trained):
    model = converted(trained, calibrate=False)
    state = copy.deepcopy(model.state_dict())
    state["1.prior_shift"] += 1
    model.load_state_dict(state)
    assert [layer.is_corrected for layer in kalman_layers(model)] == [True, False, False]


def test_running_statistics_become_the_prior_of_a_layer_that_has_none(trained):
    model = converted(trained, calibrate=False, input_stats=None)
    row = kn.calibrate(model, images()).rows[0]
    assert (row.source, row.reason[:21]) == ("running statistics", "which are its prior: ")
    assert [layer.is_corrected for layer in kalman_layers(model)] == [True] * 3
    prior, _ = priors(model, images())[0]
    torch.testing.assert_close(prior, trained[1].running_mean)


def test_a_layer_whose_prior_was_lost_loses_its_correction():
    model = converted(network(lambda channels: nn.GroupNorm(2, channels)), layers="group")
    kn.calibrate(model, images(), source="data")
    assert model[4].is_corrected
    model[2] = made_of(lambda self, x: torch.cumsum(x, 2))
    assert kn.calibrate(model, images(), source="data").rows[1].source == ""
    assert not model[4].is_corrected


def test_statistics_of_no_counted_batch_or_of_a_plain_mean_are_converted_without_a_word(trained):
    uncounted, plain = copy.deepcopy(trained), network(lambda channels: nn.BatchNorm2d(channels, momentum=None))
    for layer in (uncounted[1], uncounted[4], uncounted[7]):
        layer.num_batches_tracked.zero_()
    plain(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(converted(model)[1].awaits_correction for model in (uncounted, plain))


def test_a_single_input_has_no_progress_bar(trained, monkeypatch):
    shown = []
    monkeypatch.setattr(passes, "_progress_bar", shown.append)
    kn.calibrate(converted(trained), images())
    assert shown == []
    kn.calibrate(converted(trained), [images()])
    assert shown == ["calibrate"]


def spread():
    """A network and two batches of other sizes."""
    model = converted(network())
    x = images()
    return model, [x[:6], x[6:, :, 1:, 1:]]


def calibrated_by_two(rank):
    model, batches = spread()
    kn.calibrate(model, batches[rank], source="data", process_group=dist.group.WORLD, progress=False)
    return [tensor for both in corrections(model) for tensor in both]


@pytest.mark.slow
def test_two_processes_get_the_corrections_of_all_data(by_two):
    """The same to the bit. Above the first layer, each sees what its own batch makes of the network."""
    first, second = by_two[-1]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone, batches = spread()
    kn.calibrate(alone, batches, source="data", progress=False)
    torch.testing.assert_close(first[:2], [*corrections(alone)[0]], rtol=1e-4, atol=1e-5)
