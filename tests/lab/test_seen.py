"""What is seen of the layers is what they compute, and looking changes nothing."""

import copy

import pytest
import torch
from torch import nn

import kalmannorm as kn
from kalmannorm.functional import kalman_update
from kalmannorm.lab.seen import calls_of, statistics_batches, watched


def network(**options):
    """Two layers; the second's prior is that of ``2 x + 1`` of the first's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), Line(), nn.BatchNorm2d(3), nn.Dropout()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5)
    return kn.convert(model, input_stats=([0.5, 1.0, -1.0], [1.0, 2.0, 3.0]), **options) if options else model


class Line(nn.Module):
    def forward(self, x):
        return 2 * x + 1


def fused(mean, var):
    """Of the first layer at a gain of 0.25: its prior and posterior, each with a mean and a variance."""
    prior_mean, prior_var = torch.tensor([0.5, 1, -1]).double(), 1.01 * torch.tensor([1.0, 4, 9]).double()
    spread = 0.75 * 0.25 * (mean - prior_mean) ** 2
    posterior = 0.75 * prior_mean + 0.25 * mean, 0.75 * prior_var + 0.25 * var + spread
    return (prior_mean.expand_as(mean), prior_var.expand_as(mean)), posterior


def inputs(count=4):
    return 2 + 3 * torch.randn(count, 3, 5, 5, dtype=torch.float64)


def test_prior_observation_and_posterior_by_hand():
    model = network(gain=0.25, stats_batch_size=2)
    x = inputs()
    with watched(model) as seen:
        model(x)
    first, second = seen
    assert (first.layer, second.layer, first.samples) == ("0", "2", 2)
    groups = x.view(2, 2, 3, 5, 5)
    mean, var = groups.mean((1, 3, 4)), groups.var((1, 3, 4), correction=0)
    torch.testing.assert_close(first.observation.mean, mean)
    torch.testing.assert_close(first.observation.var, var)
    prior, (fused_mean, fused_var) = fused(mean, var)
    torch.testing.assert_close((first.prior.mean, first.prior.var), prior)
    torch.testing.assert_close((first.posterior.mean, first.posterior.var), (fused_mean, fused_var))
    # What leaves the first layer is believed to be normalized.
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    torch.testing.assert_close(second.prior.mean, (2 * bias + 1).expand(2, 3))
    torch.testing.assert_close(second.prior.var, 1.01 * 4 * weight**2 * fused_var / (fused_var + 1e-5))
    y = (groups - fused_mean[:, None, :, None, None]) * (fused_var[:, None, :, None, None] + 1e-5).rsqrt()
    y = 2 * (y * weight.view(3, 1, 1) + bias.view(3, 1, 1)) + 1
    torch.testing.assert_close(second.observation.var, y.var((1, 3, 4), correction=0))


@pytest.mark.parametrize("options", [{"gain": "prior-strength"}, kn.preset("paper"), kn.preset("released")])
def test_the_posterior_is_fused_of_the_prior_and_observation_shown(options):
    # Monte-Carlo draws too: the layer uses those that were shown.
    model = network(**options)
    with watched(model) as seen:
        model(inputs())
    for call, layer in zip(seen, (model[0], model[2]), strict=True):
        expected = kalman_update(
            call.prior, call.observation, layer.kalman_gain(4), spread=layer.spread, guard=layer.guard
        )
        torch.testing.assert_close(call.posterior.mean, expected.mean)
        torch.testing.assert_close(call.posterior.var, expected.var)


@pytest.mark.parametrize("options", [{}, {"gain": 1.0}])
def test_without_a_prior_a_layer_is_normalized_by_what_it_observes(options):
    model, x = network(**options), inputs()
    with watched(model) as seen:
        y = model(x)
    assert [call.prior for call in seen] == [None, None]
    torch.testing.assert_close(seen[0].posterior.mean, seen[0].observation.mean)
    torch.testing.assert_close(seen[0].posterior.var[0], x.var((0, 2, 3), correction=0))
    # The second layer gets a batch normalized by its own moments, and no dropout follows.
    expected = network(**options).train()[:3](x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("error", [False, True])
def test_looking_leaves_flags_buffers_hooks_and_random_numbers(error):
    model = network(**kn.preset("paper"))
    model[2].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt) if error else watched(model), watched(model):
        model(x)
        if error:
            raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].online
    assert "collect" not in vars(model[0])
    seen_by = [hook for layer in (model[0], model[2]) for hook in layer._forward_pre_hooks.values()]
    assert not any("Watcher" in type(getattr(hook, "__self__", None)).__name__ for hook in seen_by)


def test_frozen_layers_and_empty_batches_are_not_seen():
    model = network(gain=0.5)
    kn.freeze(model[0])
    with watched(model) as seen:
        model(inputs())
        model(inputs(0))
    assert [call.layer for call in seen] == ["2"]


def test_calls_are_sorted_by_layer_and_batches_may_be_tuples():
    model = network(gain=0.5)
    calls = calls_of(model, [(inputs(2), "label"), inputs(3)])
    assert {name: [call.samples for call in of] for name, of in calls.items()} == {"0": [2, 3], "2": [2, 3]}
    with pytest.raises(ValueError, match="Sequential saw no batch"):
        calls_of(model, [])
    with pytest.raises(ValueError, match="no KalmanNorm and no BatchNorm"):
        calls_of(nn.Sequential(nn.GroupNorm(1, 3)), [inputs()])


def test_statistics_batches_are_full():
    loader = [(torch.arange(7), None), (torch.arange(2), None)]
    assert [part.tolist() for part in statistics_batches(loader, 3)] == [[0, 1, 2], [3, 4, 5]]
