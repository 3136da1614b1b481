"""Objects to find, with boxes and masks, from files in COCO's format: COCO 2017 and Penn-Fudan pedestrians."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from kalmannorm.lab.data.roots import require
from kalmannorm.lab.data.shuffling import shuffled

Target = dict[str, Any]
Transform = Callable[[Any, Target], tuple[Tensor, Target]]


@dataclass(frozen=True)
class Files:
    """A split's images and annotations, relative to the data set's folder."""

    images: str
    annotations: str


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and its splits."""

    origin: str
    train: Files
    validation: Files

    @property
    def layout(self) -> list[str]:
        """The files it needs, as patterns relative to its folder."""
        patterns = [(split.annotations, f"{split.images}/*.jpg") for split in (self.train, self.validation)]
        return list(dict.fromkeys(pattern for pair in patterns for pattern in pair))


SOURCES = {
    "coco": Source(
        "https://cocodataset.org/#download (2017 train and val images, and their annotations)",
        Files("train2017", "annotations/instances_train2017.json"),
        Files("val2017", "annotations/instances_val2017.json"),
    ),
    "pennfudan": Source(
        "https://www.cis.upenn.edu/~jshi/ped_html/ (its masks are to be converted to COCO's format)",
        Files("images", "annotations/instances_train.json"),
        Files("images", "annotations/instances_val.json"),
    ),
}


def _usable(annotation: dict[str, Any]) -> bool:
    # A crowd is one box around many objects; a box without area has no logarithm of its size to learn.
    return not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0


class DetectionSet(Dataset[tuple[Tensor, Target]]):
    """Images with what is to be found on them.

    An item is an image ``(3, H, W)`` and a target, as torchvision's detectors take them: ``boxes`` ``(K, 4)``,
    float32, left, top, right, bottom in pixels; ``labels`` ``(K,)``, int64, COCO's category ids (0 is the background);
    ``masks`` ``(K, H, W)``, uint8; ``image_id``, int. Crowds and boxes without area are left out; ``coco`` still has
    them, for a score.

    Args:
        images: Folder of the images.
        annotations: Annotations in COCO's format, their masks as polygons or as run lengths.
        transform: Takes and returns an image and its target; see torchvision's v2.
        drop_empty: Leave out images on which nothing is to be found.
        limit: Keep the first so many images.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        transform: Transform,
        *,
        drop_empty: bool = False,
        limit: int | None = None,
    ) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self.files = CocoDetection(str(images), str(annotations))
        self.coco = self.files.coco
        self.transform = transform
        kept = [place for place, image in enumerate(self.files.ids) if not drop_empty or self._annotations(image)]
        self.places = kept[:limit]

    def _annotations(self, image: int) -> list[dict[str, Any]]:
        return [annotation for annotation in self.coco.imgToAnns.get(image, []) if _usable(annotation)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """An image and its target."""
        picture, annotations = self.files[self.places[index]]
        usable = [annotation for annotation in annotations if _usable(annotation)]
        return self.transform(picture, self._target(usable, self.files.ids[self.places[index]], picture.size[::-1]))

    def _target(self, annotations: list[dict[str, Any]], image: int, size: tuple[int, int]) -> Target:
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).view(-1, 4)
        corners = box_convert(boxes, "xywh", "xyxy")
        # The empty mask in front gives a stack of none its shape.
        masks = np.stack([np.zeros(size, np.uint8), *map(self.coco.annToMask, annotations)])[1:]
        return {
            "boxes": BoundingBoxes(corners, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64),
            "masks": Mask(torch.from_numpy(masks)),
            "image_id": image,
        }


def detection_transform(train: bool) -> Transform:
    """Images to float32, 0 to 1; in training half of them flipped. Detectors resize and normalize by themselves."""
    flip = [v2.RandomHorizontalFlip()] if train else []
    transform: Transform = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
    return transform


def as_lists(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images, which differ in size, and targets, each as a list."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


class DetectionData(lightning.LightningDataModule):
    """COCO 2017 (``coco``) or Penn-Fudan pedestrians (``pennfudan``), from under ``KALMANNORM_DATA``.

    After `setup`, ``num_classes`` is the largest category id + 1, and ``validation_set.coco`` the ground truth that
    pycocotools scores against.

    Args:
        name: ``"coco"`` or ``"pennfudan"``.
        batch_size: Images a step and process.
        workers: Processes that load images.
        limit: Keep the first so many images of each split.
        seed: Of the order; flips follow torch's own seed.
    """

    def __init__(
        self, name: str, batch_size: int = 2, *, workers: int = 4, limit: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if name not in SOURCES:
            raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
        self.dataset, self.batch_size, self.workers = name, batch_size, workers
        self.limit, self.seed = limit, seed

    def setup(self, stage: str | None = None) -> None:
        """Read the annotations, once.

        Raises:
            MissingDataError: The data set is not under ``KALMANNORM_DATA``.
        """
        if hasattr(self, "train_set"):
            return
        source = SOURCES[self.dataset]
        folder = require(self.dataset, source.layout, source.origin)
        self.train_set = self._open(folder, source.train, train=True)
        self.validation_set = self._open(folder, source.validation, train=False)
        self.num_classes = max(self.train_set.coco.getCatIds()) + 1

    def _open(self, folder: Path, files: Files, train: bool) -> DetectionSet:
        options: dict[str, Any] = {"drop_empty": train, "limit": self.limit}
        return DetectionSet(folder / files.images, folder / files.annotations, detection_transform(train), **options)

    def _loader(self, data: DetectionSet, **options: Any) -> DataLoader[Any]:
        return DataLoader(data, self.batch_size, num_workers=self.workers, collate_fn=as_lists, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of as many images each, every image with something on it."""
        order = shuffled(self.train_set, self.trainer, self.seed, drop_last=True)
        return self._loader(self.train_set, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation images, in order."""
        return self._loader(self.validation_set)
