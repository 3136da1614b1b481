"""A belief about an activation: independent Gaussians, one per statistic group and channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Unknown(NamedTuple):
    """No belief, and the reason: a rule returns it where it cannot compute the moments."""

    reason: str


class Gaussian:
    """The believed mean and variance of an activation, far smaller than the activation itself.

    Both tensors have the activation's rank. An axis has size 1 where the belief does not depend on
    it; the first has size ``S``, the number of statistic groups (consecutive blocks of samples), so
    an image's ``(N, C, H, W)`` is described by ``(S, C, 1, 1)``, a vector's ``(N, C)`` by ``(S, C)``.

    Args:
        mean: ``(S, C, ...)``.
        var: ``(S, C, ...)``, not negative.
        shape: shape of the activation described, for rules that count its elements. Defaults to the
            shape of ``mean``.
    """

    __slots__ = ("mean", "shape", "var")

    def __init__(self, mean: Tensor, var: Tensor, shape: Sequence[int] | None = None) -> None:
        self.mean = mean
        self.var = var
        self.shape = tuple(mean.shape) if shape is None else tuple(shape)

    def __repr__(self) -> str:
        return f"Gaussian(mean={self.mean!r}, var={self.var!r}, shape={self.shape})"

    @property
    def ndim(self) -> int:
        """Rank of the activation, and of ``mean`` and ``var``."""
        return len(self.shape)

    @property
    def groups(self) -> int:
        """Statistic groups ``S``; 1 where the belief is the same for all."""
        return self.mean.shape[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation, kept above zero so that its gradient stays finite: ``(S, C, ...)``."""
        return self.var.clamp_min(torch.finfo(self.var.dtype).tiny ** 0.5).sqrt()

    def map(self, move: Callable[[Tensor], Tensor]) -> Gaussian:
        """Apply one function that only moves elements to the mean and to the variance alike."""
        return Gaussian(move(self.mean), move(self.var))

    def of(self, shape: Sequence[int]) -> Gaussian:
        """The same belief, about an activation of that shape."""
        return type(self)(self.mean, self.var, shape)

    def detach(self) -> Gaussian:
        """The same belief, cut from the autograd graph."""
        return type(self)(self.mean.detach(), self.var.detach(), self.shape)

    def packed(self) -> Packed:
        """The same belief in one tensor. The mean and the variance must be of one shape."""
        return Packed(torch.stack([self.mean, self.var]), self.shape)

    def full(self, dims: Sequence[int]) -> Gaussian:
        """The same belief, written out along ``dims`` to the size that the activation has there."""
        mean, var = self.mean, self.var
        for d in dims:
            mean, var = lengthen(mean, d, self.shape[d]), lengthen(var, d, self.shape[d])
        return Gaussian(mean, var, self.shape)

    def pool(self, dims: Sequence[int]) -> Gaussian:
        """Forget ``dims`` (kept with size 1): mean and variance of the mixture along them.

        The law of total variance: the mean of the variances plus the variance of the means.
        """
        dims = [d for d in dims if self.mean.shape[d] > 1 or self.var.shape[d] > 1]
        if not dims:
            return self
        mean, var = torch.broadcast_tensors(self.mean, self.var)
        pooled = mean.mean(dims, keepdim=True)
        return Gaussian(pooled, (var + (mean - pooled).square()).mean(dims, keepdim=True))

    def regroup(self, groups: int) -> Gaussian:
        """The same belief for ``groups`` statistic groups, by repeating blocks or pooling them."""
        have = self.mean.shape[0]
        if have == groups == self.var.shape[0]:
            return self
        if groups % have == 0:
            return self.map(lambda t: lengthen(t, 0, groups))
        if have % groups == 0:
            blocks = self.map(lambda t: t.unflatten(0, (groups, have // groups)))
            return blocks.pool([1]).map(lambda t: t.squeeze(1))
        return self.pool([0]).regroup(groups)

    def is_per_channel(self, channels: int) -> bool:
        """Whether both moments are ``(S, C, 1, ...)``, as those of :meth:`per_channel` but for the rank."""
        shape = self.mean.shape
        return shape == self.var.shape and shape[1] == channels and self.mean.numel() == shape[0] * channels

    def per_channel(self, groups: int) -> Gaussian:
        """Mean and variance a group and channel, ``(S, C)``, as a normalization layer needs them.

        Args:
            groups: the layer's number of statistic groups ``S``.
        """
        return self.full([1]).pool(range(2, self.ndim)).regroup(groups).map(lambda t: t.flatten(1))

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Independent draws: one value for each element of ``shape``, whose blocks along the first
        axis follow the statistic groups.
        """
        noise = torch.randn(
            tuple(shape), generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        blocks = self.regroup(shape[0])
        each = Gaussian(blocks.mean, blocks.var, shape).full(range(len(shape)))
        return torch.addcmul(each.mean, each.std, noise)

    @staticmethod
    def of_draws(draws: Tensor, groups: int) -> Gaussian:
        """Mean and biased variance of draws ``(S * n, C, *)``, a group and channel: ``(S, C)``."""
        blocks = draws.reshape(groups, -1, draws.shape[1], math.prod(draws.shape[2:]))
        var, mean = torch.var_mean(blocks, (1, 3), correction=0)
        return Gaussian(mean, var)


class Packed(Gaussian):
    """A belief whose mean and variance are one tensor, ``(2, S, C, ...)``, as layers take and return it."""

    __slots__ = ("moments",)

    def __init__(self, moments: Tensor, shape: Sequence[int] | None = None) -> None:
        self.moments = moments
        self.shape = tuple(moments.shape[1:]) if shape is None else tuple(shape)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.moments[0]

    @property
    def var(self) -> Tensor:  # type: ignore[override]
        return self.moments[1]

    @property
    def groups(self) -> int:
        return self.moments.shape[1]

    def of(self, shape: Sequence[int]) -> Gaussian:
        return Packed(self.moments, shape)

    def detach(self) -> Gaussian:
        return Packed(self.moments.detach(), self.shape)

    def packed(self) -> Packed:
        return self

    def is_per_channel(self, channels: int) -> bool:
        shape = self.moments.shape
        return shape[2] == channels and shape.numel() == 2 * shape[1] * channels


class Shares(Gaussian):
    """The belief about a softmax: elements along the axis ``dim`` add up to 1."""

    __slots__ = ("dim",)

    def __init__(self, belief: Gaussian, dim: int) -> None:
        super().__init__(belief.mean, belief.var, belief.shape)
        self.dim = dim

    def of(self, shape: Sequence[int]) -> Gaussian:
        return Shares(Gaussian(self.mean, self.var, shape), self.dim)

    def detach(self) -> Gaussian:
        return Shares(Gaussian(self.mean.detach(), self.var.detach(), self.shape), self.dim)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Shares:
        """As :meth:`map`, for a function that only exchanges axes: ``dim`` goes along."""
        marked = torch.empty([2 if d == self.dim else 1 for d in range(self.ndim)], device="cpu")
        return Shares(self.map(move), move(marked).shape.index(2))


def lengthen(t: Tensor, dim: int, size: int) -> Tensor:
    """Lengthen an axis to ``size`` by repeating each of its elements (consecutive blocks)."""
    have = t.shape[dim]
    if have == size:
        return t
    if have == 1:
        return t.expand([size if d == dim % t.ndim else n for d, n in enumerate(t.shape)])
    return t.repeat_interleave(size // have, dim)
