"""The moments behind activations in C, beside those of torch functions in float64."""

import pytest
import torch
import torch.nn.functional as F

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels import native, on_cpu
from kalmannorm.kernels.rectify import rectified
from kalmannorm.rules import RULES
from kalmannorm.rules.pointwise import piecewise

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C compiler")

THREE_BREAKS = [-0.7, 0.4, 1.1], [(0.3, 1.0, -0.2), (0, 0.5, 0.1), (-1, 2, 0), (0.2, 0, 0.3)]
ACTIVATIONS = {
    "silu": RULES[F.silu],
    "sigmoid": RULES[torch.sigmoid],
    "gelu": RULES[F.gelu],
    "relu6": RULES[F.relu6],
    "hardswish": RULES[F.hardswish],
    "hardshrink": RULES[F.hardshrink],
    "leaky_relu": RULES[F.leaky_relu],
    "abs": RULES[torch.abs],
    "three breaks": lambda x: piecewise(x, *THREE_BREAKS),
}


@pytest.fixture
def calls(monkeypatch):
    """The calls of the function in C."""
    made, real = [], on_cpu.activation
    monkeypatch.setattr(on_cpu, "activation", lambda *args, **kwargs: made.append(args) or real(*args, **kwargs))
    return made


def _beliefs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = 3 * torch.randn(2, count, 1, generator=generator, dtype=torch.float64)
    return mean, torch.rand(2, count, 1, generator=generator, dtype=torch.float64).square() * 4 + 1e-3


def _results(rule, mean, var, dtype):
    """Both moments, and the gradients of each."""
    mean, var = (t.to(dtype, copy=True).requires_grad_() for t in (mean, var))
    y = rule(Gaussian(mean, var))
    gradients = [g for t in (y.mean, y.var) for g in torch.autograd.grad(t.sum(), (mean, var), retain_graph=True)]
    return [t.detach().double() for t in (y.mean, y.var, *gradients)]


@needs_compiler
@pytest.mark.parametrize("count", [1, 4, 7, 40])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_as_torch_functions_in_float64(name, count, calls):
    mean, var = _beliefs(count)
    expected = _results(ACTIVATIONS[name], mean, var, torch.float64)
    assert not calls
    got = _results(ACTIVATIONS[name], mean, var, torch.float32)
    assert calls
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-6)


@needs_compiler
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero_and_narrow(name, calls):
    """A variance far below the mean's square is that of the tangent."""
    mean = torch.tensor([-60.0, -9.5, 0.25, 5.0, 80.0], dtype=torch.float64)
    var = torch.full_like(mean, 1e-4)
    expected = _results(ACTIVATIONS[name], mean, var, torch.float64)
    got = _results(ACTIVATIONS[name], mean, var, torch.float32)
    assert calls
    torch.testing.assert_close(got[:3], expected[:3], rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(got[5], expected[5], rtol=1e-3, atol=1e-6)


@needs_compiler
def test_the_tail_behind_nine_deviations(calls):
    mean, var = torch.tensor([-9.0, -6.0]), torch.ones(2)
    got = _results(ACTIVATIONS["relu6"], mean, var, torch.float32)[:2]
    assert calls
    torch.testing.assert_close(got, list(rectified(mean.double(), var.double())), rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_certain_input(name, calls):
    mean, var = torch.tensor([-4.0, -0.1, 0.2, 2.0, 7.0]), torch.zeros(5)
    after, var_after, *slopes = _results(ACTIVATIONS[name], mean, var, torch.float32)
    assert calls
    expected = _results(ACTIVATIONS[name], mean, torch.full_like(var, 1e-14), torch.float64)[0]
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    assert (var_after <= 1e-15).all()
    assert all(slope.isfinite().all() for slope in slopes)


@needs_compiler
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays(name, calls):
    mean, var = torch.tensor([float("nan"), 0.5, 0.5]), torch.tensor([1.0, float("nan"), 1.0])
    for result in _results(ACTIVATIONS[name], mean, var, torch.float32)[:2]:
        assert result[:2].isnan().all()
        assert result[2].isfinite()
    assert calls


@needs_compiler
@pytest.mark.parametrize("name", ["silu", "hardswish"])
def test_moments_of_different_shapes(name, calls):
    mean, var = _beliefs(5)
    expected = _results(ACTIVATIONS[name], mean, var[:1], torch.float64)
    torch.testing.assert_close(
        _results(ACTIVATIONS[name], mean, var[:1], torch.float32), expected, rtol=1e-4, atol=2e-5
    )
    assert calls


@needs_compiler
@pytest.mark.parametrize("name", ["silu", "hardswish", "leaky_relu"])
def test_a_backward_pass_that_is_differentiated(name, calls):
    second = []
    for dtype in (torch.float32, torch.float64):
        mean, var = (t.to(dtype, copy=True).requires_grad_() for t in _beliefs(6))
        y = ACTIVATIONS[name](Gaussian(mean, var))
        slope, _ = torch.autograd.grad((y.mean * y.var).sum(), (mean, var), create_graph=True)
        second.append([g.double() for g in torch.autograd.grad(slope.square().sum(), (mean, var))])
    assert calls
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-4)


def test_more_breaks_than_the_compiled_function_takes(calls):
    breaks, pieces = [-2.0, *THREE_BREAKS[0]], [(1.9, 2.0, 0.0), *THREE_BREAKS[1]]
    mean, var = _beliefs(6)
    expected = _results(lambda x: piecewise(x, breaks, pieces), mean, var, torch.float64)
    got = _results(lambda x: piecewise(x, breaks, pieces), mean, var, torch.float32)
    assert not calls
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_without_gradients_torch_computes(calls):
    mean, var = _beliefs(6)
    with torch.no_grad():
        y = RULES[F.silu](Gaussian(mean.float(), var.float()))
    assert not calls
    torch.testing.assert_close(y.mean.double(), RULES[F.silu](Gaussian(mean, var)).mean, rtol=1e-5, atol=1e-6)
