"""Loaders that go on in the middle of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

__all__ = ["Resumable"]


class Resumable(ABC):
    """Batches whose order follows from a seed and the epoch, and of which the first can be left out.

    Lightning tells the epoch to a loader's ``sampler``, and keeps its ``state_dict`` in checkpoints.

    Attributes:
        epoch: Of the next iteration.
        handed_out: How many batches of the epoch one has got.
    """

    epoch = 0
    handed_out = 0
    _left_out = 0

    # Lightning asks any loader that has a `sampler` for this too.
    batch_sampler = None

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch, of this process."""

    @property
    def sampler(self) -> Self:
        """Itself: Lightning tells the epoch to a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take the order and the draws of this epoch from the next iteration on."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """How many batches of the epoch are handed out."""
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave those out of the next iteration (alone)."""
        self._left_out = self.handed_out = state["handed_out"] % len(self)

    def take_left_out(self) -> int:
        """How many batches the iteration that begins now leaves out; the one after it none."""
        first, self._left_out = self._left_out, 0
        return first
