"""Batches of images on disk, in an order that follows from a seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kalmannorm.lab.data.resumable import Resumable
from kalmannorm.lab.data.sharing import images_a_process


class Drawn(Dataset[Any]):
    """A data set whose random transforms draw from ``(seed, epoch, index)``, whoever calls them, and when.

    So an image's flip and crop don't depend on the number of workers or of processes, nor on what came before it,
    and what one skips needs not be decoded. Torch's own state is left as it was.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """The item at ``(epoch, index)``."""
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too.
            torch.default_generator.manual_seed(_entropy(self.seed, epoch, index))
            return self.data[index]


class ShuffledBatches(Resumable):
    """An iterable of shuffled batches, of ``images`` images each, read by worker processes.

    As with `MemoryBatches`, ``sampler.set_epoch`` moves on to another order and other draws, and an epoch that was
    left in the middle goes on there after `load_state_dict`, without reading what comes before; Lightning calls
    these. What counts as handed out is what was, not what workers have read ahead.

    An epoch has whole gradient batches only. The images of one lie side by side in its order, and so do each
    process's share of them: groups of images that are normalized together are the same for any number of processes.

    Args:
        data: What to draw from.
        gradient_batch: Images a gradient step, over all processes and accumulated batches.
        trainer: Knows how many there are of both, and its device; None for one of each, on the CPU.
        seed: Of the order and of the draws.
        options: Of torch's ``DataLoader``, such as ``num_workers``.

    Raises:
        ValueError: The gradient batch can't be shared out, or is larger than the data set.
    """

    def __init__(
        self, data: Any, gradient_batch: int, trainer: lightning.Trainer | None = None, *, seed: int = 0, **options: Any
    ) -> None:
        self.images = images_a_process(gradient_batch, trainer)
        if gradient_batch > len(data):
            raise ValueError(f"gradient_batch must be at most {len(data)}, the images there are; got {gradient_batch}")
        self.data, self.gradient_batch, self.seed = data, gradient_batch, seed
        self.rank, self.replicas = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        self.options = {"pin_memory": on_gpu(trainer), **options}

    def __len__(self) -> int:
        """Batches an epoch, of this process."""
        return len(self.data) // self.gradient_batch * (self.gradient_batch // (self.images * self.replicas))

    def batches(self) -> list[list[int]]:
        """The indices of this process's images, batch by batch, in this epoch."""
        generator = torch.Generator().manual_seed(_entropy(self.seed, self.epoch))
        order = torch.randperm(len(self.data), generator=generator).tolist()
        starts = ((index * self.replicas + self.rank) * self.images for index in range(len(self)))
        return [order[start : start + self.images] for start in starts]

    def __iter__(self) -> Iterator[Any]:
        """The batches, as ``collate_fn`` makes them."""
        # All of this happens at the first `next`: Lightning tells the epoch only after it has called `iter`.
        first = self.take_left_out()
        places = [[(self.epoch, index) for index in batch] for batch in self.batches()[first:]]
        # The loader draws a seed for its workers, which nobody uses: not from torch's state, which a resumed
        # training must find as it was.
        options = {"generator": torch.Generator(), **self.options}
        loader: DataLoader[Any] = DataLoader(Drawn(self.data, self.seed), batch_sampler=places, **options)
        for index, batch in enumerate(loader, first + 1):
            self.handed_out = index
            yield batch


class OrderedBatches:
    """An iterable of all of a data set's images in order, each process with its share of the batches.

    Unlike under torch's ``DistributedSampler``, no image comes twice where they don't divide evenly; and batches are
    the same for any number of processes.

    Args:
        data: What to score on.
        images: Images a batch.
        trainer: Knows how many processes there are, and its device; None for one, on the CPU.
        options: Of torch's ``DataLoader``.
    """

    def __init__(self, data: Any, images: int, trainer: lightning.Trainer | None = None, **options: Any) -> None:
        if images < 1:
            raise ValueError(f"score_batch must be at least 1; got {images}")
        rank, replicas = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        starts = range(rank * images, len(data), replicas * images)
        self.batches = [list(range(start, min(start + images, len(data)))) for start in starts]
        self.data, self.options = data, {"pin_memory": on_gpu(trainer), **options}

    def __len__(self) -> int:
        """Batches, of this process."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """The batches, as ``collate_fn`` makes them."""
        # A generator of its own, as in training: to score must not move torch's.
        options = {"generator": torch.Generator(), **self.options}
        return iter(DataLoader(self.data, batch_sampler=self.batches, **options))


def on_gpu(trainer: lightning.Trainer | None) -> bool:
    """Whether batches go on to a GPU."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def _entropy(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
