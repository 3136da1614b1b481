"""The layer in one step, against the plain functions it stands for."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kalmannorm import Gaussian
from kalmannorm.functional import kalman_update, normalize, observe
from kalmannorm.kernels import layer


def inputs(shape, dtype=torch.float64):
    torch.manual_seed(0)
    channels = shape[1]
    x = (torch.randn(shape, dtype=dtype) * 2 + 1).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    prior_mean, weight, bias = (torch.randn(channels, dtype=wide).requires_grad_() for _ in range(3))
    prior_var = torch.rand(channels, dtype=wide).add(0.2).requires_grad_()
    gain = torch.tensor([0.3], dtype=wide).requires_grad_()
    return x, prior_mean, prior_var, gain, weight, bias


def plain(x, prior_mean, prior_var, gain, weight, bias, spread, eps):
    prior = Gaussian(prior_mean[None], prior_var[None])
    posterior = kalman_update(prior, observe(x), gain, spread=spread)
    return normalize(x, posterior, weight, bias, eps), posterior.mean[0], posterior.var[0]


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 3, 5, 7), (1, 3, 2, 3, 2), (1, 2, 1, 1)])
def test_equals_the_plain_functions(shape, spread):
    given = inputs(shape)
    ours, theirs = layer(*given, spread, 1e-3)[:3], plain(*given, spread, 1e-3)
    upstream = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, given, upstream) for outputs in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spread", [True, False])
def test_gradcheck_and_gradgradcheck(spread):
    given = inputs((2, 2, 2, 2))

    def run(*tensors):
        return layer(*tensors, spread, 1e-3)[:3]

    assert gradcheck(run, given)
    assert gradgradcheck(run, given)


def test_observation_is_returned_without_a_gradient():
    given = inputs((3, 4, 5))
    *_, mean, var = layer(*given, True, 1e-3)
    seen = observe(given[0])
    torch.testing.assert_close(mean, seen.mean[0].detach())
    torch.testing.assert_close(var, seen.var[0].detach())
    assert not mean.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype):
    given = inputs((4, 3, 8, 8), dtype)
    y, mean, var, *_ = layer(*given, True, 1e-3)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    exact = layer(*(t.detach().double().requires_grad_() for t in given), True, 1e-3)
    torch.testing.assert_close(y.double(), exact[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(var.double(), exact[2], rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, given[0], upstream, retain_graph=True)
    assert dx.dtype == dtype


def test_memory_format_is_kept():
    x, *rest = inputs((2, 8, 4, 4))
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x, *rest, True, 1e-3)[0]
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)
