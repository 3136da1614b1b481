"""Pooling against draws; windows lie inside, as the rules ignore padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from drawing import believe, check_alias, check_draws, covers, samples
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES, aliases
from kalmannorm.rules.pooling import extreme_moments, largest_of

SPACE = {1: (60,), 2: (12, 15), 3: (7, 6, 8)}
_AVERAGES = {f: d for d in SPACE for f in aliases(f"avg_pool{d}d")}
_LARGEST = {f: d for d in SPACE for f in aliases(f"max_pool{d}d")}
_LARGEST_WITH_INDICES = {f: d for d in SPACE for f in aliases(f"max_pool{d}d_with_indices")}
_ADAPTIVE_AVERAGES = {f: d for d in SPACE for f in aliases(f"adaptive_avg_pool{d}d")}
_ADAPTIVE_LARGEST = {f: d for d in SPACE for f in aliases(f"adaptive_max_pool{d}d")}
_ADAPTIVE_WITH_INDICES = {f: d for d in SPACE for f in aliases(f"adaptive_max_pool{d}d_with_indices")}


def _believe(space, seed, groups):
    return believe((samples(2 * math.prod(space), groups), 2, *space), seed, groups)


def _draw_window(data, spatial, most=3):
    """A kernel as the caller may write it, and its size along each axis."""
    sizes = st.integers(1, most)
    kernel = data.draw(sizes | st.lists(sizes, min_size=spatial, max_size=spatial))
    return kernel, [kernel] * spatial if isinstance(kernel, int) else kernel


@covers(*_AVERAGES)
@given(data=st.data(), seed=st.integers(0, 1000), groups=st.integers(1, 2))
def test_averages(function, data, seed, groups):
    spatial = _AVERAGES[function]
    kernel, sizes = _draw_window(data, spatial)
    stride = data.draw(st.none() | st.integers(1, 3))
    overlap = 1 if stride is None else math.prod(sizes)
    kwargs = {}
    if spatial > 1 and data.draw(st.booleans()):
        kwargs["divisor_override"] = data.draw(st.integers(1, 8))
    x = _believe(SPACE[spatial], seed, groups)
    check_draws(function, x, kernel, stride, **kwargs, effective=1 / overlap, groups=groups)


@covers(*_LARGEST)
@given(data=st.data(), seed=st.integers(0, 1000), groups=st.integers(1, 2))
def test_largest(function, data, seed, groups):
    """Windows side by side, with holes between (dilated), or overlapping."""
    spatial = _LARGEST[function]
    kernel, sizes = _draw_window(data, spatial)
    dilation = data.draw(st.integers(1, 2)) if max(sizes) > 1 else 1
    stride = data.draw(st.none() | st.just([k * dilation for k in sizes]))
    overlap = 1 if dilation == 1 or stride else math.prod(sizes)
    x = _believe(SPACE[spatial], seed, groups)
    check_draws(function, x, kernel, stride, 0, dilation, effective=1 / overlap, groups=groups)


@covers(*_ADAPTIVE_AVERAGES, *_ADAPTIVE_LARGEST)
@given(data=st.data(), seed=st.integers(0, 1000), groups=st.integers(1, 2))
def test_adaptive(function, data, seed, groups):
    """Sizes that don't divide give windows of several lengths, which overlap by at most one."""
    spatial = (_ADAPTIVE_AVERAGES | _ADAPTIVE_LARGEST)[function]
    space = data.draw(st.lists(st.integers(4, 9), min_size=spatial, max_size=spatial))
    out = st.integers(1, 6)
    each = st.lists(st.none() | out, min_size=spatial, max_size=spatial)
    size = data.draw(out if spatial == 1 else out | each)
    sizes = [size] * spatial if isinstance(size, int) else size
    # More outputs than inputs repeat inputs; at least so many of them are independent.
    shares = [0.5 * min(1, n / (n if o is None else o)) for n, o in zip(space, sizes, strict=True)]
    x = _believe(space, seed, groups)
    check_draws(function, x, size, effective=math.prod(shares), groups=groups)


@covers(*_LARGEST_WITH_INDICES)
def test_largest_with_indices(function):
    spatial = _LARGEST_WITH_INDICES[function]
    check_draws(function, _believe(SPACE[spatial], 0, 2), [2] * spatial, groups=2)


@covers(*_ADAPTIVE_WITH_INDICES)
def test_adaptive_with_indices(function):
    spatial = _ADAPTIVE_WITH_INDICES[function]
    check_draws(function, _believe(SPACE[spatial], 0, 2), [3] * spatial, effective=0.5**spatial, groups=2)


@pytest.mark.parametrize("function", [F.max_pool2d, F.adaptive_max_pool2d])
def test_indices_asked_for(function):
    check_draws(function, _believe((8, 6), 0, 1), 2, return_indices=True)


def test_one_number_for_all_axes():
    x = believe((4, 3, 8, 8))
    for function in (F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        each, one, short = (RULES[function](x, size) for size in ((2, 2), 2, (2,)))
        assert torch.equal(each.mean, one.mean)
        assert torch.equal(each.var, one.var)
        assert torch.equal(each.var, short.var)


def test_padding_changes_nothing():
    x = believe((4, 3, 8, 8))
    assert torch.equal(RULES[F.avg_pool2d](x, 3, 2, 1).var, RULES[F.avg_pool2d](x, 3, 2).var)
    assert torch.equal(RULES[F.max_pool2d](x, 3, 2, 1).mean, RULES[F.max_pool2d](x, 3, 2).mean)


def test_a_belief_that_varies_over_space_is_pooled_first():
    x = believe((6, 2, 4, 4), axes=(1, 2, 3))
    for function in (F.avg_pool2d, F.max_pool2d):
        got, expected = RULES[function](x, 2), RULES[function](x.pool([2, 3]), 2)
        assert torch.equal(got.mean, expected.mean)
        assert torch.equal(got.var, expected.var)


def test_torch_and_functional_names_agree():
    check_alias(torch.max_pool2d, F.max_pool2d, believe((4, 3, 8, 8)), 3, 2)
    check_alias(torch.max_pool1d, F.max_pool1d, believe((4, 3, 8)), 3, 2)


def test_moments_of_the_largest():
    """The smallest cases are known: 1, 2 and 3 normals."""
    assert extreme_moments(1) == pytest.approx((0, 1), abs=1e-9)
    assert extreme_moments(2) == pytest.approx((1 / math.sqrt(math.pi), 1 - 1 / math.pi))
    assert extreme_moments(3)[0] == pytest.approx(3 / (2 * math.sqrt(math.pi)))


@pytest.mark.parametrize("count", [10, 49, 1000])
def test_the_largest_of_many(count):
    x = Gaussian(torch.tensor([[0.5]]).double(), torch.tensor([[4.0]]).double(), (2**20 // count, 1))
    y = largest_of(x, count)
    draws = x.draw((2**22 // count, count)).amax(1)
    n = len(draws)
    assert abs(y.mean.item() - draws.mean().item()) < 5 * math.sqrt(y.var.item() / n)
    assert y.var.item() == pytest.approx(draws.var().item(), rel=5 * math.sqrt(4 / n))


def test_adaptive_max_pooling_pools_a_belief_that_varies_over_space():
    x = believe((6, 2, 4, 4), axes=(1, 2, 3))
    got, expected = RULES[F.adaptive_max_pool2d](x, 2), RULES[F.adaptive_max_pool2d](x.pool([2, 3]).of(x.shape), 2)
    assert torch.equal(got.mean, expected.mean)
    assert torch.equal(got.var, expected.var)


@pytest.mark.parametrize(("arguments", "size"), [((2, 2), 8), ((2,), 8), ((2, 2, 1), 6), ((2, 2, 0), 9)])
@covers(*aliases("max_unpool1d", "max_unpool2d", "max_unpool3d"))
def test_unpooling(function, arguments, size):
    """The inverse of a maximum, as SegNet uses it; of an odd size by its last argument."""
    spatial = int(function.__name__[-2])
    full = (2**10, 3, *[size] * spatial)
    pooled, index = getattr(F, f"max_pool{spatial}d")(torch.randn(full), *arguments, return_indices=True)
    x = believe(tuple(pooled.shape), groups=2)
    for output_size in (full, full[2:]) if size == 9 else (None,):
        check_draws(function, x, index, *arguments, groups=2, output_size=output_size)
