"""A belief: written out, pooled, regrouped, drawn from."""

import pytest
import torch
from drawing import DRAWS, agree, believe, written_out
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian, Packed, Unknown

SHAPE = (12, 4, 3, 2)
_axes = st.sets(st.integers(1, 3))
_groups = st.sampled_from([1, 2, 3, 4, 6, 12])


def test_what_it_says_of_itself():
    x = Gaussian(torch.zeros(1, 2), torch.ones(1, 2), (4, 2))
    assert x.shape == (4, 2)
    assert x.ndim == 2
    assert "shape=(4, 2)" in repr(x)
    assert Gaussian(torch.zeros(1, 2), torch.ones(1, 2)).shape == (1, 2)
    assert Unknown("why").reason == "why"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_std_has_a_finite_gradient_at_zero(dtype):
    var = torch.tensor([0.0, 4.0, 1e-30], dtype=dtype, requires_grad=True)
    std = Gaussian(torch.zeros_like(var), var).std
    assert (std > 0).all()
    assert std[1] == 2
    (slope,) = torch.autograd.grad(std.sum(), var)
    assert slope.isfinite().all()


def test_map_and_detach():
    x = believe(SHAPE)
    x = Gaussian(x.mean.requires_grad_(), x.var.requires_grad_(), SHAPE)
    moved = x.map(lambda t: t.movedim(1, 0))
    assert moved.mean.shape == (4, 1, 1, 1)
    assert torch.equal(moved.var, x.var.movedim(1, 0))
    cut = x.detach()
    assert not cut.mean.requires_grad
    assert not cut.var.requires_grad
    assert cut.shape == SHAPE


@given(groups=_groups, axes=_axes)
def test_writing_out(groups, axes):
    x = believe(SHAPE, 0, groups, axes)
    mean, var = written_out(x)
    assert mean.shape == var.shape == SHAPE
    blocks = x.mean.repeat_interleave(12 // groups, 0).expand(SHAPE)
    assert torch.equal(mean, blocks)
    one = x.full([2])
    assert one.mean.shape == (groups, x.mean.shape[1], 3, x.mean.shape[3])
    assert torch.equal(x.full([-2]).mean, one.mean)


def test_writing_out_blocks_of_channels():
    x = Gaussian(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), (5, 6))
    assert x.full([1]).mean.tolist() == [[1, 1, 1, 2, 2, 2]]
    assert x.full([1]).var.tolist() == [[3, 3, 3, 4, 4, 4]]


def test_mean_and_variance_may_vary_along_different_axes():
    x = Gaussian(torch.randn(1, 4, 1, 1), torch.rand(2, 1, 3, 1), SHAPE)
    mean, var = written_out(x)
    assert mean.shape == var.shape == SHAPE
    pooled = x.pool([1, 2])
    expected = Gaussian(mean, var).pool([1, 2])
    torch.testing.assert_close(pooled.mean.expand(2, 1, 1, 1), expected.mean[::6, :, :, :1])
    torch.testing.assert_close(pooled.var.expand(2, 1, 1, 1), expected.var[::6, :, :, :1])


@given(groups=st.sampled_from([1, 2, 3]), axes=_axes, dims=st.sets(st.integers(0, 3)))
def test_pooling_is_the_law_of_total_variance(groups, axes, dims):
    x = believe(SHAPE, 0, groups, axes)
    pooled = x.pool(sorted(dims))
    mean, var = written_out(x)
    second = (var + mean.square()).mean(list(dims), keepdim=True) if dims else var + mean.square()
    first = mean.mean(list(dims), keepdim=True) if dims else mean
    got = written_out(pooled, first.shape)
    torch.testing.assert_close(got[0], first)
    torch.testing.assert_close(got[1], second - first.square())


def test_pooling_against_draws():
    x = believe((2**15, 3, 8, 4), 0, 2, (1, 2, 3))
    agree(Gaussian(x.mean, x.var, x.shape), x.draw(x.shape, torch.Generator().manual_seed(1)), 2)
    agree(Gaussian(x.mean, x.var, x.shape), x.draw(x.shape, torch.Generator().manual_seed(2)), 1)


@given(have=st.integers(1, 6), want=st.integers(1, 12))
def test_regrouping(have, want):
    """Blocks are repeated, or pooled; where neither fits, the groups get the mixture of all."""
    x = believe((12, 3), 0, have)
    got = x.regroup(want)
    assert got.mean.shape == got.var.shape == (want, 3)
    if want % have == 0:
        assert torch.equal(got.mean, x.mean.repeat_interleave(want // have, 0))
        assert torch.equal(got.var, x.var.repeat_interleave(want // have, 0))
    else:
        blocks = x.mean.unflatten(0, (want, -1)) if have % want == 0 else x.mean[None]
        seconds = (x.var + x.mean.square()).view_as(blocks)
        first, second = blocks.mean(1), seconds.mean(1)
        torch.testing.assert_close(got.mean, first.expand(want, 3))
        torch.testing.assert_close(got.var, (second - first.square()).expand(want, 3))


@given(groups=st.sampled_from([1, 2, 3, 4]), want=st.sampled_from([1, 2, 3, 4, 6, 12]), axes=_axes)
def test_what_a_layer_needs(groups, want, axes):
    x = believe(SHAPE, 0, groups, axes)
    got = x.per_channel(want)
    assert got.mean.shape == got.var.shape == (want, 4)
    if want % groups == 0 or groups % want == 0:
        mean, var = written_out(x)
        expected = Gaussian(*(t.unflatten(0, (want, -1)).transpose(1, 2) for t in (mean, var))).pool([2, 3, 4])
        torch.testing.assert_close(got.mean, expected.mean[:, :, 0, 0, 0])
        torch.testing.assert_close(got.var, expected.var[:, :, 0, 0, 0])


def test_what_a_layer_needs_of_a_vector_after_flatten():
    x = Gaussian(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), (8, 6))
    got = x.per_channel(2)
    assert got.mean.tolist() == [[1, 1, 1, 2, 2, 2]] * 2
    assert got.var.tolist() == [[3, 3, 3, 4, 4, 4]] * 2


@pytest.mark.parametrize(
    ("mean", "var", "ready"),
    [
        ((2, 4, 1, 1), (2, 4, 1, 1), True),
        ((2, 4, 1, 1), (1, 4, 1, 1), False),
        ((2, 4, 3, 1), (2, 4, 3, 1), False),
        ((2, 2, 2, 1), (2, 2, 2, 1), False),
        ((2, 1, 1, 1), (2, 1, 1, 1), False),
    ],
    ids=str,
)
def test_a_kernel_takes_one_number_a_channel_of_each_moment(mean, var, ready):
    assert Gaussian(torch.zeros(mean), torch.ones(var), SHAPE).is_per_channel(4) == ready
    if mean == var:
        assert Packed(torch.zeros(2, *mean), SHAPE).is_per_channel(4) == ready


def test_moments_in_one_tensor_are_the_same_belief():
    x = Packed(torch.arange(12.0).view(2, 2, 3, 1).requires_grad_())
    assert (x.shape, x.ndim, x.groups) == ((2, 3, 1), 3, 2)
    assert x.mean.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert x.var.flatten().tolist() == [6, 7, 8, 9, 10, 11]
    wide = x.of((4, 3, 5))
    assert (wide.shape, wide.full([2]).mean.shape) == ((4, 3, 5), (2, 3, 5))
    assert x.packed() is x
    assert not wide.detach().mean.requires_grad
    assert wide.detach().shape == (4, 3, 5)


@given(groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_draws(groups, seed):
    x = believe((2**8, 3, 64, 64), seed, groups)
    draws = x.draw(x.shape, torch.Generator().manual_seed(seed))
    assert draws.shape == x.shape
    assert draws.numel() >= DRAWS
    agree(x, draws, groups)
    again = x.draw((8, 3, 2, 2), torch.Generator().manual_seed(seed))
    assert torch.equal(again, x.draw((8, 3, 2, 2), torch.Generator().manual_seed(seed)))


def test_draws_of_one_map_a_group():
    """The first axis of draws need not be the activation's: its blocks follow the groups."""
    x = Gaussian(torch.tensor([[[0.0]], [[100.0]]]), torch.ones(2, 1, 1), (8, 1, 5))
    draws = x.draw((2, 1, 1000))
    assert draws[0].abs().max() < 10
    assert (draws[1] - 100).abs().max() < 10
    blocks = Gaussian(torch.tensor([[0.0, 100.0]]), torch.ones(1, 2)).draw((50, 6))
    assert blocks[:, :3].max() < 10
    assert blocks[:, 3:].min() > 90


@pytest.mark.parametrize("shape", [(12, 4), (12, 4, 3), SHAPE, (12, 4, 3, 2, 2), (2, 4)])
@pytest.mark.parametrize("groups", [1, 2])
def test_moments_of_draws(shape, groups):
    draws = torch.randn(shape)
    got = Gaussian.of_draws(draws, groups)
    for s, block in enumerate(draws.chunk(groups)):
        each = block.movedim(1, 0).flatten(1)
        torch.testing.assert_close(got.mean[s], each.mean(1))
        torch.testing.assert_close(got.var[s], each.var(1, correction=0))


def test_regrouping_makes_both_moments_of_one_size():
    x = Gaussian(torch.randn(2, 3), torch.rand(1, 3), (4, 3)).regroup(2)
    assert x.mean.shape == x.var.shape == (2, 3)
