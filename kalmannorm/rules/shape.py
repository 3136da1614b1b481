"""Functions that move, cut, join or resize: the same move, made on the small tensors.

A belief has its activation's rank, so most of these call the torch function itself on the mean and
on the variance, after writing out the axes it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown, lengthen
from kalmannorm.rules.table import Belief, aliases, rule

__all__ = ["align", "summarize"]


def summarize(constant: Tensor | float, like: Gaussian) -> Gaussian:
    """The belief of a known tensor that meets ``like``: its values, without variance.

    A vector (one axis longer than 1) keeps its values. A map is summarized, along the axes where
    ``like`` does not vary, by its mean and variance there.
    """
    values = torch.as_tensor(constant, dtype=like.mean.dtype, device=like.mean.device)
    values = values.reshape(*[1] * (like.ndim - values.ndim), *values.shape)
    known = Gaussian(values, torch.zeros_like(values))
    long = [d for d in range(values.ndim) if values.shape[d] > 1]
    if len(long) <= 1:
        return known
    return known.pool([d for d in long if like.mean.shape[d] == 1])


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


def _axis(x: Gaussian, dim: int) -> int:
    return dim % x.ndim


def _ints(sizes: Sequence[Any]) -> list[Any]:
    """``f(1, 2)`` and ``f((1, 2))`` alike."""
    return list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int | torch.SymInt) else list(sizes)


# -- the belief as it is ---------------------------------------------------------------------------


@rule(*aliases("contiguous", "clone", "alias", "requires_grad_", "float", "double", "half", "bfloat16",
               "type", "type_as", "retain_grad", "as_tensor", "asarray"))  # fmt: skip
def same(x: Gaussian, *args: object, **kwargs: object) -> Gaussian:
    """Copies and casts: the belief keeps its own precision."""
    return x


@rule(*aliases("to"))
def to(x: Gaussian, *args: Any, **kwargs: Any) -> Gaussian:
    """To another device, memory format or type: the belief follows to the device."""
    device = kwargs.get("device", args[0] if args else None)
    if isinstance(device, Gaussian):
        device = device.mean.device
    elif isinstance(device, Tensor):
        device = device.device
    return x.map(lambda t: t.to(device)) if isinstance(device, str | int | torch.device) else x


@rule(*aliases("cuda"))
def cuda(x: Gaussian, *args: Any, **kwargs: Any) -> Gaussian:
    """The belief follows to the accelerator."""
    return x.map(lambda t: t.cuda(*args, **kwargs))


@rule(*aliases("cpu"))
def cpu(x: Gaussian, *args: Any, **kwargs: Any) -> Gaussian:
    """The belief follows to the host."""
    return x.map(lambda t: t.cpu())


@rule(*aliases("detach", "detach_"), torch.Tensor.data.__get__)  # type: ignore[attr-defined]
def detach(x: Gaussian) -> Gaussian:
    """Cut from the graph, as the activation is."""
    return x.detach()


# -- axes ------------------------------------------------------------------------------------------


def _move_axes(function: Callable[..., Any]) -> Callable[..., Gaussian]:
    """Functions that reorder axes, or add some of size 1."""

    def move(x: Gaussian, *args: Any, **kwargs: Any) -> Gaussian:
        """Reorder axes: the belief has the same ones."""
        return x.map(lambda t: function(t, *args, **kwargs))

    return move


for _function in aliases("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "t"):
    rule(_function)(_move_axes(_function))
for _name in ("transpose", "unsqueeze"):  # in place, on the activation; the belief before is still needed
    rule(*aliases(_name + "_"))(_move_axes(getattr(torch, _name)))
rule(torch.Tensor.mT.__get__)(_move_axes(lambda t: t.mT))  # type: ignore[attr-defined]
rule(torch.Tensor.T.__get__)(_move_axes(lambda t: t.permute(*range(t.ndim - 1, -1, -1))))  # type: ignore[attr-defined]


@rule(*aliases("squeeze", "squeeze_"))
def squeeze(x: Gaussian, dim: Any = None) -> Gaussian:
    """Drop the axes that have size 1 in the activation."""
    wanted = range(x.ndim) if dim is None else ([dim] if isinstance(dim, int) else dim)
    drop = {_axis(x, d) for d in wanted if x.shape[d] == 1}
    return x.map(lambda t: t.reshape([n for d, n in enumerate(t.shape) if d not in drop]))


@rule(*aliases("expand"))
def expand(x: Gaussian, *sizes: Any) -> Gaussian:
    """Repeat without a copy: an axis of size 1 stays one."""
    new = len(_ints(sizes)) - x.ndim
    return x.map(lambda t: t.reshape(*[1] * new, *t.shape))


@rule(*aliases("expand_as"))
def expand_as(x: Gaussian, other: Tensor | Gaussian) -> Gaussian:
    """Repeat to another tensor's shape."""
    return expand(x, *other.shape)


@rule(*aliases("repeat"))
def repeat(x: Gaussian, *sizes: Any) -> Gaussian:
    """Tile: axes that vary are written out first."""
    times = _ints(sizes)
    x = expand(x, *times)
    shape = (1,) * (x.ndim - len(x.shape)) + tuple(x.shape)
    x = Gaussian(x.mean, x.var, shape)
    varies = [d for d in range(x.ndim) if times[d] > 1 and _varies(x, d)]
    return x.full(varies).map(lambda t: t.repeat(*(n if d in varies else 1 for d, n in enumerate(times))))


def _varies(x: Gaussian, dim: int) -> bool:
    return max(x.mean.shape[dim], x.var.shape[dim]) > 1


@rule(*aliases("flip"))
def flip(x: Gaussian, *dims: Any, **kwargs: Any) -> Gaussian:
    """Reverse the axes along which the belief varies."""
    turned = [_axis(x, d) for d in _ints(dims or (kwargs["dims"],)) if _varies(x, d)]
    return x.full(turned).map(lambda t: t.flip(turned))


@rule(*aliases("roll"))
def roll(x: Gaussian, shifts: Any, dims: Any = None) -> Belief:
    """Shift the axes along which the belief varies."""
    if dims is None or dims == ():
        return Unknown("a roll across axes")
    shifts, dims = ([v] if isinstance(v, int) else v for v in (shifts, dims))
    moved = [(shift, _axis(x, d)) for shift, d in zip(shifts, dims, strict=True) if _varies(x, d)]
    if not moved:
        return x
    shifts, dims = zip(*moved, strict=True)
    return x.full(dims).map(lambda t: t.roll(shifts, dims))


# -- reshaping -------------------------------------------------------------------------------------


def reshape_to(x: Gaussian, shape: Sequence[int]) -> Gaussian:
    """The belief of the activation reshaped to ``shape``.

    Matches up the shortest runs of old and new axes with equal products. A run along which the
    belief is constant stays constant; one that is only split or merged with constant axes keeps its
    blocks; any other is written out.
    """
    known = math.prod([n for n in shape if n != -1])
    shape = [math.prod(x.shape) // max(known, 1) if n == -1 else n for n in shape]
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    x = Gaussian(mean, var, x.shape)
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


def _matching_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split the axes of two shapes with the same number of elements into runs with equal products."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        run: tuple[list[int], list[int]] = ([], [])
        left = right = 1
        while True:
            if i < len(old) and (not run[0] or left < right):
                run[0].append(i)
                left *= old[i]
                i += 1
            elif j < len(new) and (not run[1] or right < left):
                run[1].append(j)
                right *= new[j]
                j += 1
            else:
                break
        runs.append(run)
    return [r for r in runs if r[0] or r[1]]


@rule(*aliases("reshape", "view"))
def reshape(x: Gaussian, *shape: Any, **kwargs: Any) -> Belief:
    """Reshape; see :func:`reshape_to`."""
    if "dtype" in kwargs or (shape and isinstance(shape[0], torch.dtype)):
        return Unknown("view as another type")
    return reshape_to(x, _ints(shape) if shape else list(kwargs.get("shape", kwargs.get("size", []))))


@rule(*aliases("reshape_as", "view_as"))
def reshape_as(x: Gaussian, other: Tensor | Gaussian) -> Gaussian:
    """Reshape to another tensor's shape."""
    return reshape_to(x, other.shape)


@rule(*aliases("flatten", "ravel"))
def flatten(x: Gaussian, start_dim: int = 0, end_dim: int = -1) -> Gaussian:
    """Merge neighbouring axes: a channel's belief is repeated for each of its pixels."""
    start, end = _axis(x, start_dim), _axis(x, end_dim)
    return reshape_to(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


@rule(*aliases("unflatten"))
def unflatten(x: Gaussian, dim: int, sizes: Sequence[int]) -> Gaussian:
    """Split an axis."""
    dim = _axis(x, dim)
    return reshape_to(x, [*x.shape[:dim], *_resolve(sizes, x.shape[dim]), *x.shape[dim + 1 :]])


def _resolve(sizes: Sequence[int], total: int) -> list[int]:
    known = math.prod([n for n in sizes if n != -1])
    return [total // known if n == -1 else n for n in sizes]


# -- cutting ---------------------------------------------------------------------------------------


@rule(*aliases("__getitem__"))
def getitem(x: Gaussian, index: Any) -> Belief:
    """Indexing: slices along constant axes leave the belief as it is, and so do indices of samples."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not torch.compiler.is_compiling():  # numpy's arrays and numbers
        parts = [p if isinstance(p, Tensor) or not hasattr(p, "__array__") else torch.as_tensor(p) for p in parts]
    if any(isinstance(p, Gaussian) for p in parts):
        return Unknown("an index computed from the input")
    if any(isinstance(p, Tensor) and p.dtype == torch.bool and p.ndim > 1 for p in parts):
        return Unknown("a mask over several axes")
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


def _index_of_axis(x: Gaussian, axis: int, part: Any) -> tuple[Gaussian, Any]:
    """The index of moments for that of a tensor along one axis, and the moments with as many elements as it needs."""
    if isinstance(part, slice) and not _varies(x, axis):
        return x, slice(None)
    if axis == 0 and isinstance(part, Tensor) and part.ndim > 0 and not _varies(x, 0):
        return x, torch.zeros([1] * part.ndim, dtype=torch.long, device=x.mean.device)
    if isinstance(part, slice) and part == slice(None):
        return x, part
    return x.full([axis]), part


_PICKING = frozenset(aliases("index_select"))


@rule(*aliases("gather"))
def gather(x: Gaussian, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Belief:
    """Elements that an index picks along an axis: a mixture of all of them."""
    return Unknown("an index computed from the input") if isinstance(index, Gaussian) else x.pool([_axis(x, dim)])


@rule(*aliases("take_along_dim"))
def take_along_dim(x: Gaussian, indices: Tensor, dim: int | None = None) -> Belief:
    """As :func:`gather`."""
    return Unknown("elements picked from all axes at once") if dim is None else gather(x, dim, indices)


def _sums(into: Gaussian | Tensor, dim: int, index: Tensor, terms: Gaussian | Tensor, weight: float = 1.0) -> Belief:
    """Sums of the terms that an index sends to each row: of ``d`` terms with mean ``m`` and variance ``v``, where ``d``
    differs from row to row, the mean is ``m E[d]`` and the variance ``v E[d] + m^2 Var[d]``.
    """
    if isinstance(index, Gaussian):
        return Unknown("an index computed from the input")
    if not isinstance(terms, Gaussian) or _axis(terms, dim) != 0:
        return Unknown("a sum of as many terms as an index names, not along the first axis or of known ones")
    to = index.reshape(index.shape[0], -1)[:, 0]  # of `scatter_add`, whose columns go to the same rows
    x = terms.pool([0])
    counts = torch.zeros(into.shape[0], dtype=x.mean.dtype, device=to.device)
    counts = counts.index_add_(0, to, counts.new_ones(()).expand(to.shape[0]))
    often, unevenly = counts.mean(), counts.var(correction=0)
    mean, var = weight * x.mean * often, weight**2 * (x.var * often + x.mean.square() * unevenly)
    if not isinstance(into, Gaussian):
        return Gaussian(mean, var)
    first, second = align([into, Gaussian(mean, var)])
    return Gaussian(first.mean + second.mean, first.var + second.var)


@rule(*aliases("scatter_add", "scatter_add_"))
def scatter_add(into: Gaussian | Tensor, dim: int, index: Tensor, src: Gaussian | Tensor) -> Belief:
    """Messages summed over the neighbours in a graph, into zeros or an activation: see `_sums`."""
    return _sums(into, dim, index, src)


@rule(*aliases("index_add", "index_add_"))
def index_add(into: Gaussian | Tensor, dim: int, index: Tensor, source: Gaussian | Tensor, *,
              alpha: float = 1.0) -> Belief:  # fmt: skip
    """As :func:`scatter_add`."""
    return _sums(into, dim, index, source, alpha)


_SENT_OTHERWISE = Unknown("what an index sends to a row, other than a sum, or a mean or an extreme into zeros")
# More neighbours than this count as this many: the largest of them lies hardly higher.
_MOST = 64


def _of_neighbours(counts: Tensor, reduce: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that get ``counts`` independent standard normals each: the share of rows that get any, and the first two
    moments of the mean or of the largest of a row's normals, averaged over all rows.
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


@rule(*aliases("scatter_reduce", "scatter_reduce_"))
def scatter_reduce(into: Gaussian | Tensor, dim: int, index: Tensor, src: Gaussian | Tensor, reduce: str, *,
                   include_self: bool = True) -> Belief:  # fmt: skip
    """The mean, the largest or the smallest of a row's neighbours in a graph, and zero where it has none."""
    if reduce == "sum":
        return _sums(into, dim, index, src)
    if isinstance(index, Gaussian):
        return Unknown("an index computed from the input")
    if include_self or isinstance(into, Gaussian) or reduce not in ("mean", "amax", "amin"):
        return _SENT_OTHERWISE
    if not isinstance(src, Gaussian) or _axis(src, dim) != 0:
        return _SENT_OTHERWISE
    x = src.pool([0])
    to = index.reshape(index.shape[0], -1)[:, 0]
    counts = torch.zeros(into.shape[0], dtype=x.mean.dtype, device=to.device)
    counts = counts.index_add_(0, to, counts.new_ones(()).expand(to.shape[0]))
    some, first, second = _of_neighbours(counts, reduce)
    first = -first if reduce == "amin" else first
    mean = some * x.mean + x.std * first
    square = some * x.mean.square() + 2 * x.mean * x.std * first + x.var * second
    return Gaussian(mean, (square - mean.square()).clamp_min(0))


@rule(*aliases("scatter", "scatter_", "index_reduce", "index_reduce_", "segment_reduce"))
def scatter(x: Gaussian | Tensor, *args: Any, **kwargs: Any) -> Belief:
    """What replaces a row, say."""
    return _SENT_OTHERWISE


# Networks write -1e4, -1e9 or the least number of a type for minus infinity.
_AS_INFINITE = 1e4


@rule(*aliases("masked_fill", "masked_fill_"))
def masked_fill(x: Gaussian, mask: Tensor, value: Any) -> Belief:
    """A mixture: the value where the mask says so, and as before elsewhere. Minus infinity, or nearly so, is
    for a softmax that follows, to which such elements are none: the belief is of the others.
    """
    if isinstance(mask, Gaussian) or isinstance(value, Gaussian):
        return Unknown("a mask computed from the input")
    value = float(value)
    if abs(value) >= _AS_INFINITE:
        return x
    x = x.full([d for d in range(1, x.ndim) if x.mean.shape[d] not in (1, x.shape[d])])  # blocks of channels
    filled = mask.to(x.mean.dtype).reshape(*[1] * (x.ndim - mask.ndim), *mask.shape)
    share = Gaussian(filled, torch.zeros_like(filled)).pool([d for d in range(x.ndim) if x.mean.shape[d] == 1]).mean
    share = Gaussian(share, share).regroup(x.groups).mean
    mean = (1 - share) * x.mean + share * value
    return Gaussian(mean, (1 - share) * x.var + share * (1 - share) * (x.mean - value).square())


def _cut(function: Callable[..., Any], dim_position: int, default: int | None) -> Callable[..., Any]:
    """Functions that cut along one axis."""

    def cut(x: Gaussian, *args: Any, **kwargs: Any) -> Any:
        """Write out the axis, and cut the belief there."""
        dim = args[dim_position] if len(args) > dim_position else kwargs.get("dim", default)
        assert dim is not None
        if function in _PICKING and _axis(x, dim) == 0 and not _varies(x, 0):
            return x
        x = x.full([_axis(x, dim)])
        means, variances = (function(t, *args, **kwargs) for t in torch.broadcast_tensors(x.mean, x.var))
        if isinstance(means, Tensor):
            return Gaussian(means, variances)
        return tuple(Gaussian(m, v) for m, v in zip(means, variances, strict=True))

    return cut


for _name, _position, _default in [("chunk", 1, 0), ("split", 1, 0), ("tensor_split", 1, 0), ("unbind", 0, 0),
                                   ("narrow", 0, None), ("select", 0, None), ("index_select", 0, None)]:  # fmt: skip
    for _function in aliases(_name):
        rule(_function)(_cut(_function, _position, _default))


# -- joining ---------------------------------------------------------------------------------------


@rule(*aliases("cat", "concat", "concatenate"))
def cat(tensors: Sequence[Gaussian | Tensor], dim: int = 0, **kwargs: Any) -> Belief:
    """Join along an axis: each part keeps its belief."""
    first = next(t for t in tensors if isinstance(t, Gaussian))
    dim = _axis(first, kwargs.get("axis", dim))
    parts = []
    for t in tensors:
        if isinstance(t, Gaussian):
            parts.append(t)
        elif t.ndim == first.ndim:
            other = [d for d in range(t.ndim) if d != dim and first.mean.shape[d] == 1]
            t = t.to(first.mean.dtype)
            parts.append(Gaussian(t, torch.zeros_like(t)).pool(other))
            parts[-1].shape = tuple(t.shape)
    parts = align([p.full([dim]) for p in parts], skip=dim)
    sizes = [max(p.mean.shape[d] for p in parts) for d in range(first.ndim)]

    def join(moments: list[Tensor]) -> Tensor:
        return torch.cat([m.expand(*sizes[:dim], -1, *sizes[dim + 1 :]) for m in moments], dim)

    return Gaussian(join([p.mean for p in parts]), join([p.var for p in parts]))


@rule(*aliases("stack"))
def stack(tensors: Sequence[Gaussian | Tensor], dim: int = 0) -> Belief:
    """Join along a new axis."""
    first = next(t for t in tensors if isinstance(t, Gaussian))
    dim = dim % (first.ndim + 1)
    raised = []
    for t in tensors:
        lifted = t.map(lambda u: u.unsqueeze(dim)) if isinstance(t, Gaussian) else t.unsqueeze(dim)
        if isinstance(lifted, Gaussian):
            lifted.shape = (*first.shape[:dim], 1, *first.shape[dim:])
        raised.append(lifted)
    return cat(raised, dim)


@rule(*aliases("pad", "constant_pad_nd"), torch._C._nn.pad)  # which a compiler finds inside of the first
def pad(x: Gaussian, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Belief:
    """Padding: extra channels get the constant; a border around constant pixels is ignored."""
    amounts = list(pad)
    for k in range(len(amounts) // 2):
        d = x.ndim - 1 - k
        touched = amounts[2 * k] != 0 or amounts[2 * k + 1] != 0
        if touched and d == 0:
            return Unknown("padding along the batch")
        if d == 1 and touched:
            x = x.full([1])
        elif x.mean.shape[d] == 1:
            amounts[2 * k] = amounts[2 * k + 1] = 0
    if not any(amounts):
        return Gaussian(x.mean, x.var)
    if mode != "constant":
        return Unknown(f"{mode} padding along an axis where the belief varies")
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    return Gaussian(F.pad(mean, amounts, value=value or 0.0), F.pad(var, amounts))


# -- resizing --------------------------------------------------------------------------------------


@rule(*aliases("interpolate", "upsample"))
def interpolate(x: Gaussian, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
                align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
                antialias: bool = False) -> Gaussian:  # fmt: skip
    """Resizing: nearest neighbours keep the belief; weights ``w`` scale ``v`` by ``sum w^2``.

    That sum is taken axis by axis and averaged over output positions. Pixels are independent, so a
    blend of two varies less than either.
    """
    inputs = x.shape[2:]
    x = x.pool(range(2, x.ndim))
    if mode in ("nearest", "nearest-exact"):
        return Gaussian(x.mean, x.var)
    var = x.var
    for axis, length in enumerate(inputs):
        out = None if size is None else (size if isinstance(size, int) else size[axis])
        scale = scale_factor[axis] if isinstance(scale_factor, list | tuple) else scale_factor
        # Rows, not columns: at width 1, torch's antialiased kernel forgets the height.
        each_pixel = torch.eye(length, dtype=var.dtype, device=var.device).view(length, 1, 1, length)
        weights = F.interpolate(
            each_pixel,
            size=None if out is None else (1, out),
            scale_factor=None if scale is None else (1.0, float(scale)),
            mode={"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode),
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
            antialias=antialias,
        )
        var = var * weights.square().sum(0).mean()
    return Gaussian(x.mean, var)


@rule(*aliases("pixel_shuffle"))
def pixel_shuffle(x: Gaussian, upscale_factor: int) -> Gaussian:
    """Each output channel is the mixture of ``r^2`` input channels, one for each position."""
    blocks = x.full([1]).pool(range(2, x.ndim)).map(lambda t: t.unflatten(1, (-1, upscale_factor**2)))
    return blocks.pool([2]).map(lambda t: t.squeeze(2))


@rule(*aliases("pixel_unshuffle"))
def pixel_unshuffle(x: Gaussian, downscale_factor: int) -> Gaussian:
    """Each channel becomes ``r^2`` channels with its belief."""
    x = x.full([1]).pool(range(2, x.ndim))
    return x.map(lambda t: t.repeat_interleave(downscale_factor**2, 1))


@rule(*aliases("channel_shuffle"))
def channel_shuffle(x: Gaussian, groups: int) -> Gaussian:
    """Reorder the channels."""
    x = x.full([1])
    return x.map(lambda t: t.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2))


# -- sliding windows -------------------------------------------------------------------------------


@rule(torch.Tensor.unfold)
def windows(x: Gaussian, dimension: int, size: int, step: int) -> Gaussian:
    """Windows along one axis, each on a new last axis."""
    dim = _axis(x, dimension)
    if not _varies(x, dim):
        return x.map(lambda t: t.unsqueeze(-1))
    return x.full([dim]).map(lambda t: t.unfold(dim, size, step))


@rule(F.unfold)
def im2col(x: Gaussian, kernel_size: int | Sequence[int], *args: object, **kwargs: object) -> Gaussian:
    """``(N, C, H, W)`` to ``(N, C k, L)``: each channel's belief, for each of ``k`` taps. Padding is ignored."""
    taps = math.prod([kernel_size] * 2 if isinstance(kernel_size, int) else kernel_size)
    x = x.full([1]).pool((2, 3))
    return x.map(lambda t: t.flatten(2).repeat_interleave(taps, 1))


@rule(F.fold)
def col2im(x: Gaussian, output_size: Any, *args: Any, **kwargs: Any) -> Belief:
    """``(N, C k, L)`` to ``(N, C, H, W)``: each pixel is the sum of the taps that meet there, taken as independent."""
    if x.ndim != 3:
        return Unknown("a fold without a batch")
    x = x.full([1, 2])
    x = Gaussian(*torch.broadcast_tensors(x.mean, x.var))
    return x.map(lambda t: F.fold(t, output_size, *args, **kwargs)).pool((2, 3))
