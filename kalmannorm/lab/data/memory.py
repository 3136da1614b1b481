"""Data modules of tensors in memory: images, signals, tables or volumes."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from kalmannorm.lab.data.augmentation import Scaling, crop_and_flip, draw_moves, standardization
from kalmannorm.lab.data.batches import Batches

Labelled = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Three disjoint sets of inputs ``(N, C, *)`` with labels ``(N,)`` or ``(N, *)``, int64."""

    train: Labelled
    validation: Labelled
    test: Labelled


class MemoryBatches(Batches):
    """Batches of tensors ``(N, C, *)`` and labels on one device, without workers.

    Args:
        prepare: Applied to a batch of images last, such as a `Scaling`.
        augment: ``"none"``, ``"crop"`` (pad 4, crop at random) or ``"crop_flip"``; needs a seed.
        border: Colour of the padding, see `crop_and_flip`; for the other arguments see `Batches`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        gradient_batch: int,
        trainer: lightning.Trainer | None = None,
        *,
        prepare: Callable[[Tensor], Tensor],
        seed: int | None = None,
        augment: str = "none",
        border: Tensor | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(len(images), gradient_batch, trainer, seed, drop_last)
        self.inputs, self.labels, self.prepare, self.augment, self.border = images, labels, prepare, augment, border
        if augment not in ("none", "crop", "crop_flip"):
            raise ValueError(f"augment must be 'none', 'crop' or 'crop_flip'; got {augment!r}")
        if augment != "none" and seed is None:
            raise ValueError(f"augment={augment!r} needs a seed")

    def read(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order, generator = self.order()
        moves = None
        if self.augment != "none":  # for the whole epoch, so that draws do not depend on `first`
            moves = draw_moves(self.count, generator, flip=self.augment == "crop_flip").to(self.inputs.device)
        order = order.to(self.inputs.device)
        for here in map(self.share, range(first, len(self))):
            images = self.inputs[order[here]]
            if moves is not None:
                images = crop_and_flip(images, moves[here], border=self.border)
            yield self.prepare(images), self.labels[order[here]]


class MemoryData(lightning.LightningDataModule):
    """Base class of data modules in memory, whose batches are scaled on the trainer's device.

    Args:
        gradient_batch: Inputs in a gradient step, over all processes and accumulated batches.
        score_batch: Inputs in a batch of validation and test.
        drop_last: Leave out an incomplete last batch of an epoch, in training.
        seed: Seed of the order and of the draws in training.
        device: Device of the tensors; by default the trainer's.
    """

    def __init__(
        self,
        gradient_batch: int,
        *,
        score_batch: int = 500,
        drop_last: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.gradient_batch, self.score_batch = gradient_batch, score_batch
        self.drop_last, self.seed, self.device = drop_last, seed, device
        self._splits: Splits | None = None
        self._scale: Scaling | None = None

    @abstractmethod
    def load(self) -> Splits:
        """All inputs, unscaled, on the CPU."""

    def scaling_of(self, inputs: Tensor) -> Scaling:
        """The scaling of all batches, from the training inputs: mean 0 and standard deviation 1 in each channel.

        Both are over all inputs together, so differences between inputs stay.
        """
        return standardization(inputs)

    def augmentation_of(self, inputs: Tensor) -> dict[str, Any]:
        """Options of `MemoryBatches` for training only, from the training inputs."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once, and move them to the device."""
        if self._splits is not None:
            return
        splits, device = self.load(), self.device
        if device is None:
            device = self.trainer.strategy.root_device if self.trainer else "cpu"
        self._scale = self.scaling_of(splits.train[0]).to(device)
        self._splits = Splits(*((inputs.to(device), labels.to(device)) for inputs, labels in splits))

    def _batches(self, split: str, size: int, **options: Any) -> MemoryBatches:
        if self._splits is None or self._scale is None:
            raise RuntimeError("call setup() before asking for batches; a Trainer does so by itself")
        inputs, labels = getattr(self._splits, split)
        if split == "train":
            options |= self.augmentation_of(inputs)
        return MemoryBatches(inputs, labels, size, prepare=self._scale, **options)

    def train_dataloader(self) -> MemoryBatches:
        options = {"trainer": self.trainer, "seed": self.seed, "drop_last": self.drop_last}
        return self._batches("train", self.gradient_batch, **options)

    def val_dataloader(self) -> MemoryBatches | list[Any]:
        """All held-out inputs in order, in every process."""
        return self._batches("validation", self.score_batch)

    def test_dataloader(self) -> MemoryBatches:
        return self._batches("test", self.score_batch)
