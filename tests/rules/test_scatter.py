"""Terms that an index sends to rows, and masks, against draws."""

import math

import pytest
import torch
from drawing import agree, believe, check_draws, check_unknown, covers, draw_through, values
from networks import made_of
from torch import nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES, aliases


@covers(*aliases("scatter_add", "scatter_add_", "index_add", "index_add_"))
def test_sums_over_neighbours(function):
    index = torch.cat([torch.arange(4000), torch.arange(2000).repeat(8)])  # half of the rows get 1 term, half 9
    terms, into = believe((20_000, 3)), torch.zeros(4000, 3, dtype=torch.float64)
    named = index if "index" in function.__name__ else index[:, None].expand(-1, 3)
    check_draws(function, into, 0, named, terms)
    both = RULES[function](believe((4000, 3), seed=1), 0, named, terms)
    alone = RULES[function](into, 0, named, terms)
    torch.testing.assert_close(both.var, alone.var + believe((4000, 3), seed=1).var)
    assert "first axis" in RULES[function](into, 1, named, terms).reason


@covers(*aliases("scatter", "scatter_", "index_reduce", "index_reduce_", "segment_reduce"))
def test_what_an_index_sends_otherwise_is_unknown(function):
    assert "other than a sum" in RULES[function](believe((4, 3)), 0, torch.zeros(4), torch.zeros(4, 3)).reason


@covers(*aliases("scatter_reduce", "scatter_reduce_"))
@pytest.mark.parametrize("reduce", ["mean", "amax", "amin"])
def test_means_and_extremes_over_neighbours(function, reduce):
    """A quarter of the rows gets 1 term, a quarter 9, a quarter 100 and the last one none."""
    rows = torch.arange(1000)
    index = torch.cat([rows, (1000 + rows).repeat(9), (2000 + rows).repeat(100)])
    terms, zeros = believe((len(index), 3)), torch.zeros(4000, 3, dtype=torch.float64)
    named = index[:, None].expand(-1, 3)
    got = RULES[function](zeros, 0, named, terms, reduce, include_self=False)
    drawn = function(zeros.clone(), 0, named, terms.draw(terms.shape), reduce, include_self=False)
    var, mean = torch.var_mean(drawn, 0)
    # That 100 count as 64 moves the largest by 0.1 deviations.
    torch.testing.assert_close(got.mean[0], mean, atol=0.1, rtol=0.03)
    torch.testing.assert_close(got.var[0], var, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("function", aliases("scatter_reduce"))
def test_reductions_without_a_rule(function):
    x, index = believe((6, 3)), torch.zeros(6, 3, dtype=torch.long)
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    for into, options in ((zeros, {}), (believe((4, 3)), {"include_self": False})):
        check_unknown("other than a sum", function, into, 0, index, x, "amax", **options)
    check_unknown("other than a sum", function, believe((4, 3)), 0, index, x, "sum", include_self=False)
    check_unknown("other than a sum", function, zeros, 0, index, x, "prod", include_self=False)
    total = RULES[function](zeros, 0, index, x, "sum")
    torch.testing.assert_close(total.mean, RULES[torch.scatter_add](zeros, 0, index, x).mean)


def test_reductions_in_place_say_why_they_are_unknown():
    """The zeros that a graph layer sends its messages to are not "changed in place by an activation"."""
    model = made_of(
        lambda self, x, index: self.norm(torch.zeros(4, 3).scatter_reduce_(0, index, x, "prod")), norm=nn.BatchNorm1d(3)
    )
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    (row,) = kn.describe(model, torch.randn(6, 3), torch.zeros(6, 3, dtype=torch.long)).rows
    assert "other than a sum" in row.reason


@pytest.mark.parametrize("function", [torch.scatter_add, torch.index_add])
def test_sums_onto_known_rows(function):
    """A quarter of the rows gets 1 term, a quarter 9 and half none."""
    index = torch.cat([torch.arange(1000), 1000 + torch.arange(1000).repeat(9)])
    terms, into = believe((len(index), 3)), values(4000, 3)
    named = index if function is torch.index_add else index[:, None].expand(-1, 3)
    got, drawn = RULES[function](into, 0, named, terms), function(into, 0, named, terms.draw(terms.shape))
    var, mean = torch.var_mean(drawn, 0)
    # The rule takes a row's values as independent of the number of its terms; among 4000 rows they nearly are.
    torch.testing.assert_close((got.mean[0], got.var[0]), (mean, var), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("function", aliases("scatter_reduce"))
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin"])
def test_rows_without_neighbours_keep_their_values(function, reduce):
    """A quarter of the rows gets 1 term, a quarter 9 and half none."""
    index = torch.cat([torch.arange(1000), 1000 + torch.arange(1000).repeat(9)])[:, None].expand(-1, 3)
    terms, into = believe((len(index), 3)), 3 + values(4000, 3)
    got = RULES[function](into, 0, index, terms, reduce, include_self=False)
    drawn = function(into, 0, index, terms.draw(terms.shape), reduce, include_self=False)
    var, mean = torch.var_mean(drawn, 0)
    torch.testing.assert_close((got.mean[0], got.var[0]), (mean, var), atol=0.1, rtol=0.05)


def test_known_rows_that_were_overwritten_are_taken_as_zero():
    """When the rule is called, an in-place function has changed them."""
    index, terms = torch.zeros(6, 3, dtype=torch.long), believe((6, 3))
    for function, rest in ((torch.Tensor.scatter_add_, ()), (torch.Tensor.scatter_reduce_, ("mean",))):
        options = {"include_self": False} if rest else {}
        got = RULES[function](torch.ones(4, 3).double(), 0, index, terms, *rest, **options)
        zeros = torch.zeros(4, 3).double()
        assert torch.equal(got.mean, RULES[function](zeros, 0, index, terms, *rest, **options).mean)


# -- masks -------------------------------------------------------------------------------------------


@covers(*aliases("masked_fill", "masked_fill_"))
def test_masked_fill(function):
    x = believe((2**15, 3, 16), groups=2)
    mask = torch.arange(16) % 4 == 0
    check_draws(function, x, mask, 2.0, groups=2)
    assert RULES[function](x, mask, 2.0).mean.shape == (2, 3, 1)
    ragged = torch.arange(16) < torch.randint(1, 17, (2**15, 1, 1), generator=torch.Generator().manual_seed(0))
    check_draws(function, believe((2**15, 3, 16)), ragged, -1.0)
    assert RULES[function](x, mask, -math.inf) is x
    chosen = RULES[torch.gt](believe((2**15, 3, 16), seed=1), 0.0)
    assert torch.equal(RULES[function](x, chosen, 2.0).var, RULES[torch.where](chosen, 2.0, x).var)


@pytest.mark.parametrize("other", [0.5, "channels", "activation"])
@covers(torch.where, torch.Tensor.where)
def test_where(function, other):
    x = believe((2**15, 3, 16), groups=2)
    y = {"channels": values(3, 1), "activation": believe((2**15, 3, 16), 7)}.get(other, other)
    ragged = torch.arange(16) < torch.randint(1, 17, (2**15, 1, 1), generator=torch.Generator().manual_seed(0))
    for mask in (torch.arange(16) % 4 == 0, torch.tensor([True, False, False])[:, None], ragged):
        check_draws(function, *((mask, x) if function is torch.where else (x, mask)), y, groups=2)


def test_where_with_a_mask_alone():
    check_unknown("the places where a mask is true", torch.where, believe((4, 3)))


def test_where_by_a_mask_of_another_activation():
    x, gate = believe((2**15, 3, 16)), believe((2**15, 3, 16), 3)

    def chosen(gate, x):
        return torch.where(gate > 0.3, x, 2.0)

    belief = RULES[torch.where](RULES[torch.gt](gate, 0.3), x, 2.0)
    agree(belief, draw_through(chosen, (gate, x), {}))


def test_where_of_as_good_as_infinity():
    x, mask = believe((4, 3, 16)), torch.arange(16) % 4 == 0
    assert RULES[torch.where](mask, x, -1e9) is x
    assert RULES[torch.where](mask, math.inf, x) is x


def test_masked_fill_of_some_channels():
    x, mask = believe((2**15, 3, 16)), torch.tensor([True, False, False])[:, None]
    check_draws(torch.masked_fill, x, mask, 2.0)
    pairs, four = believe((2**15, 2, 16)), torch.tensor([True, False, False, True])[:, None]
    moved = RULES[torch.masked_fill](pairs.of((2**15, 4, 16)), four, 2.0)
    assert torch.equal(moved.mean[0, :, 0], torch.tensor([2.0, *pairs.mean[0, :, 0], 2.0]).to(moved.mean))


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float16).min, torch.finfo(torch.float32).min])
def test_masked_fill_of_as_good_as_minus_infinity(value):
    """As networks write it before a softmax."""
    x = believe((4, 3, 16))
    assert RULES[torch.masked_fill](x, torch.arange(16) % 4 == 0, value) is x


def test_index_add_with_a_factor():
    index, into, x = torch.tensor([0, 0, 1]), torch.zeros(2, 3).double(), believe((3, 3))
    once, thrice = (RULES[torch.index_add](into, 0, index, x, alpha=a) for a in (1.0, -3.0))
    torch.testing.assert_close((thrice.mean, thrice.var), (-3 * once.mean, 9 * once.var))


def test_known_rows_keep_the_values_of_their_channels():
    index, x = torch.zeros(4, 3, dtype=torch.long), believe((4, 3))
    into = torch.tensor([[1.0, 5.0, -7.0]]).double().expand(4, 3)
    moved, alone = (RULES[torch.scatter_add](t, 0, index, x) for t in (into, torch.zeros(4, 3).double()))
    torch.testing.assert_close((moved.mean, moved.var), (alone.mean + into[:1], alone.var))


def test_few_rows_of_different_numbers_of_terms():
    index, x = torch.tensor([0, 0, 0, 1]), believe((4, 3))
    y = RULES[torch.index_add](torch.zeros(2, 3).double(), 0, index, x)
    torch.testing.assert_close(y.var, 2 * x.var + x.mean.square())


def test_reductions_along_another_axis_are_unknown():
    zeros, index = torch.zeros(4, 3).double(), torch.zeros(4, 3, dtype=torch.long)
    check_unknown(
        "other than a sum", torch.scatter_reduce, zeros, 1, index, believe((4, 3)), "mean", include_self=False
    )


def test_masked_fill_by_sample_in_groups():
    ragged = torch.arange(16) < torch.randint(1, 17, (2**12, 1, 1), generator=torch.Generator().manual_seed(0))
    check_draws(torch.masked_fill, believe((2**12, 3, 16), groups=2), ragged, -1.0, groups=2)


def test_masked_fill_of_plus_infinity():
    x = believe((4, 3, 16))
    assert RULES[torch.masked_fill](x, torch.arange(16) > 3, math.inf) is x


def test_rows_of_three_axes_keep_the_values_of_their_channels():
    index, x = torch.zeros(4, dtype=torch.long), believe((4, 3, 2))
    into = torch.tensor([1.0, 5.0, -7.0]).double()[:, None] + torch.tensor([0.0, 2.0]).double()
    y = RULES[torch.index_add](into.expand(4, 3, 2), 0, index, x)
    assert y.mean.shape == (1, 3, 1)


# -- assignment --------------------------------------------------------------------------------------

_WHOLE = slice(None)


def _assigned(x, index, value):
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(("index", "value"), [
    ((_WHOLE, _WHOLE, slice(0, 4)), believe((2**12, 6, 4, 4), 2, 2, axes=(1, 2))),
    ((..., slice(0, 4), _WHOLE), believe((2**12, 6, 4, 4), 2, 2)),
    ((_WHOLE, _WHOLE, 2), believe((2**12, 6, 4), 2, 2)),
    ((_WHOLE, -1), believe((2**12, 5, 4), 2, 2, axes=())),
    ((_WHOLE, _WHOLE, 2), 0.5),
    ((_WHOLE, _WHOLE, 2), values(6, 1)),
    ((_WHOLE, 0), values(1, 1, 1, 5, 4)),
    (slice(0, 2**11), believe((2**11, 6, 5, 4), 3)),
    ((_WHOLE, slice(None, None, 2)), believe((2**12, 3, 5, 4), 3, 4)),
    (..., believe((2**12, 6, 5, 4), 3, 2)),
    ((_WHOLE, _WHOLE, _WHOLE, slice(1, 3)), believe((5, 2), 3, axes=())),
])  # fmt: skip
@covers(torch.Tensor.__setitem__)
def test_assignment(function, index, value, monkeypatch):
    monkeypatch.setitem(RULES, _assigned, RULES[function])
    effective = 2**-12 if isinstance(value, Gaussian) and value.ndim == 2 else 1.0
    for x in (believe((2**12, 6, 5, 4), 1, 2, axes=(2,)), believe((2**12, 6, 5, 4), 1, axes=())):
        check_draws(_assigned, x, index, value, groups=2, effective=effective)
    if isinstance(value, Gaussian):
        check_draws(_assigned, torch.zeros(2**12, 6, 5, 4).double(), index, value, groups=2, effective=effective)


def test_assignment_by_an_index_without_a_rule():
    x = believe((4, 3, 5))
    for index in (torch.tensor([[1]]), (_WHOLE, [0, 2]), None, True):
        check_unknown("other than by numbers, slices", torch.Tensor.__setitem__, x, index, x)


def test_assignment_leaves_the_belief_before():
    """Other steps may need it."""
    x = believe((4, 3, 5), axes=(1, 2))
    before = x.mean.clone()
    RULES[torch.Tensor.__setitem__](x, (_WHOLE, 0), 7.0)
    assert torch.equal(x.mean, before)


def test_rows_that_an_index_assigns():
    """Of a known tensor, by two indices and a mask; of an activation, by one."""
    drawn = [believe((n, 3, 4), seed) for n, seed in ((2**13, 0), (2**12, 1), (2**12, 2))]
    order = torch.randperm(2**15, generator=torch.Generator().manual_seed(0))
    rows = [order[: 2**13], order[2**13 : 2**13 + 2**12], torch.zeros(2**15, dtype=torch.bool)]
    rows[2][order[-(2**12) :]] = True

    def filled(x, *parts):
        for index, part in zip(rows, parts, strict=False):
            known = not isinstance(part, Gaussian)
            x = _assigned(x, index, part) if known else RULES[torch.Tensor.__setitem__](x, index, part).of(x.shape)
        return x

    for x, parts in ((torch.zeros(2**15, 3, 4).double(), drawn), (believe((2**15, 3, 4), 5), drawn[:1])):
        believed = filled(x, *parts)
        generator = torch.Generator().manual_seed(1)
        whole = x if isinstance(x, torch.Tensor) else x.draw(x.shape, generator)
        agree(believed, filled(whole, *(part.draw(part.shape, generator) for part in parts)), scale=3)


def test_rows_assigned_a_number():
    x = believe((8, 3))
    got = RULES[torch.Tensor.__setitem__](x, torch.tensor([0, 1]), 2.0)
    torch.testing.assert_close(got.mean, 0.75 * x.mean + 0.5)
    torch.testing.assert_close(got.var, 0.75 * x.var + 0.25 * 0.75 * (x.mean - 2).square())


def test_rows_assigned_into_what_a_layer_returned():
    """Whose belief is of a type of its own, as is that of a ReLU."""

    def forward(self, x):
        y = self.first(x)
        y[torch.tensor([0, 1])] = 0.0
        z = torch.relu(y).clone()
        z[torch.tensor([True, False, False, False])] = z[1:2] * 2
        return self.second(z)

    model = kn.convert(made_of(forward, first=nn.BatchNorm1d(3), second=nn.BatchNorm1d(3)))
    *_, row = kn.describe(model, torch.randn(4, 3)).rows
    assert row.reason is None or not row.reason


def test_rows_assigned_infinity():
    x = believe((8, 3))
    assert RULES[torch.Tensor.__setitem__](x, torch.tensor([0, 1]), -math.inf) is x


def test_where_of_two_known():
    """A spike, a sign, a bias for scores."""
    x = believe((2**15, 3, 1))
    for first, second in ((1.0, -1.0), (torch.ones(()), 0.0), (torch.tensor([[2.0], [3.0], [4.0]]), torch.zeros(()))):
        got, above = RULES[torch.where](RULES[torch.gt](x, 0.0), first, second), x.draw(x.shape) > 0
        var, mean = torch.var_mean(torch.where(above, first, second), 0)
        torch.testing.assert_close((got.mean[0], got.var[0]), (mean.double(), var.double()), atol=0.05, rtol=0.05)
    assert torch.isfinite(RULES[torch.where](RULES[torch.gt](x, 0.0), -math.inf, 0.0).var).all()


@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_where_of_minus_infinity_in_a_tensor(least):
    x, mask = believe((4, 3, 16)), torch.arange(16) > 3
    for args in ((mask, x, torch.tensor(least)), (~mask, torch.tensor(least), x)):
        got = RULES[torch.where](*args)
        torch.testing.assert_close((got.mean, got.var), (x.mean, x.var))
