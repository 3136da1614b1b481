"""Batch Renormalization."""

import copy

import pytest
import torch
from torch import nn

import kalmannorm
from kalmannorm.lab.baselines.renorm import BatchRenorm, RenormSchedule

UNCLIPPED = (1e6, 1e6)


def layer_with_averages(schedule, **options):
    layer = BatchRenorm(3, schedule=schedule, **options).double()
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def plain(x, layer, r_max, d_max):
    """Algorithm 1, a channel at a time: the output, and the averages after."""
    y, means, variances = torch.empty_like(x), [], []
    for c in range(x.shape[1]):
        pixels = x[:, c]
        mean, std = pixels.mean(), (((pixels - pixels.mean()) ** 2).mean() + layer.eps).sqrt()
        mu, sigma = layer.running_mean[c], (layer.running_var[c] + layer.eps).sqrt()
        r = min(max(float(std / sigma), 1 / r_max), r_max)
        d = min(max(float((mean - mu) / sigma), -d_max), d_max)
        y[:, c] = layer.weight[c] * ((pixels - mean) / std * r + d) + layer.bias[c]
        means.append(mu + layer.momentum * (mean - mu))
        variances.append((sigma + layer.momentum * (std - sigma)) ** 2 - layer.eps)
    return y, torch.stack(means), torch.stack(variances)


def test_no_gradient_through_r_and_d():
    layer = layer_with_averages(UNCLIPPED)
    x = torch.randn(4, 3, 5, 5).double().requires_grad_()
    direction = torch.randn_like(x)
    sigma = (layer.running_var + layer.eps).sqrt().view(1, 3, 1, 1)
    mean = x.mean((0, 2, 3), keepdim=True)
    std = (x.var((0, 2, 3), correction=0, keepdim=True) + layer.eps).sqrt()
    r = (std / sigma).detach()
    surrogate = (x - mean) / std * r * layer.weight.view(1, 3, 1, 1)
    (expected,) = torch.autograd.grad(surrogate, x, direction)
    (gradient,) = torch.autograd.grad(layer(x), x, direction)
    assert torch.allclose(gradient, expected)
    assert gradient.sum((0, 2, 3)).abs().max() < 1e-9  # BatchNorm's own property


def test_the_published_schedule():
    schedule = RenormSchedule()
    expected = {0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5),
                10**6: (3, 5)}  # fmt: skip
    for step, limits in expected.items():
        assert torch.allclose(torch.stack(schedule.limits(torch.tensor(step))), torch.tensor(limits).float())
    for step, limits in expected.items():
        scaled = schedule.scaled(0.01).limits(torch.tensor(step // 100))
        assert torch.allclose(torch.stack(scaled), torch.tensor(limits).float())


def test_the_layer_follows_its_schedule():
    layer = layer_with_averages(RenormSchedule(start=1, r_until=3, d_until=3, r_max=1e6, d_max=1e6))
    x = torch.randn(4, 3, 5, 5).double()
    stock = nn.BatchNorm2d(3).double()
    stock.load_state_dict(layer.state_dict())
    for _ in range(2):
        assert torch.allclose(layer(x), stock(x))
    layer(x)
    by_averages = copy.deepcopy(layer).eval()(x)
    assert torch.allclose(layer(x), by_averages)


def test_state_dict_eval_and_online_statistics_are_batchnorms():
    layer, stock, again = layer_with_averages(None), nn.BatchNorm2d(3).double(), BatchRenorm(3).double()
    stock.load_state_dict(layer.state_dict())
    again.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 5, 5).double()
    assert torch.equal(again.eval()(x), stock.eval()(x))
    model = nn.Sequential(again)
    with kalmannorm.online_statistics(model):
        assert torch.allclose(model(x), stock.train()(x))


def test_half_precision_and_plain_mean():
    layer = BatchRenorm(3, momentum=None)
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert torch.allclose(layer.running_mean, x.float().mean((0, 2, 3)))


def test_errors():
    with pytest.raises(ValueError, match=r"BatchRenorm got an input of shape \(2, 4, 5, 5\), expected \(N, 3, \*\)"):
        BatchRenorm(3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"BatchRenorm got r_max=0\.5"):
        BatchRenorm(3, schedule=(0.5, 1))
    with pytest.raises(ValueError, match="start <= r_until, d_until"):
        RenormSchedule(start=10, r_until=5)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 5, 5), (4, 3, 2, 3, 4)])
def test_algorithm_one_of_each_group_by_itself_against_shared_averages(shape, samples):
    """Against a loop over groups, twice: the averages move once a step, by the mean over groups."""
    layer, looped = (layer_with_averages((1.2, 0.3), momentum=0.2) for _ in range(2))
    looped.load_state_dict(layer.state_dict())
    layer.samples = samples
    for _ in range(2):
        x = (torch.randn(shape) * 2 + 1).double()
        parts, means, stds = [], [], []
        for part in x.split(samples or len(x)):
            alone = copy.deepcopy(looped)
            y, mean, var = plain(part, alone, 1.2, 0.3)
            parts.append(y)
            means.append(mean)
            stds.append((var + layer.eps).sqrt())
        assert torch.allclose(layer(x), torch.cat(parts))
        looped.running_mean = torch.stack(means).mean(0)
        looped.running_var = torch.stack(stds).mean(0) ** 2 - layer.eps
        assert torch.allclose(layer.running_mean, looped.running_mean)
        assert torch.allclose(layer.running_var, looped.running_var)
    assert layer.num_batches_tracked == 2
