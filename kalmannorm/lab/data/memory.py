"""Batches from images that lie in memory as one tensor: no worker, no copy but the batch itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalmannorm.lab.data.augmentation import crop_and_flip, draw_moves
from kalmannorm.lab.data.resumable import Resumable

Labelled = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Three disjoint sets of inputs ``(N, C, *)``, float32 or uint8, with labels ``(N,)`` or ``(N, *)``, int64.

    Attributes:
        train: To train on.
        validation: To choose hyper-parameters on.
        test: To be scored once.
    """

    train: Labelled
    validation: Labelled
    test: Labelled


class MemoryBatches(Resumable):
    """An iterable of batches that comes in the same order, with the same crops, under the same seed and epoch.

    As with torch's ``DistributedSampler``, `set_epoch` moves on to other draws; Lightning calls it. An epoch that was
    left in the middle goes on there after `load_state_dict`, which Lightning calls too.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``, on the same device.
        batch_size: Images a batch, in each process.
        prepare: What is done to a batch of images last, such as a `Scaling`.
        seed: Of the order and of the crops; None for the order of the tensors, without crops.
        augment: ``"none"``, ``"crop"`` (pad 4, crop at random) or ``"crop_flip"``; needs a seed.
        border: Colour of the padding, see `crop_and_flip`.
        drop_last: Leave out an epoch's last images, too few for a gradient step of equal size.
        rank: Which of the processes this is. Each takes its own slice of ``batch_size * replicas`` consecutive
            images, so that neighbours stay together whatever the number of processes.
        replicas: Number of processes. Without ``drop_last``, up to ``replicas - 1`` images are left out of an epoch
            so that all get as many.
        accumulated: Batches whose gradients are accumulated to a step.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        prepare: Callable[[Tensor], Tensor],
        seed: int | None = None,
        augment: str = "none",
        border: Tensor | None = None,
        drop_last: bool = False,
        rank: int = 0,
        replicas: int = 1,
        accumulated: int = 1,
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.prepare, self.seed, self.augment, self.border = prepare, seed, augment, border
        self.drop_last, self.rank, self.replicas, self.accumulated = drop_last, rank, replicas, accumulated
        if augment not in ("none", "crop", "crop_flip"):
            raise ValueError(f"augment must be 'none', 'crop' or 'crop_flip'; got {augment!r}")
        if augment != "none" and seed is None:
            raise ValueError(f"augment={augment!r} needs a seed")
        if batch_size < 1 or len(self) < 1:
            step = batch_size * replicas * accumulated
            raise ValueError(f"a gradient step must take 1 to {len(images)} images, as many as there are; got {step}")

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size * self.replicas)
        if self.drop_last:
            return whole - whole % self.accumulated
        return whole + (rest >= self.replicas)

    def _draws(self) -> tuple[Tensor, Tensor | None]:
        """Of one epoch, all processes together: the order ``(N,)`` of the images, and their moves ``(N, 3)``."""
        count = len(self.images)
        if self.seed is None:
            return torch.arange(count), None
        # A whole epoch is drawn at once, and on the CPU: no draw depends on the device or on where one resumes.
        entropy = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        order = torch.randperm(count, generator=generator)
        if self.augment == "none":
            return order, None
        return order, draw_moves(count, generator, flip=self.augment == "crop_flip")

    def _slice(self, index: int) -> slice:
        """Where in the order this process's part of a batch is."""
        start = index * self.batch_size * self.replicas
        share = min(self.batch_size, (len(self.images) - start) // self.replicas)
        return slice(start + self.rank * share, start + (self.rank + 1) * share)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``(batch_size, C, H, W)`` and labels ``(batch_size,)``."""
        device = self.images.device
        order, moves = (None if drawn is None else drawn.to(device) for drawn in self._draws())
        assert order is not None
        first = self.take_left_out()
        for index in range(first, len(self)):
            here = self._slice(index)
            images = self.images[order[here]]
            if moves is not None:
                images = crop_and_flip(images, moves[here], border=self.border)
            self.handed_out = index + 1
            yield self.prepare(images), self.labels[order[here]]
