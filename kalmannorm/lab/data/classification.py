"""Small images to classify, as a LightningDataModule."""

from __future__ import annotations

from typing import Any, Literal

import lightning
import torch

from kalmannorm.lab.data.augmentation import SCALINGS, Scaling, mean_colour
from kalmannorm.lab.data.images import ImageSplits, load_images, open_images, source
from kalmannorm.lab.data.memory import MemoryBatches
from kalmannorm.lab.data.sharing import images_a_process


class ClassificationData(lightning.LightningDataModule):
    """CIFAR-10, CIFAR-100 or SVHN in memory: batches are cropped, flipped and scaled on the trainer's device.

    Example:
        >>> data = ClassificationData("cifar10", gradient_batch=128, scaling="pixel", limit=1000)
        >>> data.num_classes
        10

    Args:
        name: ``"cifar10"``, ``"cifar100"``, ``"svhn"`` or ``"svhn_extra"``.
        gradient_batch: Images a gradient step, over all processes and accumulated batches. How many share their
            statistics is the layers' affair.
        score_batch: Images a batch in validation and test.
        augment: ``"crop_flip"``, ``"crop"`` (digits must not be flipped) or ``"none"``; in training alone.
        border: What crops show beyond an image: ``"mean"``, the mean colour of the images trained on, so that zeros
            reach the network (arXiv:1512.03385); or ``"black"``, which makes the statistics of training images other
            than those of test images.
        scaling: ``"channel"``: mean 0 and standard deviation 1 in each channel; ``"pixel"``: as the paper's released
            code, pixels / 128 minus the mean at each pixel. Both are taken from the images trained on.
        validation: How many training images to hold out; with 0 there is no validation. ``"test"`` holds out none and
            validates on the test images, as the paper's curves do: nothing may be chosen by them.
        split_seed: Decides which, apart from ``seed`` so that all runs are compared on the same images.
        limit: Keep the first so many images of each split.
        drop_last: Leave out an epoch's last batch of fewer images, in training.
        seed: Of the order and of the crops.
        device: Where the images are kept; by default where the trainer's model is.
    """

    def __init__(
        self,
        name: str,
        gradient_batch: int = 128,
        *,
        score_batch: int = 500,
        augment: str = "crop_flip",
        border: Literal["mean", "black"] = "mean",
        scaling: str = "channel",
        validation: int | Literal["test"] = 5000,
        split_seed: int = 0,
        limit: int | None = None,
        drop_last: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {scaling!r}")
        self.dataset, self.num_classes = name, source(name).num_classes
        self.gradient_batch, self.score_batch = gradient_batch, score_batch
        if border not in ("mean", "black"):
            raise ValueError(f"border must be 'mean' or 'black'; got {border!r}")
        self.augment, self.border, self.scaling = augment, border, scaling
        self.validation, self.split_seed, self.limit = validation, split_seed, limit
        self.drop_last, self.seed, self.device = drop_last, seed, device
        self._splits: ImageSplits | None = None
        self._scale: Scaling | None = None

    def prepare_data(self) -> None:
        """Download, in one process, if need be."""
        open_images(self.dataset)

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once, and move them to the device."""
        if self._splits is not None:
            return
        held_out = 0 if self.validation == "test" else self.validation
        splits = load_images(self.dataset, validation=held_out, split_seed=self.split_seed, limit=self.limit)
        device = self._device()
        train, validation, test = ((images.to(device), labels.to(device)) for images, labels in splits)
        self._splits = ImageSplits(train, validation, test)
        self._scale = SCALINGS[self.scaling](splits.train[0]).to(device)

    def _device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _batches(self, split: str, batch_size: int, **options: Any) -> MemoryBatches:
        if self._splits is None or self._scale is None:
            raise _not_set_up()
        images, labels = getattr(self._splits, split)
        return MemoryBatches(images, labels, batch_size, prepare=self._scale, **options)

    def train_dataloader(self) -> MemoryBatches:
        """Shuffled batches; each process gets its share.

        Raises:
            ValueError: The gradient batch does not divide evenly among processes and accumulated batches.
        """
        if self._splits is None:
            raise _not_set_up()
        border = mean_colour(self._splits.train[0]) if self.border == "mean" else None
        options: dict[str, Any] = {"seed": self.seed, "augment": self.augment, "border": border}
        options["drop_last"] = self.drop_last
        if trainer := self.trainer:
            options |= {"rank": trainer.global_rank, "replicas": trainer.world_size}
            options |= {"accumulated": trainer.accumulate_grad_batches}
        return self._batches("train", images_a_process(self.gradient_batch, trainer), **options)

    def val_dataloader(self) -> MemoryBatches | list[Any]:
        """All held-out images in order, in every process; none if none are held out."""
        if self.validation == "test":
            return self.test_dataloader()
        return self._batches("validation", self.score_batch) if self.validation else []

    def test_dataloader(self) -> MemoryBatches:
        """All test images in order, in every process."""
        return self._batches("test", self.score_batch)


def _not_set_up() -> RuntimeError:
    return RuntimeError("call setup() before asking for batches; a Trainer does so by itself")
