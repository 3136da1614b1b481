"""Functions that move, cut, join or resize: the same move, made on the small tensors.

A belief has its activation's rank, so most rules here call the torch function itself on the mean and
on the variance, after they expand the axes that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Shares, Unknown, lengthen
from kalmannorm.rules.table import Belief, aliases, belief_rule, belief_rules, rule

__all__ = ["align", "summarize"]


def summarize(constant: Tensor | float, like: Gaussian) -> Gaussian:
    """The belief of a known tensor that meets ``like``: its values, without variance.

    A vector (one axis longer than 1) keeps its values. A map is summarized, along the axes where
    ``like`` does not vary, by its mean and variance there. Minus infinity removes an element from a
    softmax that follows, and counts as zero.
    """
    # A number is written by the device: a copy would wait for it, which no CUDA graph allows.
    values = constant.to(like.mean) if isinstance(constant, Tensor) else like.mean.new_full((), constant)
    values = values.reshape([*[1] * (like.ndim - values.ndim), *values.shape])
    like = of_rank(like, values.ndim)
    long = [d for d in range(values.ndim) if values.shape[d] > 1]
    if len(long) <= 1:
        return Gaussian(values, torch.zeros_like(values))
    values = values.masked_fill(values.isneginf(), 0.0)
    return Gaussian(values, torch.zeros_like(values)).pool([d for d in long if like.mean.shape[d] == 1])


def align(beliefs: Sequence[Gaussian], skip: int | None = None) -> list[Gaussian]:
    """Bring beliefs of one rank to one size along each axis but ``skip``."""
    beliefs = list(beliefs)
    for d in range(beliefs[0].ndim):
        sizes = {b.mean.shape[d] for b in beliefs} | {b.var.shape[d] for b in beliefs}
        if d == skip or len(sizes - {1}) <= 1:
            continue
        if any(max(sizes) % s for s in sizes):
            beliefs = [b.full([d]) for b in beliefs]
        else:
            beliefs = [
                Gaussian(lengthen(b.mean, d, max(sizes)), lengthen(b.var, d, max(sizes)), b.shape) for b in beliefs
            ]
    return beliefs


def in_one_shape(x: Gaussian) -> Gaussian:
    """The same belief, its mean and its variance of one shape."""
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Gaussian(mean, var, x.shape)


def of_rank(x: Gaussian, rank: int) -> Gaussian:
    """The same belief with axes of size 1 in front, as broadcasting adds them."""
    return x.map(lambda t: t.reshape([*[1] * (rank - t.ndim), *t.shape]))


def drop(x: Gaussian, axes: Sequence[int]) -> Gaussian:
    """The same belief without these axes, which have size 1."""
    return x.map(lambda t: t.reshape([n for d, n in enumerate(t.shape) if d not in axes]))


def axes_of(x: Gaussian, dims: Any = None) -> list[int]:
    """Axes as torch functions name them, counted from the front and sorted: all for None, one for an integer."""
    dims = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return sorted({d % x.ndim for d in dims})


def varies(x: Gaussian, dim: int) -> bool:
    """Whether a belief varies along an axis."""
    return max(x.mean.shape[dim], x.var.shape[dim]) > 1


def per_axis(value: Any, count: int) -> list[Any]:
    """An argument that is one value for all spatial axes, or one for each."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * (count // len(values))


def _ints(sizes: Sequence[Any]) -> list[Any]:
    """``f(1, 2)`` and ``f((1, 2))`` alike."""
    return list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int | torch.SymInt) else list(sizes)


# -- the belief as it is ---------------------------------------------------------------------------


@belief_rule("to", "type_as")
def to(x: Gaussian, *args: Any, **kwargs: Any) -> Belief:
    """To another device, memory format or type: the belief follows to the device."""
    given = (*args, *kwargs.values())
    kinds = [each.dtype if isinstance(each, Tensor) else each for each in given]
    if any(isinstance(kind, torch.dtype) and not kind.is_floating_point for kind in kinds):
        return Unknown("rounded to another type")
    device = kwargs.get("device", args[0] if args else None)
    if isinstance(device, Gaussian):
        device = device.mean.device
    elif isinstance(device, Tensor):
        device = device.device
    return x.map(lambda t: t.to(device)) if isinstance(device, str | int | torch.device) else x


@belief_rule("type")
def of_type(x: Gaussian, kind: Any, *args: Any, **kwargs: Any) -> Belief:
    """To another type, by itself or by its name."""
    floating = any(word in str(kind).lower() for word in ("float", "double", "half"))
    return x if floating else Unknown("rounded to another type")


@belief_rule("detach", "detach_", torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def detach(x: Gaussian) -> Gaussian:
    """Cut from the graph, as the activation is."""
    return x.detach()


# -- axes ------------------------------------------------------------------------------------------


def _on_both(function: Callable[..., Any]) -> Callable[..., Gaussian]:
    def moved(x: Gaussian, *args: Any, **kwargs: Any) -> Gaussian:
        """The function itself, of the mean and of the variance."""
        moves = x.moved if isinstance(x, Shares) else x.map
        return moves(lambda t: function(t, *args, **kwargs))

    return moved


_ALIKE: dict[Callable[..., Any], Callable[..., Any]] = {
    function: function
    for function in aliases("cpu", "cuda", "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis",
                            "unsqueeze", "t")
}  # fmt: skip
_ALIKE |= {
    # In place, they change the activation, but other steps still need the belief before.
    torch.Tensor.transpose_: torch.transpose,
    torch.Tensor.unsqueeze_: torch.unsqueeze,
    torch.Tensor.mT.__get__: lambda t: t.mT,  # type: ignore[attr-defined]
    torch.Tensor.T.__get__: lambda t: t.permute(*reversed(range(t.ndim))),  # type: ignore[attr-defined]
}
for _function, _move in _ALIKE.items():
    belief_rule(_function)(_on_both(_move))


@belief_rule("repeat")
def repeat(x: Gaussian, *sizes: Any) -> Gaussian:
    """Tile the axes along which the belief varies."""
    times = _ints(sizes)
    x = of_rank(x, len(times))
    return x.map(lambda t: t.repeat(*(n if size > 1 else 1 for n, size in zip(times, t.shape, strict=True))))


@belief_rule("tile")
def tile(x: Gaussian, *sizes: Any, **kwargs: Any) -> Gaussian:
    """As :func:`repeat`, where fewer sizes than axes are those of the last axes."""
    times = _ints(sizes or (kwargs["dims"],))
    return repeat(x, *[1] * (x.ndim - len(times)), *times)


@belief_rule("repeat_interleave")
def repeat_interleave(x: Gaussian, repeats: Any, dim: int | None = None, *, output_size: object = None) -> Belief:
    """Repeat each element along an axis; blocks of samples stay blocks."""
    if dim is None or not isinstance(repeats, int):
        return Unknown("elements repeated across axes, or by different numbers")
    if dim % x.ndim == 0 or not varies(x, dim):
        return Gaussian(x.mean, x.var)
    return x.full([dim % x.ndim]).map(lambda t: t.repeat_interleave(repeats, dim))


@belief_rule("flip")
def flip(x: Gaussian, *dims: Any, **kwargs: Any) -> Gaussian:
    """Reverse the axes along which the belief varies."""
    turned = [d for d in axes_of(x, _ints(dims or (kwargs["dims"],))) if varies(x, d)]
    return x.map(lambda t: t.flip(turned))


@belief_rule("rot90")
def rot90(x: Gaussian, k: int = 1, dims: Any = (0, 1)) -> Gaussian:
    """Turn two axes by quarters of a circle."""
    turned = x.full([d % x.ndim for d in dims]) if any(varies(x, d) for d in dims) else x
    return turned.map(lambda t: t.rot90(k, dims))


@belief_rule("roll")
def roll(x: Gaussian, shifts: Any, dims: Any = None) -> Belief:
    """Shift the axes along which the belief varies."""
    if dims is None or dims == ():
        return Unknown("a roll across axes")
    shifts, dims = ([v] if isinstance(v, int) else v for v in (shifts, dims))
    moved = [(shift, d % x.ndim) for shift, d in zip(shifts, dims, strict=True) if varies(x, d)]
    if not moved:
        return Gaussian(x.mean, x.var)  # of other elements: not `x` itself, of which a sum would be twice
    shifts, dims = zip(*moved, strict=True)
    return x.full(dims).map(lambda t: t.roll(shifts, dims))


# -- reshaping -------------------------------------------------------------------------------------


def reshape_to(x: Gaussian, shape: Sequence[int]) -> Gaussian:
    """The belief of the activation reshaped to ``shape``.

    Matches up the shortest runs of old and new axes with equal products. A run along which the
    belief is constant stays constant; one that is only split or merged with constant axes keeps its
    blocks; any other is expanded.
    """
    shape = _resolve(shape, math.prod(x.shape))
    x = in_one_shape(x)
    sizes: list[int] = []
    for old, new in _matching_runs(x.shape, shape):
        belief = [x.mean.shape[d] for d in old]
        if all(n == 1 for n in belief):
            sizes += [1] * len(new)
        elif len(old) == len(new) == 1:
            sizes += belief
        elif all(n == 1 for n in belief[1:]) and shape[new[0]] % belief[0] == 0:
            sizes += [belief[0], *[1] * (len(new) - 1)]
        else:
            x = x.full(old)
            sizes += [shape[d] for d in new]
    return x.map(lambda t: t.reshape(sizes))


def _resolve(sizes: Sequence[int], total: int) -> list[int]:
    """Sizes with their -1 replaced."""
    known = math.prod([n for n in sizes if n != -1])
    return [total // max(known, 1) if n == -1 else n for n in sizes]


def _matching_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Split the axes of two shapes with the same number of elements into runs with equal products."""
    runs: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, second, left, right = i, j, 1, 1
        while True:
            if i < len(old) and (i == first or left < right):
                left *= old[i]
                i += 1
            elif j < len(new) and (j == second or right < left):
                right *= new[j]
                j += 1
            else:
                break
        runs.append((range(first, i), range(second, j)))
    return runs


@belief_rule("reshape", "view")
def reshape(x: Gaussian, *shape: Any, **kwargs: Any) -> Belief:
    """Reshape; see :func:`reshape_to`."""
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return Unknown("view as another type")
    return reshape_to(x, _ints(shape) if shape else list(kwargs.get("shape", kwargs.get("size", []))))


@belief_rule("flatten", "ravel")
def flatten(x: Gaussian, start_dim: int = 0, end_dim: int = -1) -> Gaussian:
    """Merge neighbouring axes: a channel's belief is repeated for each of its pixels."""
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return reshape_to(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


@belief_rule("unflatten")
def unflatten(x: Gaussian, dim: int, sizes: Sequence[int]) -> Gaussian:
    """Split an axis."""
    dim = dim % x.ndim
    return reshape_to(x, [*x.shape[:dim], *_resolve(sizes, x.shape[dim]), *x.shape[dim + 1 :]])


# -- cutting ---------------------------------------------------------------------------------------


@belief_rule("__getitem__")
def getitem(x: Gaussian, index: Any) -> Belief:
    """Indexing: slices along constant axes leave the belief as it is, and so do indices of samples."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not torch.compiler.is_compiling():  # numpy's arrays and numbers
        parts = [p if isinstance(p, Tensor) or not hasattr(p, "__array__") else torch.as_tensor(p) for p in parts]
    if masks := [i for i, p in enumerate(parts) if isinstance(p, Tensor) and p.dtype == torch.bool and p.ndim > 1]:
        before, indices = parts[: masks[0]], [p for p in parts if isinstance(p, Tensor | list)]
        if len(indices) > 1 or any(p is Ellipsis for p in before):
            return Unknown("a mask over several axes, behind an ellipsis or beside other indices")
        x = _merged(x, sum(p is not None for p in before), parts[masks[0]].ndim)
        parts[masks[0]] = slice(None)
    rest = x.ndim - sum(p is not None and p is not Ellipsis for p in parts)
    if not any(p is Ellipsis for p in parts):
        parts.append(Ellipsis)
    axis = 0
    for i, part in enumerate(parts):
        if part is Ellipsis:
            axis += rest
        elif part is not None:
            x, parts[i] = _index_of_axis(x, axis, part)
            axis += 1
    return x.map(lambda t: t[tuple(parts)])


def _merged(x: Gaussian, first: int, count: int) -> Gaussian:
    """The belief about an element of these axes, whichever it is: they become one."""
    axes = range(first, first + count)
    size = math.prod(x.shape[d] for d in axes)
    return drop(x.pool(axes), axes[1:]).of((*x.shape[:first], size, *x.shape[first + count :]))


def _index_of_axis(x: Gaussian, axis: int, part: Any) -> tuple[Gaussian, Any]:
    """The moments, written out along an axis where the index needs it, and the index for them there."""
    if isinstance(part, slice) and not varies(x, axis):
        return x, slice(None)
    if axis == 0 and isinstance(part, Tensor) and part.ndim > 0 and not varies(x, 0):
        return x, torch.zeros([1] * part.ndim, dtype=torch.long, device=x.mean.device)
    return (x if isinstance(part, slice) and part == slice(None) else x.full([axis])), part


def cut(function: Callable[..., Any], x: Gaussian, dim: int, /, *args: Any, **kwargs: Any) -> Any:
    """A function that cuts along ``dim``, of a belief that is expanded there. Returns a tuple where it does."""
    x = x.full([dim % x.ndim])
    means, variances = (function(t, *args, **kwargs) for t in (x.mean, x.var))
    if isinstance(means, Tensor):
        return Gaussian(means, variances)
    return tuple(Gaussian(m, v) for m, v in zip(means, variances, strict=True))


def _cutting(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    def pieces(x: Gaussian, *args: Any, **kwargs: Any) -> Any:
        """Expand the axis, and cut the belief there."""
        dim = args[position] if len(args) > position else kwargs.get("dim", 0)
        return cut(function, x, dim, *args, **kwargs)

    return pieces


# With the position of `dim` among the arguments that follow the tensor.
for _name, _position in [("chunk", 1), ("split", 1), ("tensor_split", 1), ("unbind", 0), ("narrow", 0), ("select", 0)]:
    for _function in aliases(_name):
        belief_rule(_function)(_cutting(_function, _position))


@belief_rule("index_select")
def index_select(x: Gaussian, dim: int, index: Tensor) -> Gaussian:
    """Pick along an axis: of samples with one belief, any have the same."""
    if dim % x.ndim == 0 and not varies(x, 0):
        return Gaussian(x.mean, x.var)
    picked: Gaussian = cut(torch.index_select, x, dim, dim, index)
    return picked


@belief_rule("gather")
def gather(x: Gaussian, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Gaussian:
    """Elements that an index picks along an axis: a mixture of all of them."""
    mixture = x.pool([dim % x.ndim])
    return Gaussian(mixture.mean, mixture.var)


@belief_rule("take_along_dim")
def take_along_dim(x: Gaussian, indices: Tensor, dim: int | None = None) -> Belief:
    """As :func:`gather`."""
    return Unknown("elements picked from all axes at once") if dim is None else gather(x, dim, indices)


# -- joining ---------------------------------------------------------------------------------------


@rule(*aliases("cat", "concat", "concatenate"))
def cat(tensors: Sequence[Gaussian | Tensor], dim: int = 0, **kwargs: Any) -> Gaussian:
    """Join along an axis: each part keeps its belief, and a known one its values along the axis."""
    first = next(t for t in tensors if isinstance(t, Gaussian))
    dim = kwargs.get("axis", dim) % first.ndim
    parts = []
    for t in tensors:
        if isinstance(t, Gaussian):
            parts.append(t.full([dim]))
        elif t.ndim == first.ndim:  # torch ignores an empty one of another rank
            known = t.to(first.mean.dtype)
            others = [d for d in range(t.ndim) if d != dim and first.mean.shape[d] == 1]
            parts.append(Gaussian(known, torch.zeros_like(known)).pool(others).of(t.shape).full([dim]))
    parts = align(parts, skip=dim)
    sizes = [max(p.mean.shape[d] for p in parts) for d in range(first.ndim)]

    def join(moments: list[Tensor]) -> Tensor:
        return torch.cat([m.expand(*sizes[:dim], -1, *sizes[dim + 1 :]) for m in moments], dim)

    return Gaussian(join([p.mean for p in parts]), join([p.var for p in parts]))


@rule(*aliases("hstack"))
def hstack(tensors: Sequence[Gaussian | Tensor]) -> Gaussian:
    """Join along the second axis, or the only one."""
    return cat(tensors, 1)


@rule(*aliases("stack"))
def stack(tensors: Sequence[Gaussian | Tensor], dim: int = 0) -> Gaussian:
    """Join along a new axis."""
    first = next(t for t in tensors if isinstance(t, Gaussian))
    dim = dim % (first.ndim + 1)
    shape = (*first.shape[:dim], 1, *first.shape[dim:])

    def lifted(t: Gaussian | Tensor) -> Gaussian | Tensor:
        return t.map(lambda u: u.unsqueeze(dim)).of(shape) if isinstance(t, Gaussian) else t.unsqueeze(dim)

    return cat([lifted(t) for t in tensors], dim)


@belief_rule("pad", "constant_pad_nd", torch._C._nn.pad)  # F.pad calls the last when compiled
def pad(x: Gaussian, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Belief:
    """Padding: extra channels get the constant; a border around constant pixels is ignored."""
    amounts = list(pad)
    for k in range(len(amounts) // 2):
        d = x.ndim - 1 - k
        touched = amounts[2 * k] != 0 or amounts[2 * k + 1] != 0
        if touched and d == 0:
            return Unknown("padding along the batch")
        if touched and (d == 1 or varies(x, d)):
            x = x.full([d])
        else:
            amounts[2 * k] = amounts[2 * k + 1] = 0
    if not any(amounts):
        return Gaussian(x.mean, x.var)
    if mode != "constant":
        return Unknown(f"{mode} padding along an axis where the belief varies")
    x = in_one_shape(x)
    return Gaussian(F.pad(x.mean, amounts, value=value or 0.0), F.pad(x.var, amounts))


# -- sliding windows -------------------------------------------------------------------------------


@belief_rule("pixel_shuffle")
def pixel_shuffle(x: Gaussian, upscale_factor: int) -> Gaussian:
    """Each output channel is the mixture of ``r^2`` input channels, one for each position."""
    blocks = x.full([1]).pool(range(2, x.ndim)).map(lambda t: t.unflatten(1, (-1, upscale_factor**2)))
    return blocks.pool([2]).map(lambda t: t.squeeze(2))


@belief_rule(torch.Tensor.unfold)
def windows(x: Gaussian, dimension: int, size: int, step: int) -> Gaussian:
    """Windows along one axis, each on a new last axis."""
    dim = dimension % x.ndim
    if not varies(x, dim):
        return x.map(lambda t: t.unsqueeze(-1))
    return x.full([dim]).map(lambda t: t.unfold(dim, size, step))


@belief_rule(F.unfold)
def im2col(x: Gaussian, kernel_size: int | Sequence[int], *args: object, **kwargs: object) -> Gaussian:
    """``(N, C, H, W)`` to ``(N, C k, L)``: each channel's belief, for each of ``k`` taps. Padding is ignored."""
    taps = math.prod(per_axis(kernel_size, 2))
    x = x.full([1]).pool((2, 3))
    return x.map(lambda t: t.flatten(2).repeat_interleave(taps, 1))


@belief_rule(F.fold)
def col2im(x: Gaussian, output_size: Any, *args: Any, **kwargs: Any) -> Belief:
    """``(N, C k, L)`` to ``(N, C, H, W)``: each pixel is the sum of the taps that meet there, taken as independent."""
    if x.ndim != 3:
        return Unknown("a fold without a batch")
    return in_one_shape(x.full([1, 2])).map(lambda t: F.fold(t, output_size, *args, **kwargs)).pool((2, 3))


belief_rules("which moves elements", {
    # A belief keeps its own precision. Steps of a quantized network are small.
    "contiguous clone alias requires_grad_ retain_grad as_tensor asarray float double half bfloat16 nan_to_num "
    "nan_to_num_ fake_quantize_per_tensor_affine fake_quantize_per_channel_affine "
    "fused_moving_avg_obs_fake_quant": lambda x, *args, **kwargs: x,
    "squeeze squeeze_": lambda x, dim=None: drop(x, [d for d in axes_of(x, dim) if x.shape[d] == 1]),
    "expand": lambda x, *sizes: of_rank(x, len(_ints(sizes))),  # axes of size 1 stay so
    "expand_as": lambda x, other: of_rank(x, len(other.shape)),
    "reshape_as view_as": lambda x, other: reshape_to(x, other.shape),
    "pixel_unshuffle": lambda x, downscale_factor: x.full([1]).pool(range(2, x.ndim)).map(
        lambda t: t.repeat_interleave(downscale_factor**2, 1)
    ),
    "channel_shuffle": lambda x, groups: x.full([1]).map(
        lambda t: t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
    ),
})  # fmt: skip
