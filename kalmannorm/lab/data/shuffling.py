"""The order in which images on disk are trained on."""

from __future__ import annotations

from typing import Any

import lightning
from torch.utils.data import Dataset, DistributedSampler


def shuffled(
    data: Dataset[Any], trainer: lightning.Trainer | None, seed: int, drop_last: bool
) -> DistributedSampler[Any]:
    """A sampler whose order follows from the seed and the epoch, which Lightning tells it, also in one process.

    Args:
        data: What to draw from.
        trainer: Each of its processes gets its share; None for a single process.
        seed: Of the order.
        drop_last: Where images don't divide evenly among the processes, leave some out instead of repeating some.
    """
    rank, replicas = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    return DistributedSampler(data, replicas, rank, shuffle=True, seed=seed, drop_last=drop_last)
