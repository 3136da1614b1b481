"""Means, sums, extremes and standard deviations along axes against draws."""

import math

import pytest
import torch
from drawing import believe, check_draws, check_unknown, covers, draw_through, values
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES, aliases

_seeds = st.integers(0, 1000)
_dims = st.sampled_from([2, 3, -1, (2, 3), [-2, -1], (1,), (1, 2), (0,), (0, 2, 3), (-3, -1)])


@covers(torch.mean, torch.sum)
@given(dim=_dims, keepdim=st.booleans(), seed=_seeds, axes=st.sampled_from([(), (1,), (1, 2), (2, 3), (1, 2, 3)]))
def test_reductions(function, dim, keepdim, seed, axes):
    """Over a small axis: enough outputs are left to compare with. Over the batch, it is cut into many."""
    dims = {d % 4 for d in ([dim] if isinstance(dim, int) else dim)}
    groups = 1 if 0 in dims else 2
    shape = (4, 40, 90, 70) if 0 in dims else (2**14, 3, 8, 4)
    x = believe(shape, seed, groups, () if 0 in dims else axes)
    if dims == {0, 2, 3}:
        got = RULES[function](x, dim, keepdim)
        count = 4 * 90 * 70 if function is torch.sum else 1
        assert got.mean.ndim == (4 if keepdim else 1)
        torch.testing.assert_close(got.mean.flatten()[0], count * x.mean.flatten()[0])
        torch.testing.assert_close(got.var.flatten()[0], count**2 * x.var.flatten()[0] / (4 * 90 * 70))
    else:
        check_draws(function, x, dim, keepdim, groups=groups)


@covers(torch.Tensor.mean, torch.Tensor.sum)
@pytest.mark.parametrize("args", [(), (1,), ((2, 3),), ((2, 3), True), ([],)])
def test_reduction_methods(function, args):
    main = torch.mean if function is torch.Tensor.mean else torch.sum
    x = believe((6, 3, 4, 2), groups=2)
    first, second = RULES[function](x, *args), RULES[main](x, *args)
    assert torch.equal(first.var, second.var)
    assert first.ndim == function(torch.zeros(6, 3, 4, 2), *args).ndim


def test_reduction_of_everything():
    x = believe((6, 3, 4, 2), axes=(1, 2, 3), groups=2)
    mean, var = (t.mean() for t in (x.mean, x.var))
    got = RULES[torch.mean](x)
    torch.testing.assert_close((got.mean, got.var), (mean, var / 144))
    got = RULES[torch.sum](x, dtype=torch.float64)
    torch.testing.assert_close((got.mean, got.var), (mean * 144, var * 144))


def test_axis_is_another_name_for_dim():
    x = believe((6, 3, 4, 2))
    for function in (torch.mean, torch.sum):
        assert torch.equal(RULES[function](x, axis=1).var, RULES[function](x, 1).var)


@covers(*aliases("amax"))
@given(dim=st.sampled_from([2, (2, 3), [-1], (-2, -1)]), keepdim=st.booleans(), seed=_seeds)
def test_largest(function, dim, keepdim, seed):
    check_draws(function, believe((2**14, 3, 4, 6), seed, 2), dim, keepdim, groups=2)


@covers(*aliases("amin"))
@given(dim=st.sampled_from([2, (2, 3), [-1], (-2, -1)]), keepdim=st.booleans(), seed=_seeds)
def test_smallest(function, dim, keepdim, seed):
    check_draws(function, believe((2**14, 3, 4, 6), seed, 2), dim, keepdim, groups=2)


@covers(torch.amax, torch.amin)
@given(dim=st.sampled_from([1, (1, 3), (2, 3)]), axes=st.sampled_from([(1,), (2,), (1, 2), (1, 2, 3)]), seed=_seeds)
def test_extremes_of_unlike_elements(function, dim, axes, seed):
    """As of channels, in spatial attention."""
    check_draws(function, believe((2**14, 5, 4, 6), seed, 2, axes), dim, True, groups=2)


@covers(*aliases("max", "min"))
def test_extremes_along_an_axis(function):
    x = believe((2**14, 3, 20), groups=2)
    for arguments in ((2,), (-1, True)):
        check_draws(function, x, *arguments, groups=2)
    each = {name: RULES[function](x, **{name: 2}).mean for name in ("dim", "axis")}
    assert torch.equal(each["dim"], each["axis"])
    assert RULES[function](x).ndim == 0


@covers(*aliases("max", "min"))
def test_extremes_of_two(function):
    x, y = believe((2**16, 3), groups=2), believe((2**16, 3), 7)
    check_draws(function, x, y, groups=2)
    check_draws(function, values(3), x, groups=2)
    torch.testing.assert_close(RULES[function](values(3), x).var, RULES[function](x, values(3)).var)


@covers(*aliases("var", "std"))
@pytest.mark.parametrize(("args", "options"), [
    ((2,), {}), ((2, False), {}), ((-1, True, True), {}), ((2,), {"correction": 0}), ((2,), {"unbiased": False}),
    (((2, 3),), {}), ((), {"axis": 2}), (([3],), {"correction": 2, "keepdim": True}),
])  # fmt: skip
def test_spread(function, args, options):
    """Few elements: their variance is far from normal."""
    if options.get("axis") and function in (torch.var, torch.std):
        options = {"dim": 2}
    check_draws(function, believe((2**14, 3, 4, 6), groups=2), *args, groups=2, **options)


@covers(*aliases("var", "std"))
def test_spread_of_everything(function):
    """By the older `var(unbiased)` too."""
    x = believe((6, 3, 4, 2), axes=())
    biased, unbiased = (RULES[function](x, *args) for args in ((False,), ()))
    ratio = 143 / 144 if "var" in function.__name__ else math.sqrt(143 / 144)
    assert biased.ndim == 0
    torch.testing.assert_close(biased.mean, unbiased.mean * ratio)


def test_spread_of_unlike_elements():
    """Their means count: the variance of the mixture."""
    x = believe((2**12, 3, 300), axes=(2,))
    output = torch.var(x.draw(x.shape, torch.Generator().manual_seed(0)), 2)
    torch.testing.assert_close(RULES[torch.var](x, 2).mean.squeeze(), output.mean(), rtol=0.02, atol=0)


@covers(*aliases("var_mean", "std_mean"))
def test_spread_beside_the_mean(function):
    x = believe((8, 3, 5), groups=2)
    spread, mean = RULES[function](x, 2, keepdim=True)
    alone = RULES[torch.var if function is torch.var_mean else torch.std](x, 2, keepdim=True)
    assert torch.equal(spread.var, alone.var)
    assert torch.equal(mean.var, RULES[torch.mean](x, 2, keepdim=True).var)


@covers(*aliases("var", "std"))
def test_spread_of_a_single_element(function):
    check_unknown("too few elements", function, believe((8, 3, 1)), 2)


def test_spread_of_very_many_elements():
    """Where a difference of large logarithms would be wrong, even negative."""
    few, x, many = (believe((8, 3, 1)).of((8, 3, n)) for n in (1000, 1001, 10**9))
    torch.testing.assert_close(RULES[torch.std](x, 2).var * 1000, RULES[torch.std](few, 2).var * 999, rtol=1e-5, atol=0)
    torch.testing.assert_close(RULES[torch.std](many, 2).var * 2e9, many.var[..., 0])


@covers(*aliases("norm"), torch.linalg.norm, torch.linalg.vector_norm)
@pytest.mark.parametrize("dim", [2, (2, 3), -1])
def test_norms(function, dim):
    x = believe((2**12, 3, 8, 4), axes=(1, 2), groups=2)
    belief, drawn = RULES[function](x, 2, dim, True), draw_through(function, (x, 2, dim, True), {})
    if function is torch.linalg.norm and dim == (2, 3):
        assert belief.reason == "a matrix norm"
        belief, drawn = RULES[function](x, None, dim, True), draw_through(function, (x, None, dim, True), {})
    var, mean = torch.var_mean(drawn.unflatten(0, (2, -1)), 1)
    believed = belief.full([2]) if dim == -1 else belief
    assert ((believed.mean - mean).abs() < 0.02 * mean).all()
    # Squares of a few elements are no gamma distribution.
    assert ((believed.var / var).log().abs() < 0.15).all()


def test_other_norms():
    check_draws(torch.norm, believe((2**14, 3, 8)), 1, 2)
    check_unknown("a norm with p=3", torch.norm, believe((4, 3, 8)), 3, 2)


def test_a_norm_of_nothing_has_slopes():
    mean, var = torch.zeros(1, 3, 1, requires_grad=True), torch.zeros(1, 3, 1, requires_grad=True)
    y = RULES[torch.norm](Gaussian(mean, var, (4, 3, 5)), 2, 2)
    assert all(g.isfinite().all() for g in torch.autograd.grad((y.mean + y.var).sum(), [mean, var]))


def test_a_norm_of_one_element_is_a_folded_normal():
    """Where the root of a gamma distribution fits worst: the variance is 1 - 2 / pi."""
    x = Gaussian(torch.zeros(1, 3, 1), torch.ones(1, 3, 1), (4, 3, 1))
    got = RULES[torch.norm](x, 2, 2)
    torch.testing.assert_close(got.mean, torch.full((1, 3), math.sqrt(2 / math.pi)), rtol=0.02, atol=0)
    torch.testing.assert_close(got.var, torch.full((1, 3), 1 - 2 / math.pi), rtol=0.04, atol=0)


@covers(*aliases("logsumexp"))
def test_logsumexp(function):
    x = believe((2**14, 3, 32), groups=2).map(lambda t: t / 2)
    x = Gaussian(x.mean, x.var, (2**14, 3, 32))
    belief, drawn = RULES[function](x, 2, True), draw_through(function, (x, 2, True), {})
    var, mean = torch.var_mean(drawn.unflatten(0, (2, -1)), 1)
    torch.testing.assert_close(belief.mean, mean, rtol=0, atol=0.01)
    torch.testing.assert_close(belief.var, var, rtol=0.1, atol=0)


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_a_norm_of_small_and_of_large_numbers(size):
    x, mean = Gaussian(torch.ones(1, 3), torch.ones(1, 3), (4, 3)), torch.tensor(size, requires_grad=True)
    got = RULES[torch.norm](Gaussian(x.mean * mean, x.var * size * size, x.shape), 2, 1)
    once = RULES[torch.norm](x, 2, 1)
    torch.testing.assert_close((got.mean / size, got.var / size / size), (once.mean, once.var))
    assert torch.isfinite(torch.autograd.grad(got.mean.sum(), mean)[0])
