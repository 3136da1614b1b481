"""ReLU of a Gaussian, against the textbook formula and its derivatives by autograd."""

import math
from functools import partial

import pytest
import torch
from drawing import values
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.kernels.activation import rectify


def plain(mean, var):
    """``E[y]`` and ``E[y^2] - E[y]^2``, which cancels far from zero."""
    std = var.sqrt()
    a = mean / std
    above, density = torch.special.ndtr(a), torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    first = mean * above + std * density
    return first, (mean.square() + var) * above + mean * std * density - first.square()


@given(seed=st.integers(0, 1000), shape=st.lists(st.integers(1, 4), max_size=4))
def test_against_the_plain_expression(seed, shape):
    mean, var = 2 * values(*shape, seed=seed), 0.1 + values(*shape, seed=seed + 1).square()
    mean, var = mean.requires_grad_(), var.requires_grad_()
    incoming = [values(*shape, seed=s) for s in (7, 8)]
    results = []
    for function in (rectify, plain):
        outputs = function(mean, var)
        results.append([*outputs, *torch.autograd.grad(outputs, (mean, var), incoming)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_gradients():
    mean = torch.tensor([[-6.0, -2.0, -0.6, 0.0, 0.1, 0.8, 2.5, 9.0]], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([[1.0, 0.5, 0.02, 1.0, 1.3, 4.0, 0.3, 0.01]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rectify, (mean, var))
    assert torch.autograd.gradgradcheck(rectify, (mean, var))


@pytest.mark.parametrize("slope", [0.2, 1.0, -0.5, 3.0])
def test_a_slope_below_zero(slope):
    mean = torch.tensor([[-6.0, -2.0, -0.6, 0.0, 0.1, 0.8, 2.5, 9.0]], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([[1.0, 0.5, 0.02, 1.0, 1.3, 4.0, 0.3, 0.01]], dtype=torch.float64, requires_grad=True)
    above, squares = plain(mean, var)
    squares = squares + above.square()
    first = slope * mean + (1 - slope) * above
    second = slope**2 * (mean.square() + var - squares) + squares - first.square()
    torch.testing.assert_close(rectify(mean, var, slope=slope), (first, second), rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradcheck(partial(rectify, slope=slope), (mean, var))
    assert torch.autograd.gradgradcheck(partial(rectify, slope=slope), (mean, var))


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_ends_of_the_numbers(dtype, slope):
    """The limits hold where the plain expression cancels or divides by zero; slopes stay finite."""
    mean = torch.tensor([-1e8, -50.0, 0.0, 50.0, 1e8, -1.0, 1.0], dtype=dtype, requires_grad=True)
    var = torch.tensor([1.0, 1e-4, 0.0, 1e-4, 1.0, 0.0, 0.0], dtype=dtype, requires_grad=True)
    first, second = rectify(mean, var, slope=slope)
    torch.testing.assert_close(first, torch.where(mean > 0, mean, slope * mean), rtol=1e-6 if slope else 0, atol=1e-9)
    expected = torch.where(mean > 0, var, slope**2 * var)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=0)
    for gradient in torch.autograd.grad(first.sum() + second.sum(), (mean, var)):
        assert gradient.isfinite().all()
