"""Batches whose order and draws depend on a seed and the epoch alone, distributed over processes, resumable."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def images_a_process(gradient_batch: int, trainer: lightning.Trainer | None) -> int:
    """Images of one process's batch: a gradient step's share of a process and an accumulated batch."""
    processes, accumulated = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
    if gradient_batch < 1:
        raise ValueError(f"gradient_batch must be at least 1; got {gradient_batch}")
    share, rest = divmod(gradient_batch, processes * accumulated)
    if rest:
        raise ValueError(
            f"gradient_batch must be a multiple of {processes * accumulated}, as {processes} processes accumulate "
            f"{accumulated} batches each; got {gradient_batch}"
        )
    return share


class Batches(ABC):
    """An iterable of this process's batches.

    Lightning calls ``sampler.set_epoch``, which changes the order and the draws, and keeps the
    ``state_dict`` in checkpoints: after `load_state_dict` an interrupted epoch resumes without reading
    its earlier batches. torchdata's ``StatefulDataLoader`` does not split a gradient batch, and
    counts batches that workers have prefetched.

    The images of a gradient batch are contiguous in the order, and so are those of each process:
    groups of images that are normalized together are the same for any number of processes.

    Args:
        count: Number of images.
        gradient_batch: Images in a gradient step, over all processes and accumulated batches.
        trainer: Has the number of both; None for one of each.
        seed: Seed of the order and of the draws; None for the images' own order.
        drop_last: Leave out the last images of an epoch if they are too few for a gradient step.
            Otherwise fewer images than processes are left out, so that all processes get as many.

    Attributes:
        images: Images in this process's batch.
        epoch: Epoch of the next iteration.
        yielded: Number of the epoch's batches that were yielded.
    """

    epoch = 0
    yielded = 0
    _skipped = 0
    # Lightning reads this from any loader that has a `sampler`.
    batch_sampler = None

    def __init__(
        self, count: int, gradient_batch: int, trainer: lightning.Trainer | None, seed: int | None, drop_last: bool
    ) -> None:
        self.images = images_a_process(gradient_batch, trainer)
        self.count, self.seed, self.drop_last = count, seed, drop_last
        self.rank, self.replicas = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        self.accumulated = gradient_batch // (self.images * self.replicas)
        if len(self) < 1:
            raise ValueError(f"gradient_batch must be at most {count}, the images there are; got {gradient_batch}")

    def __len__(self) -> int:
        """Number of this process's batches in an epoch."""
        whole, rest = divmod(self.count, self.images * self.replicas)
        return whole - whole % self.accumulated if self.drop_last else whole + (rest >= self.replicas)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that this runs at the first `next`: Lightning sets the epoch after it calls `iter`.
        first, self._skipped = self._skipped, 0
        for index, batch in enumerate(self.read(first), first + 1):
            self.yielded = index
            yield batch

    @abstractmethod
    def read(self, first: int) -> Iterator[Any]:
        """The epoch's batches from the index ``first`` on."""

    def order(self) -> tuple[Tensor, torch.Generator]:
        """The order of the epoch's images over all processes, ``(N,)``, and a generator for further draws."""
        generator = torch.Generator()
        if self.seed is None:
            return torch.arange(self.count), generator
        # On the CPU, so that draws do not depend on the device.
        generator.manual_seed(_entropy(self.seed, self.epoch))
        return torch.randperm(self.count, generator=generator), generator

    def share(self, index: int) -> slice:
        """The slice of the order with this process's part of a batch."""
        start = index * self.images * self.replicas
        size = min(self.images, (self.count - start) // self.replicas)
        return slice(start + self.rank * size, start + (self.rank + 1) * size)

    @property
    def sampler(self) -> Self:
        """The loader itself; Lightning calls `set_epoch` of a loader's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The number of this epoch's batches that were yielded; its key is that of existing checkpoints."""
        return {"handed_out": self.yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the yielded batches in the next iteration."""
        self._skipped = self.yielded = state["handed_out"] % len(self)


class _Drawn(Dataset[Any]):
    """A data set whose random transforms are seeded by ``(seed, epoch, index)``, in any process and order."""

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the GPUs too.
            torch.default_generator.manual_seed(_entropy(self.seed, epoch, index))
            return self.data[index]


class ShuffledBatches(Batches):
    """Shuffled, complete gradient batches, read by worker processes."""

    def __init__(
        self, data: Any, gradient_batch: int, trainer: lightning.Trainer | None = None, *, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(len(data), gradient_batch, trainer, seed, drop_last=True)
        self.data, self.drawn, self.options = data, _Drawn(data, seed), _loading(trainer, options)

    def read(self, first: int) -> Iterator[Any]:
        order = self.order()[0].tolist()
        places = [[(self.epoch, each) for each in order[self.share(index)]] for index in range(first, len(self))]
        # The loader draws a seed for its workers; with its own generator, torch's random state does not change.
        return iter(DataLoader(self.drawn, batch_sampler=places, generator=torch.Generator(), **self.options))


class OrderedBatches:
    """All images in order; each process gets its share of the batches.

    Unlike with torch's ``DistributedSampler``, no image is repeated, and batches are the same for any
    number of processes. ``options`` are those of torch's ``DataLoader``.
    """

    def __init__(self, data: Any, images: int, trainer: lightning.Trainer | None = None, **options: Any) -> None:
        if images < 1:
            raise ValueError(f"score_batch must be at least 1; got {images}")
        rank, replicas = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        starts = range(rank * images, len(data), replicas * images)
        self.batches = [list(range(start, min(start + images, len(data)))) for start in starts]
        self.data, self.options = data, _loading(trainer, options)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, batch_sampler=self.batches, generator=torch.Generator(), **self.options))


class DiskData(lightning.LightningDataModule):
    """Base class of data modules that are read by worker processes; ``setup`` opens the data sets.

    A gradient step has ``gradient_batch`` images, over all processes and accumulated batches. The seed
    decides the order and the draws for each image; ``options`` are those of torch's ``DataLoader``.
    """

    train_set: Any
    validation_set: Any

    def __init__(self, gradient_batch: int, score_batch: int, seed: int, **options: Any) -> None:
        super().__init__()
        self.gradient_batch, self.score_batch, self.seed, self.options = gradient_batch, score_batch, seed, options

    def train_dataloader(self) -> ShuffledBatches:
        return ShuffledBatches(self.train_set, self.gradient_batch, self.trainer, seed=self.seed, **self.options)

    def val_dataloader(self) -> OrderedBatches:
        return OrderedBatches(self.validation_set, self.score_batch, self.trainer, **self.options)


def _loading(trainer: lightning.Trainer | None, options: dict[str, Any]) -> dict[str, Any]:
    return {"pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda", **options}


def _entropy(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
