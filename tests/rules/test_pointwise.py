"""Activations against draws, at the limits of float32, and their gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawing import DRAWS, believe, check_alias, check_draws, check_refused, check_unknown, covers, draw_through, values
from hypothesis import given, settings
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian
from kalmannorm.propagation import function_name
from kalmannorm.rules import RULES, aliases
from kalmannorm.rules.pointwise import piecewise, quadrature

CHANNELS = 2


def _tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _sorted_pair(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair) - 0.01, max(pair)))


_slopes = st.lists(st.floats(-0.5, 1.5), min_size=CHANNELS, max_size=CHANNELS).map(_tensor)
_bounds = _sorted_pair(-3, 3)

# The arguments that follow the input.
PARAMETERS = {
    F.relu: st.just(()),
    F.leaky_relu: st.tuples(st.floats(-0.5, 1.5)),
    F.prelu: st.tuples(_slopes | _slopes.map(lambda t: t[:1])),
    F.rrelu: _sorted_pair(0, 1).flatmap(lambda pair: st.tuples(*map(st.just, pair), st.booleans())),
    F.hardtanh: _bounds,
    F.relu6: st.just(()),
    torch.clamp: _bounds | st.tuples(st.floats(-3, 3)) | st.tuples(st.none(), st.floats(-3, 3)),
    torch.clamp_min: st.tuples(st.floats(-3, 3)),
    torch.clamp_max: st.tuples(st.floats(-3, 3)),
    F.hardsigmoid: st.just(()),
    F.hardswish: st.just(()),
    F.hardshrink: st.tuples(st.floats(0, 2)),
    F.softshrink: st.tuples(st.floats(0, 2)),
    F.threshold: st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    F.gelu: st.just(()),
    F.elu: st.tuples(st.floats(0.1, 3)),
    F.celu: st.tuples(st.floats(0.1, 3)),
    F.softplus: st.tuples(st.floats(0.3, 3), st.floats(5, 20)),
    torch.pow: st.tuples(st.integers(0, 3)),
    **dict.fromkeys(
        [F.silu, F.mish, F.selu, torch.sigmoid, torch.tanh, F.logsigmoid, F.softsign, F.tanhshrink, torch.abs,
         torch.square, torch.exp, torch.sin, torch.cos, torch.erf, torch.atan, torch.asinh, torch.expm1],
        st.just(()),
    ),
}  # fmt: skip

# One choice of arguments, for what is tested once.
EXAMPLES = {
    F.leaky_relu: (0.2,), F.prelu: (_tensor([0.1, 0.3]),), F.rrelu: (0.1, 0.4, False), F.hardtanh: (-0.5, 1.5),
    torch.clamp: (-0.5, 1.5), torch.clamp_min: (-0.3,), torch.clamp_max: (0.4,), F.hardshrink: (0.7,),
    F.softshrink: (0.7,), F.threshold: (0.3, -1.0), F.elu: (0.8,), F.celu: (0.8,), torch.pow: (3,),
}  # fmt: skip

# Their moments grow with the exponential of the variance, where a million draws show nothing.
_STEEP = (torch.exp, torch.expm1)


def _examples(function):
    return EXAMPLES.get(function, ())


def _name(function):
    return function_name(function).split(".")[-1].rstrip("_")


ALIASES = [(other, main) for main in PARAMETERS for other in aliases(_name(main), _name(main) + "_")]
ALIASES += [(other, torch.clamp) for other in aliases("clip", "clip_")]
ALIASES += [(other, torch.pow) for other in aliases("__pow__", "float_power")]
_MAIN = dict(ALIASES)


@covers(*PARAMETERS)
@given(data=st.data())
@settings(max_examples=5)
def test_draws(function, data):
    most = 0.5 if function in _STEEP else 3
    each = st.tuples(st.floats(-3, 3), st.floats(0.05, most))
    mean, std = _tensor(data.draw(st.lists(each, min_size=CHANNELS, max_size=CHANNELS))).T
    args = data.draw(PARAMETERS[function])
    x = Gaussian(mean[None], std.square()[None], (DRAWS, CHANNELS))
    check_draws(function, x, *args)


def test_gelu_by_tanh():
    x = believe((DRAWS, CHANNELS))
    check_draws(F.gelu, x, approximate="tanh")
    exact, approximate = RULES[F.gelu](x), RULES[F.gelu](x, approximate="tanh")
    assert not torch.equal(exact.mean, approximate.mean)


@covers(*_MAIN)
def test_aliases(function):
    main = _MAIN[function]
    check_alias(function, main, believe((40, CHANNELS, 3)), *_examples(main))


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, F.relu6, F.silu, F.hardswish, F.elu, F.selu, F.celu])
def test_in_place_flag(function):
    x = believe((40, CHANNELS, 3))
    assert torch.equal(RULES[function](x, inplace=True).var, RULES[function](x).var)


@pytest.mark.parametrize("training", [True, False])
def test_rrelu(training):
    """With slopes so far apart that their own variance shows."""
    check_draws(F.rrelu, believe((DRAWS, 3)), 0.0, 1.0, training)


def test_prelu_of_an_image():
    check_draws(F.prelu, believe((2**10, 3, 16, 16)), _tensor([0.1, -0.4, 0.7]))


# -- the limits of float32 ---------------------------------------------------------------------------

_BOUNDED = [f for f in PARAMETERS if f not in (*_STEEP, torch.pow, torch.square)]


@pytest.mark.parametrize("function", _BOUNDED, ids=_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_nan_nor_negative(function, dtype):
    means = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 30.0, 1e4, 1e8], dtype=dtype)
    means = torch.cat([means, -means])[:, None]
    stds = torch.tensor([0.0, 1e-25, 1e-10, 1e-3, 1.0, 1e3, 1e7], dtype=dtype)
    mean, var = torch.broadcast_tensors(means, stds.square())
    args = [a[:1].to(dtype) if isinstance(a, torch.Tensor) else a for a in _examples(function)]
    mean, var = (t.reshape(-1, 1).clone().requires_grad_() for t in (mean, var))
    y = RULES[function](Gaussian(mean, var), *args)
    assert y.mean.isfinite().all()
    assert y.var.isfinite().all()
    assert (y.var >= 0).all()
    for gradient in torch.autograd.grad(y.mean.sum() + y.var.sum(), (mean, var)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("function", PARAMETERS, ids=_name)
def test_without_variance_it_is_the_function(function):
    points = [-9.0, -2.2, -0.9, -0.01, 0.2, 0.9, 2.3, 9.0]
    if function not in (*_STEEP, torch.pow):
        points += [-1e4, 1e4]
    m = torch.tensor(points)[:, None]
    args = [a[:1].float() if isinstance(a, torch.Tensor) else a for a in _examples(function)]
    expected = function(m, *args)
    y = RULES[function](Gaussian(m, torch.zeros_like(m)), *args)
    torch.testing.assert_close(y.mean, expected, rtol=1e-5, atol=1e-6)
    assert (y.var <= 1e-10 * (1 + expected.square())).all()


@pytest.mark.parametrize("function", [f for f in _BOUNDED if f not in (torch.sin, torch.cos)], ids=_name)
def test_far_out_it_is_linear(function):
    """A thousand standard deviations from its bends: the value and the slope there."""
    m = torch.tensor([-1e4, -4e3, 4e3, 1e4])[:, None].requires_grad_()
    args = [a[:1].float() if isinstance(a, torch.Tensor) else a for a in _examples(function)]
    expected = function(m, *args)
    (slope,) = torch.autograd.grad(expected.sum(), m)
    y = RULES[function](Gaussian(m.detach(), torch.full_like(m, 4.0)), *args)
    torch.testing.assert_close(y.mean, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.var, 4 * slope.square(), rtol=1e-3, atol=1e-5)


# -- closed forms ------------------------------------------------------------------------------------


@given(mean=st.floats(-3, 3), std=st.floats(0.01, 1.2))
@settings(max_examples=30)
def test_exponential_is_lognormal(mean, std):
    y = RULES[torch.exp](Gaussian(_tensor([mean]), _tensor([std**2])))
    expected = math.exp(mean + std**2 / 2)
    assert y.mean.item() == pytest.approx(expected, rel=1e-9)
    assert y.var.item() == pytest.approx(expected**2 * math.expm1(std**2), rel=1e-6)


@given(mean=st.floats(-3, 3), std=st.floats(0.05, 3))
@settings(max_examples=30)
def test_relu_is_the_textbook_formula(mean, std):
    """As the method's page has it, with the cancellation that the rule avoids."""
    a = mean / std
    below = 0.5 * math.erfc(-a / math.sqrt(2))
    density = math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    first = mean * below + std * density
    second = (mean**2 + std**2) * below + mean * std * density
    y = RULES[F.relu](Gaussian(_tensor([mean]), _tensor([std**2])))
    assert y.mean.item() == pytest.approx(first, rel=1e-9, abs=1e-12)
    assert y.var.item() == pytest.approx(second - first**2, rel=1e-6, abs=1e-12)


# -- what has no rule --------------------------------------------------------------------------------


def test_powers_without_a_rule():
    check_unknown("power with several exponents", torch.pow, believe((4, 2)), torch.ones(2))


@pytest.mark.parametrize("base", [2, torch.ones(4, 2), believe((4, 2))])
def test_exponents_from_the_input(base):
    check_refused(torch.pow, base, believe((4, 2)))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0, 1.7])
def test_an_exponent_in_a_tensor(exponent):
    x = believe((4, 2)) if exponent.is_integer() else Gaussian(torch.full((1, 2), 3.0), torch.full((1, 2), 0.1))
    expected, learned = RULES[torch.pow](x, exponent), torch.tensor(exponent, requires_grad=True)
    for kind in (torch.tensor(exponent), torch.tensor([exponent]).double(), np.float32(exponent)):
        y = RULES[torch.pow](x, kind)
        torch.testing.assert_close((y.mean, y.var), (expected.mean, expected.var))
    y = RULES[torch.pow](Gaussian(x.mean.abs() + 9, x.var), learned)
    (y.mean + y.var).sum().backward()
    assert learned.grad.isfinite()


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -4.0])
def test_a_negative_exponent_that_nothing_looks_at_gives_finite_numbers(exponent):
    mean, learned = torch.tensor([[1e-3, 2.0]]).requires_grad_(), torch.tensor(exponent, requires_grad=True)
    y = RULES[torch.pow](Gaussian(mean, torch.ones(1, 2)), learned)
    (y.mean[:, 1] + y.var[:, 1]).sum().backward()
    assert y.mean.isfinite().all()
    assert learned.grad.isfinite()
    assert mean.grad.isfinite().all()


def test_bounds_and_slopes_from_the_input():
    x = believe((4, 2))
    check_unknown("clamp between tensors", torch.clamp, x, torch.zeros(2), None)
    check_refused(torch.clamp, x, max=x)
    check_unknown("clamp between tensors", torch.clamp_min, x, torch.zeros(2))
    check_refused(F.prelu, x, x)


# -- gradients ---------------------------------------------------------------------------------------


def _moments(rule):
    def moments(mean, var):
        y = rule(Gaussian(mean, var))
        return y.mean, y.var

    return moments


@pytest.mark.parametrize("rule", [
    RULES[F.relu],
    lambda x: piecewise(x, [-0.7, 0.4, 1.1], [(0.3, 1.0, -0.2), (0, 0.5, 0.1), (-1, 2, 0), (0.2, 0, 0.3)]),
    RULES[F.leaky_relu], RULES[F.relu6], RULES[F.hardswish],
    lambda x: quadrature(x, F.gelu),
    lambda x: quadrature(x, torch.tanh),
])  # fmt: skip
def test_gradients(rule):
    mean = _tensor([[-2.0, -0.6, 0.1, 0.8, 2.5]]).requires_grad_()
    var = _tensor([[0.5, 0.02, 1.3, 4.0, 0.3]]).requires_grad_()
    assert torch.autograd.gradcheck(_moments(rule), (mean, var))
    assert torch.autograd.gradgradcheck(_moments(rule), (mean, var))


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (-math.inf, 1.0), (-1e20, 1e20), (None, 3e38), (-math.inf, None)])
def test_bounds_that_are_out_of_reach_are_none(bounds):
    x = Gaussian(torch.tensor([[0.3, -40.0, 1e6]]), torch.tensor([[2.0, 0.1, 5.0]]))
    near = [bound if bound is not None and abs(bound) < 2 else None for bound in bounds]
    clamped = RULES[torch.clamp](x, *bounds)
    expected = x if near == [None, None] else RULES[torch.clamp](x, *near)
    torch.testing.assert_close((clamped.mean, clamped.var), (expected.mean, expected.var))
    assert clamped.mean.isfinite().all()


@covers(*aliases("sqrt", "sqrt_"))
def test_sqrt(function):
    """Of what is positive: a belief of 40 standard deviations above zero, and one that reaches it."""
    x = Gaussian(torch.full((1, 3), 4.0).double(), torch.tensor([[0.01, 0.2, 0.5]]).double(), (DRAWS // 3, 3))
    check_draws(function, x)
    wide = Gaussian(torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True), (4, 1))
    y = RULES[function](wide)
    (y.mean + y.var).sum().backward()
    assert y.mean.isfinite().all()
    assert wide.mean.grad.isfinite().all()
    assert wide.var.grad.isfinite().all()


def test_bounds_in_the_wrong_order_clamp_to_the_upper_one():
    y = RULES[torch.clamp](believe((4, 3)), 1.0, -1.0)
    torch.testing.assert_close(y.mean, torch.full_like(y.mean, -1.0))
    torch.testing.assert_close(y.var, torch.zeros_like(y.var), atol=1e-6, rtol=0)


DEFAULTS = [F.leaky_relu, F.hardtanh, F.hardshrink, F.softshrink, F.elu, F.celu, F.rrelu, F.dropout]


@pytest.mark.parametrize("function", DEFAULTS, ids=lambda f: f.__name__)
def test_defaults_are_torchs(function):
    check_draws(function, believe((2**17, 2)))


def test_exponentials_of_a_wide_belief_are_finite():
    for function in (torch.exp, torch.expm1):
        y = RULES[function](Gaussian(torch.tensor([[1.0, 90.0]]), torch.tensor([[200.0, 1.0]])))
        assert y.mean.isfinite().all()
        assert y.var.isfinite().all()


def test_fractional_powers_of_a_belief_that_reaches_below_zero():
    x = Gaussian(torch.zeros(1, 1), torch.ones(1, 1))
    for exponent in (0.5, torch.tensor(1.7)):
        y = RULES[torch.pow](x, exponent)
        assert y.mean.isfinite().all()
        assert y.var.isfinite().all()


def test_a_learned_exponent_of_a_belief_that_reaches_below_zero_has_a_gradient():
    learned = torch.tensor(2.0, requires_grad=True)
    y = RULES[torch.pow](Gaussian(torch.zeros(1, 1), torch.ones(1, 1)), learned)
    (y.mean + y.var).sum().backward()
    assert learned.grad.isfinite()


def test_a_negative_exponent_of_a_negative_mean_is_finite():
    y = RULES[torch.pow](Gaussian(torch.tensor([[-2.0]]), torch.ones(1, 1)), torch.tensor(-4.0))
    assert y.mean.isfinite().all()
    assert y.var.isfinite().all()


def test_prelu_of_blocks_of_channels_in_the_beliefs_own_type():
    x = believe((4, 2, 3), dtype=torch.float32).of((4, 4, 3))
    y = RULES[F.prelu](x, values(4))
    assert y.mean.shape == (1, 4, 1)
    assert y.mean.dtype == torch.float32


@covers(*aliases("sin", "sin_", "cos", "cos_"))
def test_waves_of_a_wide_belief(function):
    """As of SIREN's `sin(30 x)`: no nodes would see them."""
    x = believe((2**18, 3), groups=2)
    check_draws(function, Gaussian(30 * x.mean, 900 * x.var, x.shape), groups=2)


@pytest.mark.parametrize("sign", [1, -1])
@covers(*aliases("pow", "__pow__"), *aliases("reciprocal", "reciprocal_", "rsqrt", "rsqrt_"))
def test_negative_powers(function, sign):
    """Of what stays away from zero they are exact; of the rest they are finite."""
    x = believe((2**16, 3), groups=2)
    far = Gaussian(sign * (10 + x.mean.abs()), x.var, x.shape)
    powers = [(-1,), (-2.0,), *([(-0.5,), (-1.5,)] if sign > 0 else [])] if "pow" in function.__name__ else [()]
    if sign > 0 or "rsqrt" not in function.__name__:
        for power in powers:
            check_draws(function, far, *power, groups=2)
    slopes = [x.mean.requires_grad_(), x.var.requires_grad_()]
    around = RULES[function](Gaussian(*slopes), *powers[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad((around.mean + around.var).sum(), slopes))
    nothing = RULES[function](Gaussian(torch.zeros(1, 3), torch.zeros(1, 3)), *powers[0])
    assert nothing.mean.isfinite().all()


@covers(*aliases("sign", "sign_", "sgn", "sgn_"))
def test_signs(function):
    """Of a binary network."""
    check_draws(function, believe((2**18, 3), groups=2), groups=2)


@covers(*aliases("log", "log_", "log1p", "log1p_", "log2", "log2_", "log10", "log10_"))
def test_logarithms(function):
    """Of a log-normal they are exact. Of what reaches below zero they are finite, and so are their slopes."""
    x = believe((2**16, 3), groups=2).map(lambda t: 0.4 * t)
    grown = RULES[torch.exp](x)
    belief = RULES[function](Gaussian(grown.mean - 1, grown.var) if "log1p" in function.__name__ else grown)
    unit = {"log2": math.log(2), "log10": math.log(10)}.get(function.__name__.rstrip("_"), 1.0)
    torch.testing.assert_close((belief.mean * unit, belief.var * unit**2), (x.mean, x.var))
    slopes = [torch.tensor([[-3.0, 0.0]], requires_grad=True), torch.tensor([[0.5, 1.0]], requires_grad=True)]
    below = RULES[function](Gaussian(*slopes))
    assert all(g.isfinite().all() for g in torch.autograd.grad((below.mean + below.var).sum(), slopes))


@covers(*aliases("ceil", "ceil_", "floor", "floor_", "round", "round_", "trunc", "trunc_", "fix", "fix_"))
def test_rounding(function):
    x = believe((2**18, 3), groups=2)
    belief, drawn = RULES[function](x), draw_through(function, (x,), {})
    var, mean = torch.var_mean(drawn.unflatten(0, (2, -1)), 1)
    torch.testing.assert_close(belief.mean, mean, rtol=0, atol=0.06)  # of the jumps, the nodes see so much
    torch.testing.assert_close(belief.var, var, rtol=0.15, atol=0)


def test_a_belief_behind_a_relu_stays_as_it_is_where_another_shape_gets_it():
    """`where` hands it to a larger output, by broadcasting; the mean of the ReLU's own counts its own pixels."""
    x = RULES[torch.relu](believe((6, 4, 1, 1)))
    larger = RULES[torch.where](torch.ones(6, 4, 8, 8, dtype=torch.bool), x, -1e9).of((6, 4, 8, 8))
    assert (larger.shape, x.shape) == ((6, 4, 8, 8), (6, 4, 1, 1))
    torch.testing.assert_close(larger.mean, x.mean)
