"""A LightningDataModule over tensors in memory, whatever is in them: the common part of signals, tables and volumes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from kalmannorm.lab.data.augmentation import Scaling
from kalmannorm.lab.data.memory import MemoryBatches
from kalmannorm.lab.data.sharing import images_a_process

__all__ = ["Labelled", "MemoryData", "Splits"]

Labelled = tuple[Tensor, Tensor]


class Splits(NamedTuple):
    """Three disjoint sets of inputs ``(N, C, *)``, float32, with labels ``(N,)`` or ``(N, *)``, int64.

    Attributes:
        train: To train on.
        validation: To choose hyper-parameters on.
        test: To be scored once.
    """

    train: Labelled
    validation: Labelled
    test: Labelled


class MemoryData(lightning.LightningDataModule):
    """Splits that a subclass loads, as batches; each channel of the inputs with mean 0 and standard deviation 1.

    Both are taken from the inputs trained on, all of them together: the differences between inputs stay.

    Args:
        gradient_batch: Inputs a gradient step, over all processes and accumulated batches.
        score_batch: Inputs a batch in validation and test.
        drop_last: Leave out an epoch's last batch of fewer inputs, in training.
        seed: Of the order.
        device: Where the tensors are kept; by default where the trainer's model is.
    """

    def __init__(
        self,
        gradient_batch: int,
        *,
        score_batch: int,
        drop_last: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.gradient_batch, self.score_batch = gradient_batch, score_batch
        self.drop_last, self.seed, self.device = drop_last, seed, device
        self._splits: Splits | None = None

    @abstractmethod
    def load(self) -> Splits:
        """All inputs, as they are; on the CPU."""

    def setup(self, stage: str | None = None) -> None:
        """Load, scale, and move to the device; once."""
        if self._splits is not None:
            return
        splits, device = self.load(), self._device()
        scale = channel_scaling(splits.train[0])
        scaled = [(scale(inputs).to(device), labels.to(device)) for inputs, labels in splits]
        self._splits = Splits(*scaled)

    def _device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _batches(self, split: str, batch_size: int, **options: Any) -> MemoryBatches:
        if self._splits is None:
            raise RuntimeError("call setup() before asking for batches; a Trainer does so by itself")
        inputs, labels = getattr(self._splits, split)
        return MemoryBatches(inputs, labels, batch_size, prepare=_as_it_is, **options)

    def train_dataloader(self) -> MemoryBatches:
        """Shuffled batches; each process gets its share.

        Raises:
            ValueError: The gradient batch does not divide evenly among processes and accumulated batches.
        """
        options: dict[str, Any] = {"seed": self.seed, "drop_last": self.drop_last}
        if trainer := self.trainer:
            options |= {"rank": trainer.global_rank, "replicas": trainer.world_size}
            options |= {"accumulated": trainer.accumulate_grad_batches}
        return self._batches("train", images_a_process(self.gradient_batch, trainer), **options)

    def val_dataloader(self) -> MemoryBatches:
        """All held-out inputs in order, in every process."""
        return self._batches("validation", self.score_batch)

    def test_dataloader(self) -> MemoryBatches:
        """All test inputs in order, in every process."""
        return self._batches("test", self.score_batch)


def _as_it_is(inputs: Tensor) -> Tensor:
    return inputs


def channel_scaling(inputs: Tensor) -> Scaling:
    """Mean 0 and standard deviation 1 in each channel of ``inputs`` ``(N, C, *)``; constant ones become 0."""
    over = [0, *range(2, inputs.ndim)]
    variance, mean = torch.var_mean(inputs.double(), over, correction=0, keepdim=True)
    std = variance.sqrt()
    return Scaling(mean[0].float(), torch.where(std > 0, std, 1.0)[0].float())
