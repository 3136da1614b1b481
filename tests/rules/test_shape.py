"""Functions that move elements: exactly what the torch function does to every single mean and variance.

Resizing blends elements, so it is compared with draws.
"""

import pytest
import torch
import torch.nn.functional as F
from drawing import (
    believe,
    check_draws,
    check_moved,
    check_unknown,
    covers,
    draw_through,
    values,
    written_out,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kalmannorm.gaussian import Gaussian
from kalmannorm.propagation import exact
from kalmannorm.rules import RULES, aliases
from kalmannorm.steps import Step

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.*:UserWarning", "ignore:The use of.*T:UserWarning")

MANY = settings(max_examples=25)


@st.composite
def beliefs(draw, ranks=(2, 3, 4, 5), channels=(2, 4, 6)):
    """Some belief of any rank that varies along any axes, over its groups, or in blocks of channels."""
    rank, groups = draw(st.sampled_from(ranks)), draw(st.integers(1, 3))
    space = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=rank - 2, max_size=rank - 2))
    shape = (groups * draw(st.integers(1, 2)), draw(st.sampled_from(channels)), *space)
    axes = draw(st.sets(st.integers(1, rank - 1)) | st.just({1}))
    x = believe(shape, draw(st.integers(0, 99)), groups, axes)
    if 1 in axes and draw(st.booleans()):
        x = Gaussian(x.mean[:, ::2], x.var[:, ::2], shape)
    return x


# -- the belief as it is -----------------------------------------------------------------------------


@covers(*aliases("contiguous", "clone", "requires_grad_", "float", "double", "half", "bfloat16", "type_as",
                 "type", "retain_grad", "as_tensor", "asarray", "nan_to_num", "nan_to_num_"))  # fmt: skip
def test_same(function):
    """Casts too: a belief keeps its own precision."""
    x = believe((4, 3, 2, 2), groups=2)
    extra = {torch.Tensor.type_as: (torch.zeros(1),), torch.Tensor.type: (torch.float16,)}.get(function, ())
    y = RULES[function](x, *extra)
    assert torch.equal(y.mean, x.mean)
    assert torch.equal(y.var, x.var)
    assert y.mean.dtype == torch.float64


def test_what_is_rounded_is_unknown():
    x = believe((4, 3, 2, 2))
    numbers = torch.zeros(1, dtype=torch.int64)
    for function, kind in ((torch.Tensor.to, torch.int8), (torch.Tensor.to, torch.bool), (torch.Tensor.to, numbers),
                           (torch.Tensor.type_as, numbers), (torch.Tensor.type, torch.uint8),
                           (torch.Tensor.type, "torch.IntTensor")):  # fmt: skip
        check_unknown("rounded to another type", function, x, kind)


@covers(torch.Tensor.to)
@pytest.mark.parametrize(("args", "device"), [
    (("meta",), "meta"), ((torch.device("meta"),), "meta"), ((torch.zeros(1, device="meta"),), "meta"),
    ((believe((4, 3)).map(lambda t: t.to("meta")),), "meta"), (("meta", torch.float16), "meta"),
    ((torch.float16,), "cpu"), ((torch.float16, False, True), "cpu"),
])  # fmt: skip
def test_to(function, args, device):
    y = RULES[function](believe((4, 3)), *args)
    assert y.mean.device.type == y.var.device.type == device
    assert y.mean.dtype == torch.float64


def test_to_by_keyword():
    to = RULES[torch.Tensor.to]
    assert to(believe((4, 3)), device="meta").mean.is_meta
    assert not to(believe((4, 3)), dtype=torch.float16, memory_format=torch.channels_last).mean.is_meta


@covers(torch.Tensor.cpu, torch.Tensor.cuda)
def test_to_a_kind_of_device(function):
    """The belief goes where the activation goes."""
    x = believe((4, 3))
    if function is torch.Tensor.cuda and not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            RULES[function](x)
    else:
        assert RULES[function](x).mean.device == function(x.mean).device


@covers(*aliases("detach", "detach_"), torch.Tensor.data.__get__)
def test_detach(function):
    x = believe((4, 3))
    x = Gaussian(x.mean.requires_grad_(), x.var.requires_grad_(), x.shape)
    y = RULES[function](x)
    assert torch.equal(y.mean, x.mean)
    assert not y.mean.requires_grad
    assert not y.var.requires_grad


@covers(*aliases("transpose_", "unsqueeze_", "squeeze_"))
def test_in_place_functions_leave_the_belief_before(function):
    """Other functions may have seen the activation before it was changed."""
    x = believe((4, 3, 1))
    mean, shape = x.mean, x.mean.shape
    RULES[function](x, *{"transpose_": (0, 1), "unsqueeze_": (0,), "squeeze_": ()}[function.__name__])
    assert x.mean is mean
    assert mean.shape == shape


# -- axes --------------------------------------------------------------------------------------------


@covers(*aliases("permute"))
@given(x=beliefs(), data=st.data())
def test_permute(function, x, data):
    order = data.draw(st.permutations(range(x.ndim)))
    check_moved(function, x, order)
    if function is torch.Tensor.permute:
        check_moved(function, x, *order)


@covers(*aliases("transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis"))
@given(x=beliefs(), data=st.data())
def test_two_axes(function, x, data):
    axes = st.integers(-x.ndim, x.ndim - 1)
    check_moved(function, x, data.draw(axes), data.draw(axes))


@covers(*aliases("unsqueeze", "unsqueeze_"))
@given(x=beliefs(), data=st.data())
def test_unsqueeze(function, x, data):
    check_moved(function, x, data.draw(st.integers(-x.ndim - 1, x.ndim)))


@covers(*aliases("t"), torch.Tensor.T.__get__)
@given(x=beliefs(ranks=(2,)))
def test_transposed_matrix(function, x):
    check_moved(function, x)


@covers(torch.Tensor.mT.__get__)
@given(x=beliefs())
def test_transposed_matrices(function, x):
    check_moved(function, x)


@covers(*aliases("squeeze", "squeeze_"))
@given(x=beliefs(), data=st.data())
def test_squeeze(function, x, data):
    check_moved(function, x)
    check_moved(function, x, data.draw(st.integers(-x.ndim, x.ndim - 1)))
    check_moved(function, x, tuple(data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))))


@covers(*aliases("expand"))
@given(x=beliefs(), data=st.data())
def test_expand(function, x, data):
    sizes = [data.draw(st.sampled_from([1, 5])) if n == 1 else data.draw(st.sampled_from([n, -1])) for n in x.shape]
    before = [3] * data.draw(st.integers(0, 2))
    check_moved(function, x, *before, *sizes)
    check_moved(function, x, [*before, *sizes])


@covers(*aliases("expand_as"))
@given(x=beliefs())
def test_expand_as(function, x):
    sizes = [5 if n == 1 else n for n in x.shape]
    check_moved(function, x, torch.zeros(sizes))
    check_moved(function, x, torch.zeros(2, *sizes))
    other = RULES[function](x, believe(sizes))
    assert other.ndim == x.ndim


@covers(*aliases("repeat"))
@given(x=beliefs(), data=st.data())
@MANY
def test_repeat(function, x, data):
    times = [data.draw(st.integers(1, 3)) for _ in x.shape]
    before = [2] * data.draw(st.integers(0, 1))
    check_moved(function, x, *before, *times)
    check_moved(function, x, [*before, *times])


@covers(*aliases("repeat_interleave"))
def test_repeat_interleave(function):
    for dim in range(-4, 4):
        for axes in ((), (1,), (2, 3)):
            check_moved(function, believe((4, 3, 5, 5), 0, 2, axes), 3, dim)
            check_moved(function, believe((4, 3, 5, 5), 0, 2, axes), 3, dim=dim)
    for repeats, dim in ((2, None), (torch.tensor([1, 2, 3]), 1)):
        check_unknown("across axes, or by different numbers", function, believe((4, 3)), repeats, dim)


@covers(*aliases("flip", "roll"))
def test_flip_and_roll(function):
    shifts = () if "flip" in function.__name__ else ([1, 2],)
    for dims in ([2, -1], [1, 3], [3, 1], [-3, 2], [0, 1], [-1, -2]):
        for axes in ((), (1,), (2,), (1, 2), (1, 2, 3)):
            for groups in (1, 2):
                check_moved(function, believe((4, 3, 5, 5), 0, groups, axes), *shifts, dims)
                check_moved(function, believe((4, 3, 5, 5), 0, groups, axes), *shifts, dims=dims)


def test_flip_takes_axes_one_by_one():
    x = believe((4, 3, 5, 5))
    check_moved(torch.Tensor.flip, x, 2, 3)
    check_moved(torch.Tensor.flip, x, 1, 3)
    check_moved(torch.Tensor.flip, x, -3)


def test_roll_of_the_flat_tensor():
    x = believe((4, 3, 5, 5))
    for shift in (1, 25, 3):
        check_unknown("roll across axes", torch.roll, x, shift)
    for dim in (1, 3, -3):
        check_moved(torch.roll, x, 2, dim)
        check_moved(torch.roll, x, shifts=2, dims=dim)


def test_what_was_rolled_is_another_activation():
    """Of which a difference is not zero, behind a ReLU too."""
    for x in (believe((4, 3, 5)), RULES[F.relu](believe((4, 3, 5)))):
        apart = RULES[torch.sub](x, RULES[torch.roll](x, 1, 2))
        torch.testing.assert_close(apart.var, 2 * x.var)


# -- reshaping ---------------------------------------------------------------------------------------


def _factor(draw, size):
    """Split a size in one, two or three."""
    factors = []
    for f in (2, 3, 2):
        if size % f == 0 and draw(st.booleans()):
            factors.append(f)
            size //= f
    return draw(st.permutations([*factors, size]))


@st.composite
def reshapes(draw, x):
    """A shape that merges and splits at random."""
    sizes, waiting = [], 1
    for n in x.shape:
        waiting *= n
        if draw(st.booleans()):
            sizes += _factor(draw, waiting)
            waiting = 1
    sizes += _factor(draw, waiting)
    if draw(st.booleans()):
        sizes[draw(st.integers(0, len(sizes) - 1))] = -1
    return sizes


def check_reshaped(function, x, *args, **kwargs):
    """The reshaped belief written out is the written-out belief reshaped."""
    belief = RULES[function](x, *args, **kwargs)
    mean, var = (function(t, *args, **kwargs) for t in written_out(x))
    assert belief.ndim == mean.ndim
    got = written_out(belief, mean.shape)
    assert torch.equal(got[0], mean)
    assert torch.equal(got[1], var)


@covers(*aliases("reshape"), torch.Tensor.view)
@given(x=beliefs(), data=st.data())
@settings(max_examples=80)
def test_reshape(function, x, data):
    shape = data.draw(reshapes(x))
    check_reshaped(function, x, shape)
    if function is not torch.reshape:
        check_reshaped(function, x, *shape)


def test_reshape_by_keyword():
    check_moved(torch.reshape, believe((4, 6, 2)), shape=(4, 2, 3, 2))
    check_moved(torch.Tensor.view, believe((4, 6, 2)), size=(4, 2, 3, 2))


@covers(*aliases("reshape_as", "view_as"))
@given(x=beliefs(), data=st.data())
def test_reshape_as(function, x, data):
    other = torch.zeros(x.shape).reshape(data.draw(reshapes(x)))
    check_moved(function, x, other)
    got = RULES[function](x, Gaussian(other[:1], other[:1], other.shape))
    assert got.ndim == other.ndim


@covers(*aliases("flatten"))
@given(x=beliefs(), data=st.data())
@MANY
def test_flatten(function, x, data):
    start = data.draw(st.integers(0, x.ndim - 1))
    check_moved(function, x, start)
    check_moved(function, x, start - x.ndim, data.draw(st.integers(start, x.ndim - 1)))


@covers(*aliases("ravel"))
@given(x=beliefs())
def test_ravel(function, x):
    check_moved(function, x)


@covers(*aliases("unflatten"))
@given(x=beliefs())
def test_unflatten(function, x):
    check_moved(function, x, 1, (2, -1))
    check_moved(function, x, 1 - x.ndim, (-1, 2))
    check_moved(function, x, 0, (x.shape[0], 1))


def test_no_reshape_to_another_type():
    check_unknown("another type", torch.Tensor.view, believe((4, 3)), torch.int64)
    check_unknown("another type", torch.Tensor.view, believe((4, 3)), dtype=torch.int64)


def test_classifier_keeps_the_belief_small():
    x = RULES[torch.flatten](believe((4, 6, 5, 5), groups=2), 1)
    assert x.mean.shape == (2, 6)
    assert RULES[torch.Tensor.reshape](believe((4, 6, 5, 5)), 4, 6, 25).mean.shape == (1, 6, 1)


# -- cutting -----------------------------------------------------------------------------------------

INDICES = [
    slice(None), slice(0, 2), slice(1, None), slice(None, None, 2), 0, -1, None, Ellipsis, [0, 1],
    torch.tensor([1, 0, 1]), torch.tensor(1), (Ellipsis, 0), (Ellipsis, slice(1), slice(None)), (slice(None), 1),
    (slice(None), slice(1, None)),
    (slice(None), slice(-1, None), Ellipsis), (slice(None), None), (None, Ellipsis, None), (slice(None), [1, 0]),
    (slice(None), torch.tensor([0, 1])), (slice(1), slice(None, None, 2)), (0, 1), (-1, Ellipsis, 0),
    (slice(None), torch.tensor([True, False] * 2)), (torch.tensor([True, False] * 2),), (slice(None), 0, None),
    ([0, 1], [1, 0]), (slice(None), None, slice(1, 3)), (Ellipsis, None, 0), (Ellipsis, torch.tensor([0, 0])),
    (torch.tensor([0, 1]), slice(None), torch.tensor([0, 0])), (slice(None), slice(None), slice(0, 1)),
    (slice(0, 2), slice(0, 1), slice(1, 2)), (slice(None), torch.tensor([[0, 1], [1, 0]])),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
@covers(torch.Tensor.__getitem__)
@given(groups=st.sampled_from([1, 2, 4]), axes=st.sets(st.integers(1, 3)), blocks=st.booleans())
@settings(max_examples=12)
def test_indexing(function, index, groups, axes, blocks):
    x = believe((4, 4, 3, 2), 0, groups, axes)
    if blocks and 1 in axes:
        x = Gaussian(x.mean[:, :2], x.var[:, :2], x.shape)
    check_moved(function, x, index)


@pytest.mark.parametrize(("index", "axes"), [
    (lambda mask: (mask,), (3,)), (lambda mask: (mask[:, :, 0],), (3,)), (lambda mask: (slice(None), mask[0]), (3,)),
    (lambda mask: (slice(None), mask[0] | True), (1, 3)), (lambda mask: (mask, slice(1, 3)), (1, 2, 3)),
    (lambda mask: (None, mask, Ellipsis), (3,)), (lambda mask: (slice(None), slice(2), mask[:6, :4, 0]), (1,)),
])  # fmt: skip
def test_masks_over_several_axes(index, axes):
    """Any of the elements that are masked may be picked."""
    x = believe((2**11, 8, 6, 4), axes=axes)
    index = index(torch.rand(2**11, 8, 6, generator=torch.Generator().manual_seed(0)) > 0.3)
    belief = RULES[torch.Tensor.__getitem__](x, index)
    drawn = draw_through(torch.Tensor.__getitem__, (x, index), {})
    assert belief.ndim == drawn.ndim
    axes = [d for d in range(drawn.ndim) if belief.mean.shape[d] == 1]
    var, mean = torch.var_mean(drawn, axes, keepdim=True)
    torch.testing.assert_close(belief.mean.expand(mean.shape), mean, rtol=0.05, atol=0.08)
    torch.testing.assert_close(belief.var.expand(var.shape), var, rtol=0.15, atol=0.02)


def test_indices_that_cannot_be_followed():
    x = believe((4, 4, 3))
    getitem = torch.Tensor.__getitem__
    mask = torch.ones(4, 3, dtype=torch.bool)
    check_unknown("mask over several axes", getitem, x, (..., mask))
    check_unknown("mask over several axes", getitem, x, (torch.arange(12), mask))
    check_unknown("mask over several axes", getitem, x, (slice(None), mask, torch.arange(12)))


def test_slices_of_space_leave_the_belief_small():
    y = RULES[torch.Tensor.__getitem__](
        believe((4, 4, 8, 8)), (slice(None), slice(None), slice(2, 4), slice(1, None, 2))
    )
    assert y.mean.shape == (1, 4, 1, 1)


def test_a_slice_cuts_a_variance_that_varies_alone():
    belief = Gaussian(torch.zeros(1, 1), torch.arange(8.0).view(1, 8), (4, 8))
    y = RULES[torch.Tensor.__getitem__](belief, (slice(None), slice(2, 6)))
    assert y.var.tolist() == [[2, 3, 4, 5]]


@covers(*aliases("chunk", "tensor_split"))
@given(x=beliefs(), data=st.data())
def test_chunks(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    check_moved(function, x, 2)
    check_moved(function, x, 2, dim)
    check_moved(function, x, 3, dim=dim)
    if "tensor_split" in function.__name__:
        check_moved(function, x, [1], dim)


@covers(*aliases("split"))
@given(x=beliefs(), data=st.data())
def test_split(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    check_moved(function, x, 1)
    check_moved(function, x, data.draw(st.integers(1, 3)), dim)
    first = data.draw(st.integers(0, x.shape[dim]))
    check_moved(function, x, [first, x.shape[dim] - first], dim=dim)


@covers(*aliases("unbind"))
@given(x=beliefs(), data=st.data())
def test_unbind(function, x, data):
    check_moved(function, x)
    check_moved(function, x, data.draw(st.integers(-x.ndim, x.ndim - 1)))
    check_moved(function, x, dim=1)


@covers(*aliases("narrow"))
@given(x=beliefs(), data=st.data())
def test_narrow(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    start = data.draw(st.integers(0, x.shape[dim] - 1))
    check_moved(function, x, dim, start, data.draw(st.integers(1, x.shape[dim] - start)))


@covers(*aliases("select"))
@given(x=beliefs(), data=st.data())
def test_select(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    check_moved(function, x, dim, data.draw(st.integers(-x.shape[dim], x.shape[dim] - 1)))


@covers(*aliases("index_select"))
@given(x=beliefs(), data=st.data())
def test_index_select(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    index = data.draw(st.lists(st.integers(0, x.shape[dim] - 1), min_size=1, max_size=4))
    check_moved(function, x, dim, torch.tensor(index))


# -- joining -----------------------------------------------------------------------------------------


def _beside(x, data, dim):
    """Another belief that fits beside ``x`` along ``dim``, with groups and axes of its own."""
    shape = list(x.shape)
    shape[dim] *= data.draw(st.integers(1, 2))
    groups = data.draw(st.sampled_from([s for s in (1, 2, 3, 4) if shape[0] % s == 0]))
    return believe(shape, data.draw(st.integers(100, 199)), groups, data.draw(st.sets(st.integers(1, x.ndim - 1))))


@covers(*aliases("cat", "concat", "concatenate"))
@given(x=beliefs(), data=st.data())
@MANY
def test_cat(function, x, data):
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1))
    parts = [x, *(_beside(x, data, dim) for _ in range(data.draw(st.integers(1, 2))))]
    check_moved(function, parts, dim)
    check_moved(function, tuple(parts[::-1]), dim=dim)


@covers(*aliases("hstack"))
def test_hstack(function):
    check_moved(function, [believe((4, 3, 2)), believe((4, 5, 2), 7)])


@covers(*aliases("stack"))
@given(x=beliefs(), data=st.data())
@MANY
def test_stack(function, x, data):
    others = [believe(x.shape, s, axes=data.draw(st.sets(st.integers(1, x.ndim - 1)))) for s in (7, 8)]
    check_moved(function, [x, *others], data.draw(st.integers(-x.ndim - 1, x.ndim)))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_cat_with_a_known_tensor(dim, groups, first):
    """It keeps its values along the axis; elsewhere it is summarized, without variance of its own."""
    x = believe((4, 3, 4, 5), groups=groups)
    shape = [4, 3, 4, 5]
    shape[dim] = 2
    known = values(*shape)
    parts = [known, x] if first else [x, known]
    belief = RULES[torch.cat](parts, dim)
    means, variances = written_out(x)
    mean = torch.cat([means if p is x else known for p in parts], dim)
    var = torch.cat([variances if p is x else torch.zeros_like(known) for p in parts], dim)
    y = Gaussian(belief.mean, belief.var, mean.shape).per_channel(groups if dim else 1)
    expected = Gaussian(mean, var).per_channel(groups if dim else 1)
    torch.testing.assert_close(y.mean, expected.mean)
    torch.testing.assert_close(y.var, expected.var)


def test_stack_with_a_known_tensor():
    x, known = believe((4, 3, 5)), values(4, 3, 5)
    y = RULES[torch.stack]([x, known], 1)
    y = Gaussian(y.mean, y.var, (4, 2, 3, 5)).per_channel(1)
    expected = Gaussian(known[:, None], torch.zeros(4, 1, 3, 5).double()).per_channel(1)
    torch.testing.assert_close(y.mean[:, 1:], expected.mean)
    torch.testing.assert_close(y.var[:, 1:], expected.var)
    torch.testing.assert_close(y.mean[:, :1], x.mean.mean().view(1, 1))


@covers(*aliases("pad"), torch.constant_pad_nd, torch._C._nn.pad)
@given(value=st.floats(-2, 2), before=st.integers(-1, 2), after=st.integers(-1, 2),
       groups=st.integers(1, 2), axes=st.sampled_from([(), (1,), (1, 2)]))  # fmt: skip
@MANY
def test_pad_with_channels(function, value, before, after, groups, axes):
    """Option A shortcuts: the new channels are constant, and so certain."""
    x = believe((4, 4, 3, 2), 1, groups, axes)
    amounts = [0, 0, 0, 0, before, after]
    y = RULES[function](x, amounts, value=value)
    if function in (F.pad, torch._C._nn.pad):
        assert torch.equal(RULES[function](x, amounts, "constant", value).mean, y.mean)
    mean, var = written_out(x)
    mean, var = F.pad(mean, amounts, value=value), F.pad(var, amounts)
    got = written_out(y, mean.shape)
    assert torch.equal(got[0], mean)
    assert torch.equal(got[1], var)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_a_border_is_ignored(mode):
    x = believe((4, 3, 5, 5))
    y = RULES[F.pad](x, [1, 1, 2, 1], mode)
    assert torch.equal(y.mean, x.mean)
    assert torch.equal(y.var, x.var)


def test_a_border_where_the_belief_varies():
    x = believe((4, 3, 5, 4), axes=(1, 2))
    y = RULES[F.pad](x, [3, 3, 1, 2], value=0.5)
    assert torch.equal(y.mean, F.pad(x.mean, [0, 0, 1, 2], value=0.5))
    assert torch.equal(y.var, F.pad(x.var, [0, 0, 1, 2]))
    check_unknown("reflect", F.pad, x, [0, 0, 1, 1], "reflect")
    check_unknown("along the batch", F.pad, x, [0, 0, 0, 0, 0, 0, 1, 0])


# -- resizing ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("upscale", [2, 3])
@covers(F.pixel_shuffle)
def test_pixel_shuffle(function, upscale):
    """What a channel gathers is forgotten pixel by pixel, not on the whole."""
    for x in (believe((4, 2 * upscale**2, 3, 5), groups=2), believe((4, 2 * upscale**2, 3, 5), axes=())):
        y = RULES[function](x, upscale)
        mean, var = (function(t, upscale) for t in written_out(x))
        expected = Gaussian(mean, var).per_channel(2)
        got = Gaussian(y.mean, y.var, mean.shape).per_channel(2)
        torch.testing.assert_close(got.mean, expected.mean)
        torch.testing.assert_close(got.var, expected.var)


@covers(F.pixel_unshuffle)
def test_pixel_unshuffle(function):
    for x in (believe((4, 3, 4, 6), groups=2), believe((4, 4, 4, 6), axes=())):
        check_moved(function, x, 2)


@covers(F.channel_shuffle)
@given(x=beliefs(ranks=(3, 4, 5), channels=(6,)), groups=st.sampled_from([1, 2, 3, 6]))
def test_channel_shuffle(function, x, groups):
    check_moved(function, x, groups)


# -- sliding windows -----------------------------------------------------------------------------------


@covers(torch.Tensor.unfold)
@pytest.mark.parametrize("dimension", [1, 2, -1])
@pytest.mark.parametrize("axes", [(1,), (2,), (1, 2, 3)])
def test_windows(function, dimension, axes):
    check_moved(function, believe((2, 6, 6, 6), axes=axes), dimension, 3, 2)


@covers(F.unfold)
@pytest.mark.parametrize("kernel", [3, (2, 3)])
def test_im2col(function, kernel):
    check_moved(function, believe((2, 3, 6, 6), groups=2), kernel, stride=2)


# -- picked by an index ------------------------------------------------------------------------------


@covers(*aliases("gather", "take_along_dim"))
def test_elements_that_an_index_picks(function):
    x, index = believe((2000, 4), groups=2), torch.randint(2000, (3000, 4), generator=torch.Generator().manual_seed(0))
    given = (index, 0) if "take" in function.__name__ else (0, index)
    check_draws(function, x, *given)
    assert RULES[function](x, *given).mean.shape == (1, 4)


def test_picking_needs_an_axis_and_a_known_index():
    x = believe((6, 4))
    assert "all axes" in RULES[torch.take_along_dim](x, torch.zeros(3, dtype=torch.long)).reason


def test_samples_of_one_belief_stay_one_belief():
    """However many an index picks, as the ends of a graph's edges."""
    x, edges = believe((6, 4)), torch.randint(6, (50,))
    for y in (RULES[torch.Tensor.__getitem__](x, edges), RULES[torch.index_select](x, 0, edges)):
        assert y.mean.shape == (1, 4)
        assert torch.equal(y.var, x.var)
        assert y is not x, "it is about other samples, and gets their shape"
    assert RULES[torch.Tensor.__getitem__](x, edges.view(5, 10)).mean.shape == (1, 1, 4)


# -- windows put back --------------------------------------------------------------------------------


@covers(F.fold)
def test_col2im(function):
    x = believe((2**12, 3 * 4, 16), groups=2)
    check_draws(function, x, 8, 2, stride=2, groups=2)
    check_draws(function, believe((2**12, 3 * 4, 9)), 4, 2, stride=1, effective=1 / 4)
    assert RULES[function](x, 8, 2, stride=2).mean.shape == (2, 3, 1, 1)
    check_unknown("without a batch", function, believe((3 * 4, 16)), 8, 2, stride=2)


def test_padding_along_an_axis_that_channels_were_flattened_into():
    y = Gaussian(torch.arange(8.0).view(1, 1, 8), torch.ones(1, 1, 8), (2, 4, 8 * 16))  # 8 blocks of 16
    padded = RULES[F.pad](y, (16, 0), value=100.0).per_channel(1)
    mean = (16 * 100 + 16 * 28) / (9 * 16)
    torch.testing.assert_close(padded.mean, torch.full((1, 1), mean))  # of each of the four


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_by_pixels_where_the_belief_varies(mode):
    check_unknown(mode, F.pad, believe((4, 2, 6, 6), axes=(1, 2, 3)), (1, 1, 1, 1), mode)


def test_a_type_that_rounds_by_its_name():
    check_unknown("rounded", torch.Tensor.to, believe((4, 3)), dtype=torch.int64)


def test_types_by_their_names():
    x = believe((4, 3))
    for kind in ("torch.DoubleTensor", "torch.HalfTensor", "torch.FloatTensor"):
        assert RULES[torch.Tensor.type](x, kind) is x


def test_channels_of_samples_with_one_belief_are_picked():
    check_moved(torch.index_select, believe((4, 3, 2)), 1, torch.tensor([2, 0]))


def test_axis_is_another_name_for_dim():
    x, y = believe((4, 3)), believe((4, 2), 1)
    assert RULES[torch.cat]([x, y], axis=1).mean.shape == (1, 5)


def test_groups_stay_where_samples_are_repeated():
    y = RULES[torch.repeat_interleave](believe((4, 2), groups=2), 3, 0)
    assert y.mean.shape == (2, 2)


def test_unfold_by_keywords():
    unfolded = exact(Step(torch.Tensor.unfold, (believe((1, 6, 3), axes=(1,)),), {"dimension": 1, "size": 3, "step": 2},
                          (1, 2, 3, 3)))  # fmt: skip
    assert unfolded.mean.shape == (1, 2, 1, 3)


@covers(*aliases("tile"))
def test_tile(function):
    x = believe((4, 3, 2), axes=(1, 2))
    check_moved(function, x, (2, 3))
    check_moved(function, x, (2, 1, 2, 3))
    assert torch.equal(RULES[torch.tile](x, dims=(2,)).mean, x.mean.repeat(1, 1, 2))


@covers(*aliases("rot90"))
@pytest.mark.parametrize("axes", [(1, 2), (1,), (1, 2, 3)])
def test_rot90(function, axes):
    x = believe((6, 3, 4, 5), axes=axes)
    check_moved(function, x, 1, (2, 3))
    check_moved(function, x, 3, (-1, 1))


@covers(*aliases("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine",
                 "fused_moving_avg_obs_fake_quant"))  # fmt: skip
def test_quantized_networks_in_training(function):
    x = believe((6, 3, 4, 5))
    assert RULES[function](x, 0.1, 0, 0, 255) is x
