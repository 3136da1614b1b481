"""Beliefs whose moments are computed when they are first read, or by the next layer along with its own.

A normalization layer mostly follows a ReLU and a convolution. Its kernel computes their moments
together with its output, in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels.autograd import in_grad_mode, saved_tensor_hooks
from kalmannorm.kernels.layer import Through
from kalmannorm.kernels.link import link
from kalmannorm.kernels.rectify import rectify

__all__ = ["Deferred", "Linked", "Rectified"]


class Deferred(Gaussian):
    """A belief whose mean and variance are computed when they are first read.

    Another computation that yields them too may store them before that: see :meth:`keep`.

    Args:
        below: the belief that it is computed from.
    """

    __slots__ = ("_grad", "_known", "_where", "below")

    def __init__(self, below: Gaussian) -> None:
        self.below = below
        self.shape = below.shape
        self._known: Gaussian | None = None
        self._where: object = None
        self._grad = torch.is_grad_enabled()  # here, not where the moments are first read

    def _compute(self) -> Gaussian:
        raise NotImplementedError

    def _of(self, below: Gaussian) -> Deferred:
        """The same function of another belief."""
        return type(self)(below)

    @property
    def is_known(self) -> bool:
        """Whether the moments have been computed, in the current checkpointed region if there is one."""
        return self._known is not None and self._where == saved_tensor_hooks()

    def keep(self, known: Gaussian) -> None:
        """Store computed moments, unless they lack gradients that this belief must have."""
        if torch.is_grad_enabled() or not self._grad:
            self._known, self._where = known, saved_tensor_hooks()

    def forget(self) -> None:
        """Drop stored moments; they are computed again when they are read."""
        self._known = None

    def evaluate(self) -> Gaussian:
        """The same belief with known moments."""
        if not self.is_known:
            with in_grad_mode(self._grad):
                self.keep(self._compute())
        assert self._known is not None
        return self._known

    # As in Gaussian. Reading the moments computes them; everything else comes from the belief below.

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.evaluate().mean

    @property
    def var(self) -> Tensor:  # type: ignore[override]
        return self.evaluate().var

    @property
    def ndim(self) -> int:
        return self.below.ndim

    @property
    def groups(self) -> int:
        return self.below.groups

    def is_per_channel(self, channels: int) -> bool:
        return self.below.is_per_channel(channels)

    def of(self, shape: Sequence[int]) -> Gaussian:
        self.shape = tuple(shape)
        return self

    def detach(self) -> Gaussian:
        new = self._of(self.below.detach())
        new._grad = False
        return new.of(self.shape)

    def packed(self) -> Packed:
        return self.evaluate().packed()


class Rectified(Deferred):
    """The belief behind a ReLU."""

    __slots__ = ()

    def _compute(self) -> Gaussian:
        return Gaussian(*rectify(self.below.mean, self.below.var))


class Linked(Deferred):
    """The belief behind a matrix or an ungrouped filter, and behind the ReLU before it if there is one.

    Args:
        below: one value for each statistic group and channel.
        filter: ``(C_out, C_in, *taps)``.
        bias: ``(C_out,)`` or None.
    """

    __slots__ = ("bias", "filter")

    def __init__(self, below: Gaussian, filter: Tensor, bias: Tensor | None) -> None:
        super().__init__(below)
        self.filter = filter
        self.bias = bias

    def _of(self, below: Gaussian) -> Deferred:
        return Linked(below, self.filter, self.bias)

    def _with_relu(self) -> tuple[Gaussian, Rectified | None]:
        """The belief that the kernel takes, and the ReLU behind it, if the kernel is to compute that too."""
        below = self.below
        return (below.below, below) if type(below) is Rectified and not below.is_known else (below, None)

    def _compute(self) -> Gaussian:
        below, rectified = self._with_relu()
        moments, after = link(below.packed().moments, self.filter, self.bias, relu=rectified is not None)
        if rectified is not None and after is not None:
            rectified.keep(Packed(after))
        return Packed(moments)

    def link(self) -> tuple[Gaussian, Through | None]:
        """The arguments with which a layer's kernel computes these moments along with its own.

        The caller then stores the moments behind the ReLU, if there is one, by its :meth:`keep`.

        Returns:
            The belief below and the link from there to this one; this belief and None if its moments are
            known.
        """
        if self._grad != torch.is_grad_enabled() or self.is_known:
            return self, None
        below, rectified = self._with_relu()
        return below, Through(self.filter, self.bias, rectified is not None)

    def is_per_channel(self, channels: int) -> bool:
        return self.filter.shape[0] == channels
