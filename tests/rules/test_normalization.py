"""Stock normalization layers against draws."""

import pytest
import torch
import torch.nn.functional as F
from drawing import believe, check_draws, check_refused, check_unknown, covers, draw_through, values
from hypothesis import given
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES, aliases

_SHAPES = [(2**19, 3), (2**13, 3, 64), (2**11, 3, 16, 16), (2**10, 3, 8, 8, 4)]
# Two elements that happen to be alike must not show it.
_EPS = 1e-18


def _affine(data, *shape):
    return tuple(values(*shape, seed=s) if data.draw(st.booleans()) else None for s in (1, 2))


@covers(F.batch_norm)
@given(data=st.data(), shape=st.sampled_from(_SHAPES), seed=st.integers(0, 1000), groups=st.integers(1, 2))
def test_batch_norm_by_running_statistics(function, data, shape, seed, groups):
    mean, var = values(3, seed=3), values(3, seed=4).square() + 0.1
    x = believe(shape, seed, groups)
    check_draws(function, x, mean, var, *_affine(data, 3), training=False, eps=0.01, groups=groups)


@covers(F.batch_norm)
@given(data=st.data(), shape=st.sampled_from(_SHAPES), seed=st.integers(0, 1000), stored=st.booleans())
def test_batch_norm_by_batch_statistics(function, data, shape, seed, stored):
    statistics = (torch.zeros(3).double(), torch.ones(3).double()) if stored else (None, None)
    check_draws(function, believe(shape, seed), *statistics, *_affine(data, 3), training=True, eps=_EPS)


@covers(F.instance_norm)
@given(data=st.data(), shape=st.sampled_from(_SHAPES[1:]), seed=st.integers(0, 1000))
def test_instance_norm(function, data, shape, seed):
    weight, bias = _affine(data, 3)
    check_draws(function, believe(shape, seed), weight=weight, bias=bias, eps=_EPS)
    mean, var = values(3, seed=3), values(3, seed=4).square() + 0.1
    check_draws(function, believe(shape, seed), mean, var, weight, bias, use_input_stats=False)


@covers(*aliases("group_norm"))
@given(data=st.data(), shape=st.sampled_from([(2**18, 6), (2**14, 6, 16), (2**11, 6, 8, 8)]))
def test_group_norm(function, data, shape):
    """Channels of a group believed alike: then each is standardized indeed."""
    x = believe(shape, axes=())
    check_draws(function, x, data.draw(st.sampled_from([1, 2, 3])), *_affine(data, 6), _EPS)


@covers(*aliases("layer_norm"))
@given(data=st.data(), normalized=st.integers(1, 3))
def test_layer_norm(function, data, normalized):
    shape = (2**15, 4, 4, 3)
    axes = shape[-normalized:]
    check_draws(function, believe(shape, axes=()).full([1]), axes, *_affine(data, *axes), _EPS)


@covers(F.group_norm, F.layer_norm)
def test_channels_of_unlike_means_keep_their_differences(function):
    """They are standardized by all together."""
    x = believe((2**10, 6, 8, 8))
    for arguments in ((2,), (1,)) if function is F.group_norm else (((6, 8, 8),),):
        belief, output = RULES[function](x, *arguments), draw_through(function, (x, *arguments), {})
        var, mean = torch.var_mean(output.transpose(0, 1).flatten(1), 1)
        each = belief.of(x.shape).per_channel(1)
        torch.testing.assert_close(each.mean[0], mean, rtol=0.02, atol=0.02)
        torch.testing.assert_close(each.var[0], var, rtol=0.02, atol=0)
    small = RULES[function](x, *arguments, eps=1e6)
    assert small.var.max() < 1e-5


def test_torch_layer_norm_has_one_argument_more():
    x = believe((8, 6), axes=())
    y = RULES[torch.layer_norm](x, (6,), values(6), values(6), 1e-5, False)
    assert torch.equal(y.mean, RULES[F.layer_norm](x, (6,), values(6), values(6)).mean)


def test_torch_batch_norm_takes_its_arguments_in_another_order():
    """So it must not share the rule of ``F.batch_norm``."""
    weight, bias, mean, var = values(3, seed=1), values(3, seed=2), values(3, seed=3), values(3, seed=4).square()
    x = believe((2**10, 3, 8, 8))
    assert torch.batch_norm not in RULES
    assert torch.instance_norm not in RULES
    check_draws(F.batch_norm, x, mean, var, weight, bias)


@pytest.mark.parametrize("function", [F.batch_norm, F.instance_norm])
def test_gradients_reach_the_affine_map(function):
    weight, bias = values(3).requires_grad_(), values(3, seed=1).requires_grad_()
    stats = (values(3, seed=2), values(3, seed=3).square() + 0.5)

    def moments(weight, bias, mean, var):
        y = RULES[function](Gaussian(mean, var, (4, 3, 2)), *stats, weight, bias, False)
        return y.mean, y.var

    x = believe((4, 3, 2))
    assert torch.autograd.gradcheck(moments, (weight, bias, x.mean.requires_grad_(), x.var.requires_grad_()))


@covers(F.normalize)
def test_normalize(function):
    """Exact as the axis grows long; these are a few per cent off."""
    for n, tolerance in ((16, 0.08), (256, 0.05)):
        x = believe((2**20 // n, n))
        belief, output = RULES[function](x, dim=1), draw_through(function, (x,), {"dim": 1})
        std, mean = torch.std_mean(output, 0, keepdim=True)
        assert ((belief.mean - mean).abs() < tolerance * std + 5e-3).all()
        assert ((belief.std / std - 1).abs() < tolerance).all()
        torch.testing.assert_close((belief.mean.square() + belief.var).sum(), torch.tensor(1.0).double())


def test_normalize_along_pixels_and_by_other_norms():
    belief = RULES[F.normalize](believe((2, 3, 4, 5)), dim=-1)
    assert belief.mean.shape == (1, 3, 1, 1)
    torch.testing.assert_close(belief.mean.square() + belief.var, torch.full((1, 3, 1, 1), 1 / 5).double())
    check_unknown("p=1", F.normalize, believe((2, 3)), p=1.0)


def test_weights_from_the_input():
    """As of layers whose scale and shift depend on a style."""
    x, style = believe((4, 3, 5)), believe((3,), axes=())
    check_refused(F.batch_norm, x, None, None, style, training=True)
    check_refused(F.group_norm, x, 3, weight=style)
    check_refused(F.layer_norm, x, [5], bias=style)


@covers(*aliases("rms_norm"))
def test_rms_norm(function):
    """As :func:`test_normalize`, times the root of the number of elements and the weight."""
    x, weight = believe((2**12, 256)), values(256)
    belief, output = RULES[function](x, (256,), weight), draw_through(function, (x, (256,), weight), {})
    std, mean = torch.std_mean(output, 0, keepdim=True)
    assert ((belief.mean - mean).abs() < 0.06 * std + 5e-3).all()
    assert ((belief.std / std - 1).abs() < 0.06).all()
    x = believe((2, 3, 4, 5))
    one, both = RULES[function](x, (4, 5)), RULES[F.normalize](x, dim=(2, 3))
    torch.testing.assert_close(one.mean, both.mean * 20**0.5)
    torch.testing.assert_close(one.var, both.var * 20)
    small = RULES[function](x, (4, 5), None, 1e6)
    torch.testing.assert_close(small.mean, x.mean / 1e3, rtol=1e-4, atol=0)


def test_normalize_along_several_axes():
    x = believe((6, 3, 4, 5), groups=2)
    one, both = (RULES[F.normalize](x, dim=dim) for dim in (1, (1, 2)))
    squares = [(b.mean.square() + b.var).expand(2, 3, 4, 5) for b in (one, both)]
    torch.testing.assert_close(squares[0].sum(1), torch.ones(2, 4, 5).double())
    torch.testing.assert_close(squares[1].sum((1, 2)), torch.ones(2, 5).double())


def test_normalize_goes_along_the_channels_by_default():
    x = believe((6, 4, 5), axes=(1, 2))
    torch.testing.assert_close(RULES[F.normalize](x).mean, RULES[F.normalize](x, dim=1).mean, rtol=0, atol=0)


def test_normalize_of_nothing_is_finite_and_of_little_has_unit_norm():
    zero = Gaussian(torch.zeros(1, 3), torch.zeros(1, 3), (4, 3))
    assert RULES[F.normalize](zero).mean.isfinite().all()
    little = Gaussian(torch.full((1, 4), 1e-8).double(), torch.zeros(1, 4).double(), (4, 4))
    torch.testing.assert_close(RULES[F.normalize](little).mean, torch.full((1, 4), 0.5).double())


def test_rms_norm_of_nothing_is_finite():
    y = RULES[torch.rms_norm](Gaussian(torch.zeros(1, 3), torch.zeros(1, 3), (4, 3)), [3])
    assert y.mean.isfinite().all()
    assert y.var.isfinite().all()


def test_instance_norm_uses_the_samples_own_statistics_by_default():
    x = believe((4, 3, 8))
    y = RULES[F.instance_norm](x, torch.full((3,), 5.0).double(), torch.full((3,), 9.0).double())
    assert (y.mean == 0).all()
    assert (y.var == 1).all()


def test_frozen_instance_norm_takes_its_epsilon():
    x, mean, var = believe((4, 3, 8)), values(3), values(3).square()
    y = RULES[F.instance_norm](x, mean, var, use_input_stats=False, eps=0.5)
    expected = RULES[F.batch_norm](x, mean, var, eps=0.5)
    torch.testing.assert_close((y.mean, y.var), (expected.mean, expected.var))


def test_running_variance_of_a_half_is_widened_before_its_root():
    x, mean, var = believe((4, 3, 8)), torch.zeros(3).bfloat16(), values(3).square().bfloat16()
    got, expected = RULES[F.batch_norm](x, mean, var), RULES[F.batch_norm](x, mean, var.double())
    torch.testing.assert_close((got.mean, got.var), (expected.mean, expected.var))


def test_rms_norm_of_a_weight_that_varies_where_the_belief_does_not():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()
    y = RULES[torch.rms_norm](Gaussian(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), (4, 2, 3)), [2, 3], weight)
    torch.testing.assert_close(y.var.expand(1, 2, 3)[0], weight.square().to(y.var))
