"""The filter's arithmetic, against numbers worked out by hand and plain expressions."""

import pytest
import torch
from torch.autograd import gradcheck

from kalmannorm import Gaussian
from kalmannorm.functional import group_kalman_norm, kalman_norm, kalman_update, normalize, observe, trusted_gain


def belief(mean, var):
    return Gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([var], dtype=torch.float64))


def test_update_as_printed_in_equation_7():
    # p = 3/4, q = 1/4: mean 0.75 * 2 + 0.25 * 6 = 3; variance 0.75 * (4 + 1) + 0.25 * 8 = 5.75.
    posterior = kalman_update(
        belief([2.0], [4.0]), belief([6.0], [8.0]), 0.25, process_noise=torch.tensor([1.0]).double(), spread=False
    )
    assert posterior.mean.item() == 3.0
    assert posterior.var.item() == 5.75


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("guard", [None, 100.0])
def test_process_noise_of_another_size_is_refused(size, guard):
    with pytest.raises(ValueError, match=rf"got process_noise of shape \({size},\), expected \(4,\), one a channel"):
        kalman_norm(torch.randn(2, 4), belief([0.0] * 4, [1.0] * 4), gain=0.5, process_noise=torch.ones(size),
                    guard=guard)  # fmt: skip


def test_update_of_the_released_code_adds_the_distance_of_the_means():
    # q (1 - q) (6 - 2)^2 = 3 more than 0.75 * 4 + 0.25 * 8 = 5.
    posterior = kalman_update(belief([2.0], [4.0]), belief([6.0], [8.0]), 0.25)
    assert posterior.var.item() == 8.0
    # It is the variance of the mixture of the two Gaussians.
    draws = torch.cat([2 + 2 * torch.randn(300_000), 6 + 8**0.5 * torch.randn(100_000)])
    assert posterior.var.item() == pytest.approx(draws.var().item(), rel=0.02)


def test_guard_ignores_a_prior_a_hundred_times_too_wide():
    observation = belief([0.0, 0.0], [1.0, 1.0])
    plausible, absurd = belief([1.0, 1.0], [1.0, 198.0]), belief([1.0, 1.0], [1.0, 199.0])
    assert trusted_gain(plausible, observation, 0.1, 100.0).item() == pytest.approx(0.1)
    assert trusted_gain(absurd, observation, 0.1, 100.0).item() == 1.0  # the mean over channels counts
    posterior = kalman_update(absurd, observation, 0.1, guard=100.0)
    torch.testing.assert_close(posterior.mean, observation.mean)
    torch.testing.assert_close(posterior.var, observation.var)


def test_a_constant_channel_tells_the_guard_nothing():
    """One value a channel has a variance of 0, beside which each prior would be too wide."""
    prior = belief([1.0, 1.0], [50.0, 50.0])
    assert trusted_gain(prior, belief([0.0, 0.0], [0.0, 0.0]), 0.1, 100.0).item() == pytest.approx(0.1)
    assert trusted_gain(prior, belief([0.0, 0.0], [0.0, 1.0]), 0.1, 100.0).item() == pytest.approx(0.1)
    assert trusted_gain(prior, belief([0.0, 0.0], [0.0, 0.5]), 0.1, 100.0).item() == 1.0


def test_a_prior_that_the_guard_ignores_leaves_no_rounding():
    x, far = torch.randn(4, 3, 5), Gaussian(torch.full((1, 3), 1e9), torch.full((1, 3), 1e12))
    output = kalman_norm(x, far, gain=0.1, guard=100.0).output
    torch.testing.assert_close(output, kalman_norm(x, None).output)


def test_without_a_prior_the_observation_is_the_posterior():
    observation = belief([1.0], [2.0])
    assert kalman_update(None, observation, 0.1) is observation


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 5), (6, 4, 2, 3, 2)])
def test_observation_of_each_group_is_that_of_a_batch_of_its_own(groups, shape):
    x = torch.randn(shape, dtype=torch.float64)
    seen = observe(x, groups)
    for group, part in enumerate(x.chunk(groups)):
        var, mean = torch.var_mean(part, [0, *range(2, x.ndim)], correction=0)
        torch.testing.assert_close(seen.mean[group], mean)
        torch.testing.assert_close(seen.var[group], var)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("affine", [True, False])
def test_normalize_is_the_textbook_formula_in_value_and_gradient(groups, affine):
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(groups, 3, dtype=torch.float64, requires_grad=True)
    var = torch.rand(groups, 3, dtype=torch.float64).add(0.1).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def ours(x, mean, var, weight, bias):
        return normalize(x, Gaussian(mean, var), weight if affine else None, bias if affine else None, 1e-3)

    def textbook(x, mean, var, weight, bias):
        each = 4 // groups
        m, v = (t.repeat_interleave(each, 0)[:, :, None, None] for t in (mean, var))
        y = (x - m) / (v + 1e-3).sqrt()
        return y * weight[:, None, None] + bias[:, None, None] if affine else y

    inputs = (x, mean, var, weight, bias)
    torch.testing.assert_close(ours(*inputs), textbook(*inputs))
    upstream = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    used = inputs if affine else inputs[:3]
    for a, b in zip(*(torch.autograd.grad(f(*inputs), used, upstream) for f in (ours, textbook)), strict=True):
        torch.testing.assert_close(a, b)
    assert gradcheck(ours, inputs)


def test_normalize_keeps_type_and_memory_format():
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).bfloat16()
    y = normalize(x, observe(x), torch.ones(8), torch.zeros(8), 1e-5)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_is_observed_in_float32():
    x = torch.randn(4, 3, 16, 16).mul(50).add(1000).half()
    seen, exact = observe(x), observe(x.double())
    assert seen.mean.dtype == torch.float32
    torch.testing.assert_close(seen.var.double(), exact.var, rtol=1e-3, atol=0)


def test_group_prior_is_the_mixture_of_its_channels():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    prior = Gaussian(*(torch.rand(2, 4, dtype=torch.float64) for _ in range(2)))
    out = group_kalman_norm(x, prior, 2, gain=1e-12, spread=False)  # nearly all prior
    for sample in range(2):
        for group in range(2):
            at = slice(2 * group, 2 * group + 2)
            mean = prior.mean[sample, at].mean()
            var = prior.var[sample, at].mean() + prior.mean[sample, at].var(correction=0)
            torch.testing.assert_close(out.posterior.mean[sample, at], mean.expand(2))
            torch.testing.assert_close(out.posterior.var[sample, at], var.expand(2))


def test_kalman_norm_returns_what_it_normalized_by():
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    prior = Gaussian(torch.zeros(1, 3).double(), torch.ones(1, 3).double())
    out = kalman_norm(x, prior, gain=0.3, eps=1e-30)
    torch.testing.assert_close(out.posterior.mean, 0.3 * out.observation.mean)
    y = (x - out.posterior.mean[0][:, None, None]) / out.posterior.var[0].sqrt()[:, None, None]
    torch.testing.assert_close(out.output, y)
    assert out.gain == 0.3


@pytest.mark.parametrize("guard", [None, 100.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_relu_follows_the_normalization(groups, guard):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    prior = Gaussian(torch.randn(groups, 3), torch.rand(groups, 3) + 0.5)
    options = {"gain": 0.3, "groups": groups, "guard": guard}
    plain = kalman_norm(x, prior, **options)
    out = kalman_norm(x, prior, **options, relu=True)
    torch.testing.assert_close(out.output, plain.output.relu())
    torch.testing.assert_close(out.posterior.var, plain.posterior.var)
