"""Products of two activations, softmax, and attention, which is made of them.

The two factors of a product are taken as independent of each other, as are the terms of its sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Shares, Unknown
from kalmannorm.rules.arithmetic import add, dropout, mul
from kalmannorm.rules.linear import through_matrix
from kalmannorm.rules.pointwise import quadrature
from kalmannorm.rules.shape import cut, in_one_shape
from kalmannorm.rules.table import Belief, aliases, belief_rule, rule

__all__ = ["contraction"]

# The softmax rule integrates over two variables, for each element of a belief.
_NODES = 64
_INNER_NODES = 33
_LARGE_MAP = 2048
# In place of minus infinity, which would meet a factor of zero.
_MASKED_SCORE = -1e30
# A number in a mask below this leaves a key out.
_LEAVES_OUT = -1e4
# Scores with a larger standard deviation count as if they had this one, as the nodes would be too far apart.
_SPREAD = 8.0


def contraction(equation: str, x: Gaussian | Tensor, y: Gaussian | Tensor) -> Gaussian:
    """A sum of products, ``z = sum x y``, in Einstein's notation without an ellipsis.

    Mean ``sum m1 m2`` and variance ``sum (v1 v2 + v1 m2^2 + v2 m1^2)``. What all elements share passes unchanged where
    the other factor is a softmax along an axis that is summed over, so ``m`` is then the deviation from their mean.
    """
    inputs, _, output = equation.partition("->")
    first, _, second = inputs.partition(",")
    shared = [_shared_axes(*each, output) for each in ((y, second, first), (x, first, second))]
    x, y = (_factor(t, labels, output) for t, labels in ((x, first), (y, second)))
    for label in set(first) & set(second):
        d, e = first.index(label), second.index(label)
        if 1 not in (x.mean.shape[d], y.mean.shape[e]) and x.mean.shape[d] != y.mean.shape[e]:
            x, y = x.full([d]), y.full([e])
    mean = torch.einsum(equation, x.mean, y.mean)
    a, b = (
        t.mean - t.mean.mean(axes, keepdim=True) if axes else t.mean for t, axes in zip((x, y), shared, strict=True)
    )
    # v1 (v2 + m2^2) + m1^2 v2: two sums and not three.
    var = torch.einsum(equation, x.var, y.var + b.square()) + torch.einsum(equation, a.square(), y.var)
    return Gaussian(mean, var)


def _shared_axes(factor: Gaussian | Tensor, labels: str, others: str, output: str) -> list[int]:
    """The axis of the other factor along which this one adds up to 1, if it is summed over."""
    label = labels[factor.dim] if isinstance(factor, Shares) else ""
    return [others.index(label)] if label and label in others and label not in output else []


def _factor(t: Gaussian | Tensor, labels: str, output: str) -> Gaussian:
    """A factor, expanded along the axes that are summed over."""
    if not isinstance(t, Gaussian):
        return Gaussian(t, torch.zeros_like(t))
    return in_one_shape(t).full([d for d, label in enumerate(labels) if label not in output])


def _in_one_type(*tensors: Gaussian | Tensor) -> list[Gaussian | Tensor]:
    """Known tensors in the type of the beliefs among them."""
    kind = next(t.mean.dtype for t in tensors if isinstance(t, Gaussian))
    return [t if isinstance(t, Gaussian) else t.to(kind) for t in tensors]


@rule(*aliases("einsum"))
def einsum(equation: str, *operands: Any) -> Belief:
    """Two factors; see :func:`contraction`."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return Unknown(f"einsum of {len(operands)} operands")
    equation = equation.replace(" ", "")
    if "..." in equation:
        equation = _without_ellipsis(equation, [t.ndim for t in operands])
    inputs, arrow, output = equation.partition("->")
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) - {","} if inputs.count(c) == 1))
    if any(len(set(labels)) < len(labels) for labels in inputs.split(",")):
        return Unknown(f"einsum along a diagonal: {equation}")
    return contraction(f"{inputs}->{output}", *_in_one_type(*operands))


def _without_ellipsis(equation: str, ranks: Sequence[int]) -> str:
    """The equation with unused letters for the axes that ``...`` stands for."""
    inputs, arrow, output = equation.partition("->")
    free = [letter for letter in ascii_letters if letter not in equation]
    terms = inputs.split(",")
    hidden = [rank - len(term.replace("...", "")) for rank, term in zip(ranks, terms, strict=True)]
    longest = "".join(free[: max(hidden)])
    filled = [term.replace("...", longest[len(longest) - n :]) for term, n in zip(terms, hidden, strict=True)]
    return ",".join(filled) + arrow + output.replace("...", longest)


@rule(*aliases("matmul", "__matmul__", "mm", "bmm"))
def matmul(x: Gaussian | Tensor, other: Gaussian | Tensor) -> Belief:
    """A matrix product, of two activations or with a known matrix; see :func:`contraction`."""
    if isinstance(x, Gaussian) and not isinstance(other, Gaussian) and other.ndim == 2:
        return through_matrix(x, other.T)
    if x.ndim < 2 or other.ndim < 2:
        return Unknown("a matrix product with a 1-d tensor")
    return _product(x, other)


def _product(x: Gaussian | Tensor, other: Gaussian | Tensor) -> Gaussian:
    """A product of matrices, or of batches of them."""
    return contraction(_without_ellipsis("...ab,...bc->...ac", [x.ndim, other.ndim]), *_in_one_type(x, other))


@rule(*aliases("baddbmm", "addmm"))
def baddbmm(input: Gaussian | Tensor, batch1: Gaussian | Tensor, batch2: Gaussian | Tensor, *,
            beta: float = 1, alpha: float = 1) -> Belief:  # fmt: skip
    """``beta input + alpha batch1 batch2``."""
    if not isinstance(batch1, Gaussian) and not isinstance(batch2, Gaussian):
        return add(mul(input, float(beta)), batch1 @ batch2, alpha=alpha)
    product = matmul(batch1, batch2)
    assert isinstance(product, Gaussian)  # of matrices
    product = mul(product, float(alpha))
    if beta == 0:
        return product
    return add(product, mul(input, float(beta)) if isinstance(input, Gaussian) else input * float(beta))


@belief_rule("glu")
def glu(x: Gaussian, dim: int = -1) -> Gaussian:
    """``a sigmoid(b)`` of the two halves of an axis."""
    first, gate = cut(torch.chunk, x, dim, 2, dim)
    return mul(first, quadrature(gate, torch.sigmoid))


@belief_rule("softmax")
def softmax(x: Gaussian, dim: int | None = None, *args: Any, **kwargs: Any) -> Belief:
    """Exact for independent elements of a standard deviation up to 8.

    By ``1 / S = integral of e^(-t S) dt`` for the sum ``S`` of exponentials.
    The moments of ``p_i = e^(x_i) / S`` are then products of expectations of one element each::

        E p_i   = integral of     E[e^(x_i)   e^(-t e^(x_i))] prod_(j != i) E[e^(-t e^(x_j))] dt
        E p_i^2 = integral of t   E[e^(2 x_i) e^(-t e^(x_i))] prod_(j != i) E[e^(-t e^(x_j))] dt

    In a large map, differences along ``dim`` count as variance, so that a row takes one integral.
    """
    return Unknown("softmax without a dim") if dim is None else Shares(_softmax(x, dim), dim % x.ndim)


@belief_rule("gumbel_softmax")
def gumbel_softmax(x: Gaussian, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Gaussian:
    """The softmax of ``(x + g) / tau``, with noise ``g`` of variance ``pi^2 / 6``; a ``hard`` one chooses by a softmax
    of ``x``.
    """
    if not hard:
        return Shares(_softmax(Gaussian(x.mean / tau, (x.var + math.pi**2 / 6) / tau**2, x.shape), dim), dim % x.ndim)
    share = _softmax(x, dim).mean
    return Shares(Gaussian(share, share * (1 - share)), dim % x.ndim)


@belief_rule("softmin")
def softmin(x: Gaussian, dim: int | None = None, *args: Any, **kwargs: Any) -> Belief:
    """``softmax(-x)``."""
    return softmax(Gaussian(-x.mean, x.var, x.shape), dim)


def _softmax(x: Gaussian, dim: int, met: Tensor | None = None) -> Gaussian:
    """The moments; see :func:`softmax`. Of all elements along ``dim``, only as many as ``met`` may take part."""
    dim = dim % x.ndim
    n: Any = x.shape[dim] if met is None else met
    x = Gaussian(x.mean.clamp_min(_MASKED_SCORE), x.var, x.shape)
    if max(x.mean.numel(), x.var.numel()) > _LARGE_MAP:
        x = x.pool([dim])
    mean, var = torch.broadcast_tensors(x.mean, x.var.clamp_max(_SPREAD**2))
    if mean.shape[dim] > 1:
        x = Gaussian(mean, var, x.shape).full([dim])
        mean, var = x.mean, x.var
    have = mean.shape[dim]
    moments, step = _exponential_moments(Gaussian(mean, var), dim, n)
    log_zeroth = moments[0].clamp_min(torch.finfo(mean.dtype).tiny).log()
    others = (log_zeroth.sum(dim, keepdim=True) * (n / have) - log_zeroth).exp()
    first, second = ((moment * others * step).sum(-1) for moment in moments[1:])
    total = first.sum(dim, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny) * (n / have)
    first, second = first / total, second / total
    return Gaussian(first, (second - first.square()).clamp_min(0))


def _exponential_moments(x: Gaussian, dim: int, n: Any) -> tuple[list[Tensor], Tensor]:
    """``E[w^k e^(-w)]`` of ``w = t e^x``, for ``k`` 0, 1, 2, at nodes of ``log t`` on a new last axis.

    Returns these and the distance between the nodes.
    """
    top, std = (t.detach().amax(dim, keepdim=True).unsqueeze(-1) for t in (x.mean, x.std))
    # The sum of n exponentials lies between these two, but for a part in 10^5.
    log_n = n.log() if isinstance(n, Tensor) else math.log(n)
    low, high = -top - 5 * std - log_n - 12, -top + 5 * std + 3
    log_t = low + (high - low) * torch.linspace(0, 1, _NODES, device=std.device, dtype=std.dtype)
    z = torch.linspace(-6, 6, _INNER_NODES, device=std.device, dtype=std.dtype)
    density = torch.exp(-0.5 * z.square())
    log_w = log_t.unsqueeze(-1) + x.mean[..., None, None] + x.std[..., None, None] * z
    log_w = log_w.clamp_max(30)  # e^(-w) is 0 from there on, and its gradient must not be 0 times infinity
    decay = log_w.exp().neg()
    moments = [((k * log_w + decay).exp() * (density / density.sum())).sum(-1) for k in range(3)]
    return moments, (high - low) / (_NODES - 1)


def _keys_met(mask: Any, is_causal: bool, queries: int, keys: int, like: Tensor) -> Tensor | None:
    """How many keys a query meets, or None for all: the harmonic mean over queries, as a mean of ``n`` varies by
    ``v / n``. Nothing waits for the mask's values.
    """
    if is_causal:
        met = torch.arange(1, queries + 1, device=like.device).clamp_max(keys)
    elif isinstance(mask, Tensor):
        stays = mask if mask.dtype == torch.bool else mask > _LEAVES_OUT
        met = stays.expand(*stays.shape[:-1], keys).sum(-1)
    else:
        return None
    return met.clamp_min(1).to(like.dtype).reciprocal().mean().reciprocal()


def _for_all_queries(x: Gaussian, heads: int) -> Gaussian:
    """Keys or values of which each head serves several of the queries' heads."""
    axis = x.ndim - 3
    repeated = x.full([axis]).map(lambda t: t.repeat_interleave(heads // x.shape[axis], axis))
    return repeated.of((*x.shape[:axis], heads, *x.shape[axis + 1 :]))


@rule(*aliases("scaled_dot_product_attention"))
def attention(query: Gaussian | Tensor, key: Gaussian | Tensor, value: Gaussian | Tensor,
              attn_mask: Gaussian | Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> Belief:  # fmt: skip
    """``softmax(scale q k^T + mask) v``.

    The weights add up to 1, so the mean of the values over keys passes unchanged. Only deviations from it
    are summed as products of independent factors. Behind a mask all queries meet the same number of keys, see
    :func:`_keys_met`, and any key is as likely as another to be one of them.
    """
    if not isinstance(query, Gaussian) or not isinstance(key, Gaussian) or not isinstance(value, Gaussian):
        return Unknown("attention with a query, key or value that does not depend on the input")
    if enable_gqa:
        key, value = (_for_all_queries(each, query.shape[-3]) for each in (key, value))
    keys = key.shape[-2]
    met = _keys_met(attn_mask, is_causal, query.shape[-2], keys, query.mean)
    if met is not None and isinstance(attn_mask, Tensor):
        attn_mask = None if attn_mask.dtype == torch.bool else attn_mask.masked_fill(attn_mask <= _LEAVES_OUT, 0.0)
    turned = key.map(lambda t: t.transpose(-1, -2)).of((*key.shape[:-2], key.shape[-1], key.shape[-2]))
    scores = mul(_product(query, turned), 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = scores if attn_mask is None else add(scores, attn_mask)
    shape = (*query.shape[:-1], keys)
    weights = _softmax(scores.of(shape), -1, met)
    if met is not None:  # the others have a weight of zero
        mean = weights.mean * (met / keys)
        weights = Gaussian(mean, (weights.var + weights.mean.square()) * (met / keys) - mean.square())
    dropped = dropout(weights, dropout_p)
    common = value.mean.mean(-2, keepdim=True)
    mixed = _product(dropped.of(shape), Gaussian(value.mean - common, value.var, value.shape))
    # Dropout changes the sum of the weights, and so the share of the common mean.
    lost = (dropped.var - weights.var).sum(-1, keepdim=True) * (shape[-1] // dropped.var.shape[-1])
    return Gaussian(mixed.mean + common, mixed.var + lost * common.square())


def _one_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """Both masks as :func:`attention` takes one: true where a query meets a key, or added to the scores."""
    masks = [] if attn_mask is None else [attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, heads))]
    masks += [] if key_padding_mask is None else [key_padding_mask[:, None, None]]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~functools.reduce(torch.logical_or, masks)
    kind = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    numbers = [torch.zeros_like(mask, dtype=kind).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
               for mask in masks]  # fmt: skip
    return functools.reduce(torch.add, numbers)


@rule(torch.nn.functional.multi_head_attention_forward)
def multi_head_attention(
    query: Gaussian | Tensor, key: Gaussian | Tensor, value: Gaussian | Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: object, bias_v: object, add_zero_attn: bool,
    dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """``nn.MultiheadAttention``, of ``(time, N, channels)``: three linear maps, :func:`attention`, and another map."""
    if in_proj_weight is None or bias_k is not None or add_zero_attn:
        return Unknown("attention with keys of another size, or with added ones")
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    heads = []
    for x, weight, bias in zip((query, key, value), in_proj_weight.chunk(3), biases, strict=True):
        if not isinstance(x, Gaussian) or x.ndim != 3:
            return Unknown("attention without a batch, or with a query, key or value that does not depend on the input")
        time, samples, channels = x.shape
        projected = through_matrix(x.map(lambda t: t.transpose(0, 1)).of((samples, time, channels)), weight, bias)
        split = projected.full([2]).map(lambda t: t.unflatten(2, (num_heads, -1)).transpose(1, 2))
        heads.append(split.of((samples, num_heads, time, weight.shape[0] // num_heads)))
    mask = _one_mask(attn_mask, key_padding_mask, num_heads)
    mixed = attention(heads[0], heads[1], heads[2], mask, dropout_p if training else 0.0)
    assert isinstance(mixed, Gaussian)  # of activations
    merged = mixed.full([1, 3]).map(lambda t: t.transpose(1, 2).flatten(2))
    output = through_matrix(merged.of((samples, query.shape[0], embed_dim_to_check)), out_proj_weight, out_proj_bias)
    return output.map(lambda t: t.transpose(0, 1)), Unknown("the weights of an attention")
