"""The belief behind a ReLU, whose moments are computed when they are first read, or by the link that follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels.activation import rectify
from kalmannorm.kernels.autograd import in_grad_mode, saved_tensor_hooks

__all__ = ["Rectified"]


class Rectified(Gaussian):
    """The belief behind a ReLU.

    The kernel of the convolution that follows computes it too, and stores it before it is read: see :meth:`keep`.

    Args:
        below: the belief before the ReLU.
    """

    __slots__ = ("_grad", "_known", "_where", "below")

    def __init__(self, below: Gaussian) -> None:
        self.below = below
        self.shape = below.shape
        self._known: Gaussian | None = None
        self._where: object = None
        self._grad = torch.is_grad_enabled()  # here, not where the moments are first read

    @property
    def is_known(self) -> bool:
        """Whether the moments have been computed, in the current checkpointed region if there is one."""
        return self._known is not None and self._where == saved_tensor_hooks()

    def keep(self, known: Gaussian) -> None:
        """Store computed moments, unless they lack gradients that this belief must have."""
        if torch.is_grad_enabled() or not self._grad:
            self._known, self._where = known, saved_tensor_hooks()

    def evaluate(self) -> Gaussian:
        """The same belief with known moments."""
        if not self.is_known:
            with in_grad_mode(self._grad):
                self.keep(Gaussian(*rectify(self.below.mean, self.below.var)))
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
    def groups(self) -> int:
        return self.below.groups

    def is_per_channel(self, channels: int) -> bool:
        return self.below.is_per_channel(channels)

    def of(self, shape: Sequence[int]) -> Gaussian:
        return self if tuple(shape) == self.shape else self.evaluate().of(shape)

    def detach(self) -> Gaussian:
        new = Rectified(self.below.detach())
        new._grad = False
        return new

    def packed(self) -> Packed:
        return self.evaluate().packed()
