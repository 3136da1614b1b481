"""The analyses against numbers computed by hand in float64, of what is seen."""

import pytest
import torch
from test_seen import inputs, network
from torch import nn

import kalmannorm as kn
from kalmannorm.lab.analysis import PriorError, prior_errors, variance_gaps
from kalmannorm.lab.seen import calls_of, watched


@pytest.mark.parametrize("options", [{}, {"gain": 0.25, "stats_batch_size": 2}], ids=["BatchNorm", "Kalman"])
def test_gaps_are_between_what_normalized_each_batch_and_the_running_variance(options):
    model, batches = network(**options), [inputs(2), inputs(4)]
    model[0].running_var.copy_(torch.tensor([1.0, 9.0, 20.0]))
    gaps = variance_gaps(model, [(batch, "label") for batch in batches])
    assert list(gaps) == ["0", "2"]
    for name, calls in calls_of(model, batches).items():
        var = torch.cat([call.posterior.var for call in calls])
        torch.testing.assert_close(gaps[name], (var - model.get_submodule(name).running_var).abs())


def test_layers_without_a_moving_variance_have_no_gap():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)).double()
    assert list(variance_gaps(model, [inputs()])) == ["0"]


def errors_by_hand(mean, var, of_mean, of_var, eps=1e-5):
    ratio = torch.log((var + eps) / (of_var + eps))
    squares = (mean - of_mean) ** 2 / (of_var + eps)
    return float(squares.mean()), float(ratio.mean()), float((ratio**2).mean() ** 0.5)


def test_prior_errors_by_hand():
    model, batches = network(gain=0.25), [inputs(2), inputs(4)]
    rows = prior_errors(model, batches)
    own = [row for row in rows if row.layer == "0"]
    assert [(r.estimate, r.reference) for r in own] == [
        ("prior", "population"), ("posterior", "population"), ("prior", "observation"), ("observation", "population"),
    ]  # fmt: skip
    # All images together are the population: two of a third of the weight, four of two thirds.
    images = torch.cat(batches)
    of_mean, of_var = images.mean((0, 2, 3)), images.var((0, 2, 3), correction=0)
    calls = calls_of(model, batches)["0"]
    moments = {"population": (of_mean, of_var)}
    for name in ("prior", "observation", "posterior"):
        of_calls = [getattr(call, name) for call in calls]
        moments[name] = torch.cat([each.mean for each in of_calls]), torch.cat([each.var for each in of_calls])
    for row in own:
        expected = errors_by_hand(*moments[row.estimate], *moments[row.reference])
        assert (row.mean, row.log_ratio, row.log_ratio_rms) == pytest.approx(expected, rel=1e-5), row


def test_groups_are_batches_of_their_own():
    x = inputs(6)
    grouped = prior_errors(network(gain=0.25, stats_batch_size=2), [x])
    apart = prior_errors(network(gain=0.25), list(x.split(2)))
    for one, other in zip(grouped, apart, strict=True):
        assert one[:3] == other[:3]
        assert one[3:6] == pytest.approx(other[3:6])


def test_batchnorm_has_observations_only_and_a_dead_channel_is_no_error():
    x = inputs()
    x[:, 1] = 7
    rows = prior_errors(network(), x.split(2))
    assert [(row.layer, row.estimate) for row in rows] == [("0", "observation"), ("2", "observation")]
    assert all(torch.tensor(row[3:]).isfinite().all() for row in rows)


def test_a_perfect_prior_has_no_error():
    # The second layer's input is the first's output, whose moments are known but for eps.
    model = network(gain=1e-6, process_noise=False, carry="output")
    model[0].gain = 1.0
    errors = {row.estimate: row for row in prior_errors(model, [inputs()]) if row.layer == "2"}
    assert errors["prior"][3:6] == pytest.approx((0, 0, 0), abs=1e-6)
    assert isinstance(errors["prior"], PriorError)


def test_half_precision_layers_are_compared_in_double():
    model = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).to(torch.bfloat16))
    x = inputs().to(torch.bfloat16)
    with watched(model) as seen:
        model(x)
    assert seen[1].prior.var.dtype == torch.float32
    assert len(prior_errors(model, [x])) == 5
