"""Sums, means and extremes of the terms that an index sends to each row, and elements that are replaced.

Graph networks sum the messages of a node's neighbours this way. Rows get different numbers of terms; the
belief is the mixture over all rows. The rules read the index of the first column and use it for all.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown, lengthen
from kalmannorm.rules.arithmetic import add, mul, pair
from kalmannorm.rules.shape import align, drop, in_one_shape, of_rank, summarize
from kalmannorm.rules.table import Belief, Rule, aliases, rule

_NOT_SUMMED = Unknown("what an index sends to a row, other than a sum, or a mean or an extreme into known rows")
# Rows with more terms count as having this many: the largest of more lies hardly higher.
_MOST = 64
_Value = Gaussian | Tensor | float | None


def is_as_infinite(value: object) -> bool:
    """Whether networks may write a number for infinity: -1e4, -1e9 or the least number of a type."""
    return isinstance(value, int | float) and abs(value) >= 1e4


def _is_far(number: Tensor) -> Tensor:
    """As :func:`is_as_infinite`, of a number in a tensor, without a look at it."""
    return number.reshape(()).abs() >= 1e4


def _without_infinity(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    return torch.where(_is_far(value), 0.0, value)


def _terms_by_row(index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """How many terms each row gets."""
    to = index.reshape(index.shape[0], -1)[:, 0]
    counts = torch.zeros(rows, dtype=dtype, device=to.device)
    return counts.index_add_(0, to, counts.new_ones(()).expand(to.shape[0]))


def _rows(into: Tensor, like: Gaussian, counted: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """First two moments of known rows along the axes where ``like`` does not vary; rows not counted are zero."""
    if isinstance(counted, Tensor):
        counted = counted.to(like.mean.dtype).view(-1, *[1] * (into.ndim - 1))
    values = into * counted
    axes = [d for d in range(values.ndim) if like.mean.shape[d] == 1]
    return values.mean(axes, keepdim=True), values.square().mean(axes, keepdim=True)


def _sums(into: Gaussian | Tensor, dim: int, index: Tensor, terms: Gaussian | Tensor, weight: float = 1.0,
          include_self: bool = True) -> Belief:  # fmt: skip
    """Sums of ``d`` terms of mean ``m`` and variance ``v``, where ``d`` differs from row to row.

    Their mean is ``m E[d]``, their variance ``v E[d] + m^2 Var[d]``.
    """
    if not isinstance(terms, Gaussian) or dim % terms.ndim != 0:
        return Unknown("a sum of as many terms as an index names, not along the first axis or of known ones")
    x = terms.pool([0])
    counts = _terms_by_row(index, into.shape[0], x.mean.dtype)
    often, unevenly = counts.mean(), counts.var(correction=0)
    mean, var = weight * x.mean * often, weight**2 * (x.var * often + x.mean.square() * unevenly)
    if isinstance(into, Gaussian):
        before, sent = align([into, Gaussian(mean, var)])
        return Gaussian(before.mean + sent.mean, before.var + sent.var)
    first, second = _rows(into, x, 1.0 if include_self else counts == 0)
    var = var + second - first.square()
    if not include_self:  # only rows without terms keep their values
        var = var - 2 * mean * first
    return Gaussian(mean + first, var.clamp_min(0))


@rule(*aliases("scatter_add"))
def scatter_add(into: Gaussian | Tensor, dim: int, index: Tensor, src: Gaussian | Tensor) -> Belief:
    """Messages summed over the neighbours in a graph, and added to known rows or to an activation."""
    return _sums(into, dim, index, src)


@rule(*aliases("index_add"))
def index_add(into: Gaussian | Tensor, dim: int, index: Tensor, source: Gaussian | Tensor, *,
              alpha: float = 1.0) -> Belief:  # fmt: skip
    """As :func:`scatter_add`."""
    return _sums(into, dim, index, source, alpha)


def _of_neighbours(counts: Tensor, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    """The share of rows that get a term, and two moments of the mean or of the largest of ``counts`` standard normals.

    The moments are averaged over all rows, where a row without a term counts as zero.
    """
    numbers = torch.arange(_MOST + 1, dtype=counts.dtype, device=counts.device)
    share = torch.zeros_like(numbers).index_add_(0, counts.clamp_max(_MOST).long(), torch.ones_like(counts))
    share = share / counts.shape[0]
    if reduce == "mean":
        first, second = torch.zeros_like(numbers), 1 / numbers.clamp_min(1)
    else:
        z = torch.linspace(-8, 8, 257, dtype=counts.dtype, device=counts.device)
        weights = (-0.5 * z.square() + (numbers.unsqueeze(1) - 1) * torch.special.log_ndtr(z)).exp()
        weights = weights / weights.sum(1, keepdim=True)
        first, second = (weights * z).sum(1), (weights * z.square()).sum(1)
    return 1 - share[0], (share * first)[1:].sum(), (share * second)[1:].sum()


@rule(*aliases("scatter_reduce"))
def scatter_reduce(into: Gaussian | Tensor, dim: int, index: Tensor, src: Gaussian | Tensor, reduce: str, *,
                   include_self: bool = True) -> Belief:  # fmt: skip
    """The mean, the largest or the smallest of a row's neighbours in a graph; a row without any keeps its values."""
    if reduce == "sum" and (include_self or not isinstance(into, Gaussian)):
        return _sums(into, dim, index, src, include_self=include_self)
    if include_self or isinstance(into, Gaussian) or reduce not in ("mean", "amax", "amin"):
        return _NOT_SUMMED
    if not isinstance(src, Gaussian) or dim % src.ndim != 0:
        return _NOT_SUMMED
    x = src.pool([0])
    counts = _terms_by_row(index, into.shape[0], x.mean.dtype)
    some, first, second = _of_neighbours(counts, reduce)
    first = -first if reduce == "amin" else first
    kept_mean, kept_square = _rows(into, x, counts == 0)
    mean = some * x.mean + x.std * first + kept_mean
    square = some * x.mean.square() + 2 * x.mean * x.std * first + x.var * second + kept_square
    return Gaussian(mean, (square - mean.square()).clamp_min(0))


def _of_zeros(known_rows: Rule) -> Rule:
    @functools.wraps(known_rows)
    def in_place(into: Gaussian | Tensor, *args: Any, **kwargs: Any) -> Belief:
        belief: Belief = known_rows(into if isinstance(into, Gaussian) else torch.zeros_like(into), *args, **kwargs)
        return belief

    return in_place


# In place, these have overwritten known rows before their rule is called. Such rows are taken to have been zero.
rule(*aliases("scatter_add_"))(_of_zeros(scatter_add))
rule(*aliases("index_add_"))(_of_zeros(index_add))
rule(*aliases("scatter_reduce_"))(_of_zeros(scatter_reduce))


@rule(*aliases("scatter", "scatter_", "index_reduce", "index_reduce_", "segment_reduce"))
def scatter(x: Gaussian | Tensor, *args: Any, **kwargs: Any) -> Belief:
    """Rows that are replaced, or reduced in another way."""
    return _NOT_SUMMED


class _PartlyFilled(Gaussian):
    """The belief about rows of which some are zero still, until an index assigns them."""

    __slots__ = ()


def _rows_assigned(x: Gaussian, index: Tensor, value: Gaussian | Tensor | float) -> Gaussian:
    """The mixture of rows that an index (or a mask) assigns and of the others.

    Rows of zeros are taken to be assigned once: each time, others.
    """
    if is_as_infinite(value):
        return x  # as `where`
    named = index.to(x.mean.dtype).mean() if index.dtype == torch.bool else index.shape[0] / x.shape[0]
    value = summarize(value, x) if not isinstance(value, Gaussian) else of_rank(value, x.ndim)
    before, part = align([x.pool([0]), value.pool([0])])
    kept = 1.0 if isinstance(x, _PartlyFilled) else 1 - named
    mean = kept * before.mean + named * part.mean
    second = kept * (before.var + before.mean.square()) + named * (part.var + part.mean.square())
    kind = _PartlyFilled if isinstance(x, _PartlyFilled) else Gaussian  # not that of a layer or a ReLU
    return kind(mean, (second - mean.square()).clamp_min(0))


@rule(torch.Tensor.__setitem__)
def setitem(x: Gaussian | Tensor, index: Any, value: Gaussian | Tensor | float) -> Belief:
    """The belief after ``x[index] = value``: video networks shift some channels by a frame so.

    The rule takes numbers and slices for an index, or one that names rows: detectors collect regions of interest from
    several levels so. A known ``x`` holds zeros.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    names_rows = len(parts) == 1 and isinstance(parts[0], Tensor) and parts[0].ndim == 1
    if not (names_rows or all(p is Ellipsis or type(p) in (int, slice) for p in parts)):
        return Unknown("assigned in place, other than by numbers, slices and an index of rows")
    if not isinstance(x, Gaussian):
        assert isinstance(value, Gaussian)
        nothing = value.map(lambda t: t.new_zeros([1] * x.ndim))  # under vmap, not all moments may have its axis
        x = _PartlyFilled(nothing.mean, nothing.var, x.shape)
    if names_rows:
        return _rows_assigned(x, parts[0], value)
    place = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    parts[place : place + 1] = [slice(None)] * (len(x.shape) - sum(p is not Ellipsis for p in parts))
    sliced = [d for d, p in enumerate(parts) if isinstance(p, slice)]  # the axes of what is replaced
    x = in_one_shape(x.full([d for d, p in enumerate(parts) if p != slice(None)]))
    shape = [len(range(*parts[d].indices(x.shape[d]))) for d in sliced]
    if not isinstance(value, Gaussian):
        value = summarize(value, x.map(lambda t: t[tuple(parts)]))
    value = drop(value, range(value.ndim - len(shape)))  # axes of size 1 in front
    value = in_one_shape(of_rank(value, len(shape)).of(shape))
    for i, d in enumerate(sliced):  # bring both to one size along each axis
        have, its = x.mean.shape[d], value.mean.shape[i]
        if parts[d] != slice(None):
            value = value.full([i]) if its > 1 else value
        elif have == 1:
            x = Gaussian(lengthen(x.mean, d, its), lengthen(x.var, d, its), x.shape)
        elif its not in (1, have):
            x, value = x.full([d]), value.full([i])

    def assigned(into: Tensor, part: Tensor) -> Tensor:
        into = into.clone()
        into[tuple(parts)] = part
        return into

    return Gaussian(assigned(x.mean, value.mean), assigned(x.var, value.var))


def _of_two_known(mask: Gaussian, x: Tensor | float, y: Tensor | float) -> Belief:
    """``x`` where a computed mask is true, else ``y``: a spike, a sign."""
    first, second = (0.0 if is_as_infinite(each) else _without_infinity(each) for each in (x, y))
    return add(mul(mask, first - second), second)


@rule(torch.where)
def where(mask: Gaussian | Tensor, x: _Value = None, y: _Value = None) -> Belief:
    """The mixture of one belief, where a mask is true, and of another elsewhere; the mask is independent of both.

    Infinity, or nearly so, removes elements from a softmax, maximum or minimum that follows: the belief is then about
    the others.
    """
    if x is None or y is None:
        return Unknown("the places where a mask is true")
    for number, other in ((x, y), (y, x)):
        if is_as_infinite(number) and isinstance(other, Gaussian):
            return other
    if isinstance(mask, Gaussian) and not isinstance(x, Gaussian) and not isinstance(y, Gaussian):
        return _of_two_known(mask, x, y)
    first, second = (  # blocks of channels are written out
        in_one_shape(each.full([d for d in range(1, each.ndim) if each.mean.shape[d] not in (1, each.shape[d])]))
        for each in pair(*(_without_infinity(t) for t in (x, y)))
    )
    rank, groups, dtype = first.ndim, max(first.groups, second.groups), first.mean.dtype
    chosen = mask.mean if isinstance(mask, Gaussian) else mask.to(dtype)
    chosen = chosen.reshape(*[1] * (rank - chosen.ndim), *chosen.shape)
    alike = [d for d in range(rank) if first.mean.shape[d] == second.mean.shape[d] == 1]
    share = Gaussian(chosen, torch.zeros_like(chosen)).pool(alike).mean
    share = Gaussian(share, share).regroup(groups).mean
    for number, removed in ((x, 0.0), (y, 1.0)):
        if isinstance(number, Tensor) and number.numel() == 1:
            share = torch.where(_is_far(number), removed, share)
    mean = share * first.mean + (1 - share) * second.mean
    apart = (first.mean - second.mean).square()
    return Gaussian(mean, share * first.var + (1 - share) * second.var + share * (1 - share) * apart)


@rule(torch.Tensor.where)
def where_of(x: Gaussian | Tensor, mask: Gaussian | Tensor, y: Gaussian | Tensor | float) -> Belief:
    """:func:`where`, as a method."""
    return where(mask, x, y)


@rule(*aliases("masked_fill", "masked_fill_"))
def masked_fill(x: Gaussian | Tensor, mask: Gaussian | Tensor, value: Any) -> Belief:
    """A number where a mask is true, see :func:`where`."""
    return where(mask, value if isinstance(value, Gaussian) else float(value), x)
