"""The table of methods: each goes into a network by its name, and by groups where it can."""

import copy

import fake_cuda
import pytest
import torch
from torch import nn

import kalmannorm as kn
from kalmannorm import GroupKalmanNorm, KalmanNorm
from kalmannorm.lab.baselines.moving_average import MovingAverageNorm
from kalmannorm.lab.baselines.renorm import BatchRenorm, RenormSchedule
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.models.small import SmallConvNet


def small():
    return SmallConvNet(((8, 2), (16, 2)))


def test_every_baseline_and_every_filter_is_there():
    baselines = ["bn", "brn", "gn", "ln", "in", "wn", "frozen", "ghost", "sync", "mabn", "cbn", "evonorm", "frn"]
    assert list(METHODS) == [*baselines, "kn", "kn-paper", "kn-released", "gkn"]
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert len({method.colour for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.statistics == "groups"])
def test_groups_do_not_see_each_other(method):
    network = normalize(small(), method, statistics_batch=2)
    images = torch.randn(6, 1, 16, 16)
    changed = torch.cat([images[:2], torch.randn(4, 1, 16, 16)])
    logits = []
    for batch in (images, changed):
        torch.manual_seed(1)  # for methods that draw
        logits.append(copy.deepcopy(network)(batch))
    assert torch.allclose(logits[0][:2], logits[1][:2], atol=1e-6)
    assert not torch.allclose(logits[0][2:], logits[1][2:], atol=1e-3)


@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.capturable and name != "sync"])
def test_what_is_capturable_is_captured(method, monkeypatch):
    fake_cuda.install(monkeypatch)
    torch.manual_seed(0)
    plain = normalize(small(), method, statistics_batch=2, steps=100).train()
    captured = kn.capture(copy.deepcopy(plain), warm_up=1)
    for _ in range(3):
        images, losses = torch.randn(4, 1, 16, 16), []
        for model in (plain, captured):
            torch.manual_seed(1)  # for methods that draw
            loss = model(images).square().mean()
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    assert len(captured.forward.graphs) == 1


def test_batchnorm_stays_what_it_is_without_groups():
    assert type(normalize(small(), "bn").norms[0]) is nn.BatchNorm2d
    ghost = normalize(small(), "bn", statistics_batch=4).norms[0]
    assert isinstance(ghost, KalmanNorm)
    assert (ghost.gain, ghost.stats_batch_size) == (1.0, 4)
    converted = normalize(small(), "kn")
    assert normalize(converted, "bn", statistics_batch=2).norms[0].stats_batch_size is None


def test_options_go_to_the_method_and_before_what_follows_from_others():
    layer = normalize(small(), "kn", statistics_batch=2, gain=0.1, stats_batch_size=4).norms[0]
    assert (layer.gain, layer.stats_batch_size) == (0.1, 4)
    paper = normalize(small(), "kn-paper", estimator="exact").norms[0]
    assert (paper.carry, paper.estimator) == ("posterior", "exact")
    group = normalize(small(), "gkn", statistics_batch=2, groups=2, gain=0.5).norms[0]
    assert isinstance(group, GroupKalmanNorm)
    assert (group.num_groups, group.gain) == (2, 0.5)
    assert [normalize(small(), key).norms[1].num_groups for key in ("gn", "gkn")] == [16, 16]
    # As they come from a file.
    assert normalize(small(), "brn", schedule=[3, 5], steps=100).norms[0].schedule == (3, 5)
    assert normalize(small(), "brn", schedule={"start": 7}).norms[0].schedule == RenormSchedule(start=7)


def test_schedules_follow_the_length_of_the_training():
    def layer(method, steps):
        return normalize(small(), method, steps=steps).norms[0]

    assert isinstance(layer("brn", 1300), BatchRenorm)
    assert layer("brn", 13_000).schedule == RenormSchedule().scaled(0.1)
    assert layer("brn", 1300).schedule == RenormSchedule().scaled(0.01).delayed(80.0)
    assert layer("brn", 10**6).schedule == layer("brn", None).schedule == RenormSchedule()
    # The averages are quicker in a short training, but no quicker than BatchNorm's.
    momenta = [layer("brn", steps).momentum for steps in (10**6, 3000, 600, 100)]
    assert momenta == pytest.approx([0.01, 0.01, 0.05, 0.1])
    assert isinstance(layer("mabn", 100), MovingAverageNorm)
    assert (layer("mabn", 100).warmup, layer("mabn", 100).renorm_start) == (5, 10)
    assert (layer("mabn", 10**6).warmup, layer("mabn", 10**6).renorm_start) == (100, 1000)
    assert (layer("cbn", 12).burn_in, layer("cbn", 12).window) == (8, 4)


@pytest.mark.parametrize("steps", [100, 390, 1300, 13_000, 10**6])
def test_batch_renorm_has_forgotten_its_start_when_it_begins_to_correct(steps):
    layer = normalize(small(), "brn", steps=steps).norms[0]
    assert (1 - layer.momentum) ** layer.schedule.start < 0.05


@pytest.mark.parametrize("method", ["bn", "gn", "mabn", "evonorm", "frn", "kn", "kn-paper", "gkn"])
def test_standardized_filters_with_any_method(method):
    options = {"groups": 4} if method == "evonorm" else {"centralized": False} if method == "mabn" else {}
    network = normalize(small(), method, statistics_batch=2, weight_standardization=True, **options)
    network(torch.randn(4, 1, 16, 16)).square().sum().backward()
    filters = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert [type(layer).__name__ for layer in filters] == ["StandardizedConv2d"] * 2
    assert all(layer.weight.grad.abs().sum() > 0 for layer in filters)


def test_standardized_filters_and_a_proxy_together():
    options = {"groups": 4, "weight_standardization": True, "proxy": True}
    network, again = (normalize(small(), "gn", **options) for _ in range(2))
    kinds = [type(layer).__name__ for layer in network.modules()]
    assert (kinds.count("ProxyNormalized"), kinds.count("StandardizedConv2d")) == (2, 2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.5, 0.1)
    network(torch.randn(4, 1, 16, 16)).sum().backward()
    again.load_state_dict(network.state_dict())
    images = torch.randn(4, 1, 16, 16)
    assert torch.equal(again.eval()(images), network.eval()(images))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("batchnorm", {}, "must be one of bn, brn, .*gkn; got 'batchnorm'"),
        ("kn", {"statistics_batch": 0}, "statistics_batch must be at least 1; got 0"),
        ("gn", {"gruops": 2}, "'gn' does not take these options: .*gruops"),
        ("kn", {"gian": 2}, "got option 'gian'"),
        ("wn", {"weight_standardization": True}, "'wn' normalizes weights by itself"),
    ],
)
def test_bad_requests_say_what_was_wrong(method, options, message):
    with pytest.raises(ValueError, match=message):
        normalize(small(), method, **options)


def test_constant_priors_take_no_gradient_to_the_filters():
    gradients = []
    for constant in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        normalize(network, "kn", constant_priors=constant, gain=1e-6)  # all of the statistics are the prior
        output = network(torch.randn(2, 3, 8, 8))
        network[3].weight.grad = None
        output[:, 0].square().sum().backward()
        gradients.append((output, network[3].weight.grad[0]))
    (free, by_prior), (fixed, by_input) = gradients
    assert torch.equal(free, fixed)
    # A filter's scale changes nothing where the prior follows it.
    filters = network[3].weight[0]
    assert (by_prior * filters).sum().abs() < 0.1 * (by_input * filters).sum().abs()
