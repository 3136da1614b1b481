"""Small images to classify, as a LightningDataModule."""

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from kalmannorm.lab.data.augmentation import SCALINGS, Scaling, mean_colour
from kalmannorm.lab.data.images import load_images, open_images
from kalmannorm.lab.data.memory import MemoryBatches, MemoryData, Splits
from kalmannorm.lab.data.roots import source


class ClassificationData(MemoryData):
    """CIFAR-10, CIFAR-100 or SVHN in memory, cropped, flipped and scaled on the trainer's device.

    Example:
        >>> data = ClassificationData("cifar10", gradient_batch=128, scaling="pixel", limit=1000)
        >>> data.num_classes
        10

    Args:
        name: ``"cifar10"``, ``"cifar100"``, ``"svhn"`` or ``"svhn_extra"``.
        gradient_batch: See `MemoryData`; its other options too.
        augment: Augmentation of training images: ``"crop_flip"``, ``"crop"`` (for digits) or ``"none"``.
        border: Colour of the padding in crops: ``"mean"``, the mean colour of the training images,
            which is scaled to about 0 (arXiv:1512.03385); or ``"black"``, which shifts the statistics
            of training images from those of test images.
        scaling: A key of `kalmannorm.lab.data.augmentation.SCALINGS`, computed on the training images.
        validation: Number of training images to hold out; 0 for no validation. ``"test"`` validates
            on the test images, as the paper's curves do; choose no settings by them.
        split_seed: Seed of the held-out images. It is not ``seed``, so that all runs have the same.
        limit: See `kalmannorm.lab.data.images.load_images`; ``classes`` too.
        size: Side of the resized images; None for 32.
    """

    def __init__(
        self,
        name: str,
        gradient_batch: int = 128,
        *,
        augment: str = "crop_flip",
        border: Literal["mean", "black"] = "mean",
        scaling: str = "channel",
        validation: int | Literal["test"] = 5000,
        split_seed: int = 0,
        limit: int | None = None,
        classes: list[int] | None = None,
        size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(gradient_batch, **options)
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}; got {scaling!r}")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        self.dataset, self.classes, self.size = name, classes, size
        self.num_classes = source(name).num_classes if classes is None else len(classes)
        if border not in ("mean", "black"):
            raise ValueError(f"border must be 'mean' or 'black'; got {border!r}")
        self.augment, self.border, self.scaling = augment, border, scaling
        self.validation, self.split_seed, self.limit = validation, split_seed, limit

    def prepare_data(self) -> None:
        open_images(self.dataset)

    def load(self) -> Splits:
        held_out = 0 if self.validation == "test" else self.validation
        return load_images(
            self.dataset, validation=held_out, split_seed=self.split_seed, limit=self.limit, classes=self.classes
        )

    def scaling_of(self, inputs: Tensor) -> Scaling:
        return replace(SCALINGS[self.scaling](inputs), size=self.size)

    def augmentation_of(self, inputs: Tensor) -> dict[str, Any]:
        return {"augment": self.augment, "border": mean_colour(inputs) if self.border == "mean" else None}

    def val_dataloader(self) -> MemoryBatches | list[Any]:
        """All held-out images in order, in every process; an empty list if there are none."""
        if self.validation == "test":
            return self.test_dataloader()
        return super().val_dataloader() if self.validation else []
