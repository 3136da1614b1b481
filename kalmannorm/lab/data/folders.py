"""ImageNet-1k, and any images that lie in one folder a class, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kalmannorm.lab.data.roots import find, missing
from kalmannorm.lab.data.shuffling import shuffled

# ImageNet's, of pixels from 0 to 1; what pretrained networks expect, whatever the images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LAYOUT = ["train/*/*", "val/*/*"]
ORIGIN = (
    "where it is published (ImageNet-1k: https://image-net.org/download-images, its validation images sorted into "
    "one folder a class as the training images are)"
)


def image_transform(size: int, train: bool) -> Callable[[Any], Any]:
    """Pictures to normalized float32 ``(3, size, size)``, as networks on ImageNet are usually trained and scored.

    Args:
        size: Side of the squares, in pixels.
        train: A random part of the picture, flipped or not, instead of its centre (7/8 of the shorter side).
    """
    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform: Callable[[Any], Any] = v2.Compose([v2.ToImage(), *(random if train else centre), *last])
    return transform


def locate(folder: str) -> Path:
    """The folder of this name under ``KALMANNORM_DATA``, or else at this path.

    Raises:
        MissingDataError: There is none.
    """
    found = find(folder, [], ORIGIN)
    if found is None and Path(folder).is_dir():
        found = Path(folder)
    if found is None:
        raise missing(folder, LAYOUT, ORIGIN)
    return found


def _in_two(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ``0 .. count - 1`` in a random order, cut in two; the second part is ``share`` of them."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = round(share * count)
    return order[held_out:], order[:held_out]


class FolderData(lightning.LightningDataModule):
    """Images as ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, or as ``CLASS/*.jpg``, then split by a seed.

    After `setup`, ``classes`` are the names of the classes in the order of the labels, and ``num_classes`` how many.

    Args:
        folder: Name of a folder under ``KALMANNORM_DATA``, such as ``"imagenet"``, or a path.
        batch_size: Images a step and process.
        size: Side of the images, in pixels.
        workers: Processes that load images.
        validation: Share of the images to hold out where there are no ``train`` and ``val``.
        split_seed: Decides which; and with ``limit``, which ones are kept.
        limit: Keep so many images of each split, drawn from all classes.
        seed: Of the order; crops and flips follow torch's own seed.
    """

    def __init__(
        self,
        folder: str = "imagenet",
        batch_size: int = 32,
        *,
        size: int = 224,
        workers: int = 4,
        validation: float = 0.1,
        split_seed: int = 0,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a share between 0 and 1; got {validation}")
        self.folder, self.batch_size, self.size, self.workers = folder, batch_size, size, workers
        self.validation, self.split_seed, self.limit, self.seed = validation, split_seed, limit, seed

    def setup(self, stage: str | None = None) -> None:
        """List the images, once.

        Raises:
            MissingDataError: There is no such folder.
            ValueError: ``train`` and ``val`` differ in their classes.
        """
        if hasattr(self, "train_set"):
            return
        place = locate(self.folder)
        apart = [(place / name).is_dir() for name in ("train", "val")]
        if any(apart) and not all(apart):
            raise missing(self.folder, LAYOUT, ORIGIN)
        train, validation = (
            ImageFolder(str(place / name if all(apart) else place), image_transform(self.size, name == "train"))
            for name in ("train", "val")
        )
        if train.classes != validation.classes:
            differing = sorted(set(train.classes) ^ set(validation.classes))
            raise ValueError(f"{place}: train and val must have the same classes; only in one: {', '.join(differing)}")
        self.classes, self.num_classes = train.classes, len(train.classes)
        kept, held_out = self._indices(len(train), len(validation), apart=all(apart))
        self.train_set, self.validation_set = self._part(train, kept), self._part(validation, held_out)

    def _indices(self, train: int, validation: int, apart: bool) -> tuple[np.ndarray, np.ndarray]:
        if not apart:
            return _in_two(train, self.validation, self.split_seed)
        return _in_two(train, 0, self.split_seed)[0], _in_two(validation, 0, self.split_seed)[0]

    def _part(self, data: ImageFolder, indices: np.ndarray) -> Subset[Any]:
        # The first of a random order: the first files would all be of one class.
        return Subset(data, np.sort(indices[: self.limit]).tolist())

    def _loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(data, self.batch_size, num_workers=self.workers, pin_memory=self._on_gpu(), **options)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of as many images each."""
        order = shuffled(self.train_set, self.trainer, self.seed, drop_last=True)
        return self._loader(self.train_set, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation images, in order."""
        return self._loader(self.validation_set)
