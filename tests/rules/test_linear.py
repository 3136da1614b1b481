"""Convolutions and linear maps against draws; borders are cropped, as the rules ignore padding."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from drawing import agree, believe, check_draws, check_refused, check_unknown, covers, samples, values
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import made_of
from torch import nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
SPACE = {1: (48,), 2: (14, 12), 3: (9, 8, 7)}


def _per_axis(spatial, most):
    """One number for all axes, or one for each."""
    numbers = st.integers(1, most)
    return numbers | st.lists(numbers, min_size=spatial, max_size=spatial)


def _each(number, spatial):
    return [number] * spatial if isinstance(number, int) else list(number)


def _draw_layer(data, spatial):
    """Channels in and out of a group, groups, kernel, stride, dilation, whether with bias."""
    most = 3 if spatial < 3 else 2
    channels = st.integers(1, 3)
    return (
        data.draw(channels), data.draw(channels), data.draw(st.sampled_from([1, 1, 2, 3])),
        _each(data.draw(_per_axis(spatial, most)), spatial), data.draw(_per_axis(spatial, 3)),
        data.draw(_per_axis(spatial, 2)), data.draw(st.booleans()),
    )  # fmt: skip


@covers(*CONVOLUTIONS)
@given(data=st.data(), statistic_groups=st.integers(1, 2), seed=st.integers(0, 1000))
def test_convolutions(function, data, statistic_groups, seed):
    spatial = CONVOLUTIONS[function]
    ins, outs, groups, kernel, stride, dilation, biased = _draw_layer(data, spatial)
    shape = (ins * groups, *SPACE[spatial])
    x = believe((samples(math.prod(shape), statistic_groups), *shape), seed, statistic_groups)
    weight = values(outs * groups, ins, *kernel, seed=seed)
    bias = values(outs * groups, seed=seed + 1) if biased else None
    # At most one output in prod(kernel) is independent of its neighbours.
    check_draws(function, x, weight, bias, stride, 0, dilation, groups,
                effective=1 / math.prod(kernel), groups=statistic_groups)  # fmt: skip


def _check_transposed(function, layer, statistic_groups=1, seed=0):
    spatial = TRANSPOSED[function]
    ins, outs, groups, kernel, stride, dilation, biased = layer
    shape = (ins * groups, *SPACE[spatial])
    strides, dilations = _each(stride, spatial), _each(dilation, spatial)
    n = samples(math.prod(shape) * math.prod(strides), statistic_groups)
    x = believe((n, *shape), seed, statistic_groups)
    weight = values(ins * groups, outs, *kernel, seed=seed)
    bias = values(outs * groups, seed=seed + 1) if biased else None

    def interior(output):
        """Where all taps meet an input; a whole number of strides, so that each phase counts alike."""
        for axis, (size, k, s, d) in enumerate(zip(shape[1:], kernel, strides, dilations, strict=True)):
            start = -(-d * (k - 1) // s) * s
            output = output.narrow(2 + axis, start, size * s - start)
        return output

    # A kernel smaller than the stride leaves gaps; output padding makes the output long enough there.
    extra = [max(0, s - (d * (k - 1) + 1)) for k, s, d in zip(kernel, strides, dilations, strict=True)]
    check_draws(function, x, weight, bias, stride, 0, extra, groups, dilation,
                effective=1 / math.prod(kernel), crop=interior, groups=statistic_groups)  # fmt: skip


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (1,), ()])
@pytest.mark.parametrize("groups", [1, 2])
def test_filters_and_biases_that_are_computed_from_the_input(axes, groups):
    """Of conditional and dynamic convolutions, and the template that a tracker looks for."""
    x, bias = believe((1, 4, 3, 3)), believe((6,), 2, 6, ())
    weight = believe((6, 4 // groups, 3, 3), 1, 6 if 0 in axes else 1, axes)
    generator = torch.Generator().manual_seed(0)
    # A row has a draw of all three.
    rows = [each.map(lambda t: t[None]).of((20_000, *each.shape)) for each in (x, weight, bias)]
    drawn = [each.draw(each.shape, generator) for each in rows]
    y = torch.func.vmap(functools.partial(F.conv2d, groups=groups))(*drawn).flatten(0, 1)
    belief = RULES[F.conv2d](x, weight, bias, groups=groups)
    agree(belief.of(y.shape), y)


def test_a_bias_alone_that_is_computed_from_the_input():
    x, weight, bias = believe((2, 4, 3, 3)), values(6, 4, 3, 3), believe((6,), 2, 6, ())
    found, known = (RULES[F.conv2d](x, weight, each) for each in (bias, bias.mean))
    torch.testing.assert_close(found.mean, known.mean)
    torch.testing.assert_close(found.var, known.var + bias.var.view(1, 6, 1, 1))


@covers(*TRANSPOSED)
@given(data=st.data(), statistic_groups=st.integers(1, 2), seed=st.integers(0, 1000))
def test_transposed_convolutions(function, data, statistic_groups, seed):
    _check_transposed(function, _draw_layer(data, TRANSPOSED[function]), statistic_groups, seed)


@pytest.mark.parametrize("function", TRANSPOSED)
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (2, 2), (3, 1), (1, 2)])
def test_phases_of_transposed_convolutions(function, stride, dilation):
    """A stride of 2 and a dilation of 2: all taps meet in one phase, and the other gets the bias alone."""
    _check_transposed(function, (2, 1, 1, [3] * TRANSPOSED[function], stride, dilation, True))


@pytest.mark.parametrize(("function", "weight"), [(F.conv2d, (2, 3, 3, 3)), (F.conv_transpose2d, (3, 2, 3, 3))])
def test_padding_changes_nothing(function, weight):
    x, weight = believe((4, 3, 8, 8)), values(*weight)
    for padding in (1, (2, 1), *(["same"] if function is F.conv2d else [])):
        assert torch.equal(RULES[function](x, weight, padding=padding).var, RULES[function](x, weight).var)


@covers(F.linear)
@given(ins=st.integers(1, 6), outs=st.integers(1, 4), biased=st.booleans(), seed=st.integers(0, 1000),
       statistic_groups=st.integers(1, 3))  # fmt: skip
def test_linear(function, ins, outs, biased, seed, statistic_groups):
    x = believe((samples(ins, statistic_groups), ins), seed, statistic_groups)
    bias = values(outs, seed=seed + 1) if biased else None
    check_draws(function, x, values(outs, ins, seed=seed), bias, groups=statistic_groups)


@given(ins=st.integers(2, 5), length=st.integers(2, 6), seed=st.integers(0, 1000),
       axes=st.sampled_from([(), (1,), (2,), (1, 2)]), statistic_groups=st.integers(1, 2))  # fmt: skip
@settings(max_examples=12)
def test_linear_of_sequences(ins, length, seed, axes, statistic_groups):
    """The last axis holds the features; the belief may vary along the sequence too."""
    x = believe((samples(ins * length, statistic_groups), length, ins), seed, statistic_groups, axes)
    weight, bias = values(3, ins, seed=seed), values(3, seed=seed + 1)
    check_draws(F.linear, x, weight, bias, channel=-1, groups=statistic_groups)
    if 1 in axes:
        check_draws(F.linear, x, weight, bias, groups=statistic_groups, effective=1 / 3)


def test_one_feature_drops_the_axis():
    x, weight = believe((10, 4, 3), axes=(1, 2)), values(3)
    y = RULES[F.linear](x, weight, values(1)[0])
    expected = RULES[F.linear](x, weight[None], values(1))
    assert y.mean.shape == (1, 4)
    assert torch.equal(y.mean, expected.mean[..., 0])
    assert torch.equal(y.var, expected.var[..., 0])


# -- beliefs that come in blocks -----------------------------------------------------------------------


@pytest.mark.parametrize(("function", "weight"), [
    (F.conv2d, (4, 6, 3, 3)), (F.conv_transpose2d, (6, 4, 3, 3)),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_blocks_of_channels(function, weight, channels):
    """Fewer beliefs than channels: each holds for a block of them."""
    x = believe((4, channels, 8, 8))
    x = Gaussian(x.mean, x.var, (4, 6, 8, 8))
    for groups in (1, 2):
        w = values(weight[0], 6 // groups, 3, 3) if function is F.conv2d else values(*weight)
        y, expected = (RULES[function](b, w, groups=groups) for b in (x, x.full([1])))
        torch.testing.assert_close(y.mean, expected.mean)
        torch.testing.assert_close(y.var, expected.var)


def test_linear_after_flatten():
    """A classifier's way: a channel's belief holds for each of its pixels."""
    x = believe((2**14, 3, 4, 2), groups=2)
    flat = RULES[torch.flatten](x, 1)
    flat = Gaussian(flat.mean, flat.var, (2**14, 24))
    check_draws(F.linear, flat, values(5, 24), values(5), groups=2)
    check_draws(torch.matmul, flat, values(24, 5), groups=2)


# -- what has no rule --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*TRANSPOSED, F.linear])
def test_weights_from_the_input(function):
    spatial = TRANSPOSED.get(function, 0)
    shape = (2, 2, *[3] * spatial)
    x = believe(shape)
    check_refused(function, x, believe(shape))
    check_refused(function, x, values(*shape), believe((2,), axes=()))


@pytest.mark.parametrize("function", [*CONVOLUTIONS, *TRANSPOSED])
def test_without_a_batch_axis(function):
    spatial = {**CONVOLUTIONS, **TRANSPOSED}[function]
    check_unknown("batch axis", function, believe((2, *[5] * spatial)), values(2, 2, *[3] * spatial))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype):
    """Beliefs keep their precision whatever autocast does."""
    x = believe((4, 3, 5, 5), dtype=torch.float32)
    assert RULES[F.conv2d](x, values(2, 3, 3, 3).to(dtype)).mean.dtype == torch.float32
    assert RULES[F.conv_transpose2d](x, values(3, 2, 3, 3).to(dtype)).var.dtype == torch.float32


def test_a_vector_without_a_batch_axis():
    x = Gaussian(torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double())
    weight, bias = values(2, 3), values(2)
    belief = RULES[F.linear](x, weight, bias)
    torch.testing.assert_close(belief.mean, F.linear(x.mean, weight, bias))
    torch.testing.assert_close(belief.var, F.linear(x.var, weight.square()))


@covers(F.embedding)
def test_rows_of_a_table(function):
    weight = torch.randn(7, 4, dtype=torch.float64).requires_grad_()
    index = torch.arange(7).repeat(3)
    belief = RULES[function](index, weight)
    rows = function(index, weight)
    torch.testing.assert_close(belief.mean[0], rows.mean(0))
    torch.testing.assert_close(belief.var[0], rows.var(0, correction=0))
    assert RULES[function](index.view(3, 7), weight).mean.shape == (1, 1, 4)
    assert RULES[function](index, weight.bfloat16()).mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "weight"), [(F.conv2d, values(4, 2, 3, 3)), (F.conv_transpose2d, values(4, 2, 3, 3))]
)
def test_grouped_filters_pool_a_belief_that_varies_over_space(function, weight):
    x = believe((6, 4, 4, 4), axes=(1, 2, 3))
    got, expected = (RULES[function](each, weight, groups=2) for each in (x, x.pool([2, 3])))
    assert torch.equal(got.mean, expected.mean)
    assert torch.equal(got.var, expected.var)


def test_tables_from_the_input():
    check_refused(F.embedding, torch.zeros(4, dtype=torch.long), believe((4, 3)))


def test_moments_of_different_shapes_through_a_filter_and_a_matrix():
    mean, var = believe((6, 4, 5)).mean, believe((6, 4, 5)).var
    x, want = Gaussian(mean, var[:, :1], (6, 4, 5)), Gaussian(mean, var[:, :1].expand_as(mean), (6, 4, 5))
    weight = values(2, 4, 3)
    torch.testing.assert_close(RULES[F.conv1d](x, weight).var, RULES[F.conv1d](want, weight).var)
    mean, var = torch.zeros(1, 1, 5).double(), torch.rand(1, 4, 5).double()
    x, want = Gaussian(mean, var, (6, 4, 5)), Gaussian(mean.expand(1, 4, 5), var, (6, 4, 5))
    torch.testing.assert_close(RULES[F.linear](x, values(2, 5)).var, RULES[F.linear](want, values(2, 5)).var)


@pytest.mark.parametrize("packed", [False, True])
def test_a_filter_pools_a_belief_that_varies_over_space(packed):
    x = believe((6, 4, 4, 4), axes=(1, 2, 3))
    x = x.packed().of(x.shape) if packed else x
    got, expected = (RULES[F.conv2d](each, values(3, 4, 3, 3)) for each in (x, x.pool([2, 3])))
    torch.testing.assert_close((got.mean, got.var), (expected.mean, expected.var))


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_channels_that_vary_over_space(packed):
    x = believe((6, 2, 2), axes=(1, 2)).of((6, 4, 2))
    x = x.packed().of(x.shape) if packed else x
    got, expected = (RULES[F.conv1d](each, values(3, 4, 1)) for each in (x, x.full([1]).pool([2])))
    torch.testing.assert_close((got.mean, got.var), (expected.mean, expected.var))


def test_one_variance_for_all_channels_through_a_filter():
    x = Gaussian(torch.randn(1, 4, 1), torch.rand(1, 1, 1), (6, 4, 5))
    torch.testing.assert_close(
        RULES[F.conv1d](x, values(2, 4, 1).float()).var, RULES[F.conv1d](x.full([1]), values(2, 4, 1).float()).var
    )


def test_a_table_is_read_by_an_index_that_the_network_computes():
    """As a codebook is (VQ-VAE)."""

    def forward(self, x):
        h = self.first(x)
        index = torch.cdist(h, self.codes).argmin(-1)
        return self.second(h + (F.embedding(index, self.codes) - h).detach())

    codes = nn.Parameter(torch.randn(5, 8))
    model = made_of(forward, first=nn.BatchNorm1d(8), second=nn.BatchNorm1d(8), codes=codes)
    assert kn.describe(kn.convert(model, input_stats=(0.0, 1.0)), torch.randn(4, 8)).with_prior == 2
