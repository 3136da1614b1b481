"""Both moments through a matrix, against the plain expression."""

import importlib

import pytest
import torch
from drawing import values
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.kernels import contract

# The package's attribute of this name is the function.
_module = importlib.import_module("kalmannorm.kernels.contract")


def plain(mean, var, weight):
    matrix = weight.flatten(1)
    return mean @ matrix.T, var @ matrix.square().T


def _inputs(groups, ins, outs, seed=0, dtype=torch.float64):
    mean, var = values(groups, ins, seed=seed), values(groups, ins, seed=seed + 1).square()
    return [t.to(dtype).requires_grad_() for t in (mean, var, values(outs, ins, seed=seed + 2))]


def _results(function, tensors):
    """Outputs, and gradients for some gradient that comes in."""
    outputs = function(*tensors)
    incoming = [values(*o.shape, seed=7 + i).to(o.dtype) for i, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, tensors, incoming)]


@pytest.fixture(params=[1, 7, 12, 64, 2**18])
def block(request, monkeypatch):
    """Elements that a block may have: from a row at a time to everything at once."""
    monkeypatch.setattr(_module, "_BLOCK", request.param)
    return request.param


@pytest.fixture
def _poisoned():
    """Memory that nobody wrote to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_poisoned", "block")
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize(("outs", "ins"), [(1, 1), (1, 6), (6, 1), (5, 3), (13, 7), (16, 8)])
def test_against_the_plain_expression(groups, outs, ins):
    tensors = _inputs(groups, ins, outs)
    for got, expected in zip(_results(contract, tensors), _results(plain, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@given(groups=st.integers(1, 4), ins=st.integers(1, 9), outs=st.integers(1, 9), rows=st.integers(1, 40))
def test_any_size(groups, ins, outs, rows):
    before, _module._BLOCK = _module._BLOCK, rows
    try:
        tensors = _inputs(groups, ins, outs)
        for got, expected in zip(_results(contract, tensors), _results(plain, tensors), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    finally:
        _module._BLOCK = before


@pytest.mark.usefixtures("_poisoned", "block")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_of_a_convolution(memory_format):
    """They come as ``(out, in, h, w)``; the gradient has their shape."""
    mean, var, _ = _inputs(2, 4 * 9, 5)
    weight = values(5, 4, 3, 3).to(memory_format=memory_format).requires_grad_()
    for got, expected in zip(
        _results(contract, (mean, var, weight)), _results(plain, (mean, var, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("block")
def test_not_contiguous():
    mean, var, weight = (t.detach() for t in _inputs(6, 8, 10))
    tensors = [t.requires_grad_() for t in (mean[::2], var.T.contiguous().T[::2], weight.T.contiguous().T)]
    for got, expected in zip(_results(contract, tensors), _results(plain, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    one = [t.detach()[:1].expand(3, -1).requires_grad_() for t in (mean, var)]
    tensors = [*one, tensors[2]]
    for got, expected in zip(_results(contract, tensors), _results(plain, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("block")
def test_gradients():
    tensors = _inputs(2, 4, 5)
    assert torch.autograd.gradcheck(contract, tensors)
    assert torch.autograd.gradgradcheck(contract, tensors)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_some_gradients_not_asked_for(needed):
    tensors = [t.requires_grad_(i in needed) for i, t in enumerate(t.detach() for t in _inputs(2, 4, 5))]
    wanted = [tensors[i] for i in needed]
    got, expected = (torch.autograd.grad(sum(o.sum() for o in f(*tensors)), wanted) for f in (contract, plain))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.usefixtures("_poisoned", "block")
def test_one_output_is_not_used():
    mean, var, weight = _inputs(2, 4, 5)
    for i in (0, 1):
        got, expected = (torch.autograd.grad(f(mean, var, weight)[i].sum(), weight)[0] for f in (contract, plain))
        torch.testing.assert_close(got, expected)


def test_float32_and_real_blocks():
    """Large enough for several blocks of the true size."""
    tensors = _inputs(2, 512, 1030, dtype=torch.float32)
    for got, expected in zip(_results(contract, tensors), _results(plain, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
