"""A LightningDataModule over tensors in memory, whatever is in them: images, signals, tables or volumes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning
import torch
from torch import Tensor

from kalmannorm.lab.data.augmentation import Scaling
from kalmannorm.lab.data.memory import MemoryBatches, Splits
from kalmannorm.lab.data.sharing import images_a_process

__all__ = ["MemoryData"]


class MemoryData(lightning.LightningDataModule):
    """Splits that a subclass loads, as batches that are scaled on the trainer's device.

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
        self._scale: Scaling | None = None

    @abstractmethod
    def load(self) -> Splits:
        """All inputs, as they are; on the CPU."""

    def scaling_of(self, inputs: Tensor) -> Scaling:
        """What is done to every batch, from the inputs trained on: mean 0 and standard deviation 1 in each channel.

        Both are of all inputs together: the differences between inputs stay.
        """
        return standardization(inputs)

    def augmentation_of(self, inputs: Tensor) -> dict[str, Any]:
        """Which options of `MemoryBatches` there are in training alone, from the inputs trained on."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once, and move them to the device."""
        if self._splits is not None:
            return
        splits, device = self.load(), self._device()
        self._scale = self.scaling_of(splits.train[0]).to(device)
        self._splits = Splits(*((inputs.to(device), labels.to(device)) for inputs, labels in splits))

    def _device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _batches(self, split: str, batch_size: int, **options: Any) -> MemoryBatches:
        if self._splits is None or self._scale is None:
            raise RuntimeError("call setup() before asking for batches; a Trainer does so by itself")
        inputs, labels = getattr(self._splits, split)
        if split == "train":
            options |= self.augmentation_of(inputs)
        return MemoryBatches(inputs, labels, batch_size, prepare=self._scale, **options)

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

    def val_dataloader(self) -> MemoryBatches | list[Any]:
        """All held-out inputs in order, in every process."""
        return self._batches("validation", self.score_batch)

    def test_dataloader(self) -> MemoryBatches:
        """All test inputs in order, in every process."""
        return self._batches("test", self.score_batch)


def standardization(inputs: Tensor) -> Scaling:
    """Mean 0 and standard deviation 1 in each channel of ``inputs`` ``(N, C, *)``; constant ones become 0.

    For bytes, `kalmannorm.lab.data.augmentation.channel_scaling` does so without a copy in double precision.
    """
    over = [0, *range(2, inputs.ndim)]
    variance, mean = torch.var_mean(inputs.double(), over, correction=0, keepdim=True)
    std = variance.sqrt()
    return Scaling(mean[0].float(), torch.where(std > 0, std, 1.0)[0].float())
