"""Data sets for detection, with boxes and masks in COCO's format: COCO 2017 and Penn-Fudan pedestrians."""

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CocoDetection
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from kalmannorm.lab.data.batches import DiskData
from kalmannorm.lab.data.roots import find, missing

Target = dict[str, Any]


class Files(NamedTuple):
    """A split's images and annotations, relative to the data set's folder."""

    images: str
    annotations: str


class Source(NamedTuple):
    """Where a data set comes from, and its splits."""

    origin: str
    train: Files
    validation: Files

    @property
    def layout(self) -> list[str]:
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


class DetectionSet(Dataset[tuple[Tensor, Target]]):
    """Images and their objects, from a folder with annotations in COCO's format, masks as polygons or
    run lengths.

    An item is an image ``(3, H, W)``, float32, 0 to 1, and a target, as torchvision's detectors
    take them: ``boxes`` ``(K, 4)``, float32, left, top, right, bottom in pixels; ``labels``
    ``(K,)``, int64, COCO's category ids (0 is the background); ``masks`` ``(K, H, W)``, uint8;
    ``image_id``, int; ``iscrowd`` ``(K,)``, int64. Boxes without area are left out.

    In training, half of the images are flipped; crowds (one box around many objects) and images
    without objects are left out. Scoring needs crowds, where detections must not count as wrong.
    """

    def __init__(self, folder: Path, files: Files, train: bool, limit: int | None = None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            self.files = CocoDetection(str(folder / files.images), str(folder / files.annotations))
        self.coco = self.files.coco
        # Detectors resize and normalize by themselves.
        flip = [v2.RandomHorizontalFlip()] if train else []
        self.transform: Any = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
        self.train = train
        kept = [place for place, image in enumerate(self.files.ids) if not train or self._annotations(image)]
        self.places = kept[:limit]

    def _annotations(self, image: int) -> list[dict[str, Any]]:
        """An image's annotations, without boxes of zero area, whose size has no logarithm."""
        known = self.coco.imgToAnns.get(image, [])
        return [each for each in known if not (self.train and each.get("iscrowd", 0)) and min(each["bbox"][2:]) > 0]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        (picture, _), image = self.files[self.places[index]], self.files.ids[self.places[index]]
        target = self._target(self._annotations(image), image, picture.size[::-1])
        return self.transform(picture, target)  # type: ignore[no-any-return]

    def _target(self, annotations: list[dict[str, Any]], image: int, size: tuple[int, int]) -> Target:
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).view(-1, 4)
        corners = box_convert(boxes, "xywh", "xyxy")
        # The first, empty mask lets `stack` work without annotations.
        masks = np.stack([np.zeros(size, np.uint8), *map(self.coco.annToMask, annotations)])[1:]
        return {
            "boxes": BoundingBoxes(corners, format="XYXY", canvas_size=size),  # type: ignore[call-overload]
            "labels": torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64),
            "masks": Mask(torch.from_numpy(masks)),
            "image_id": image,
            "iscrowd": torch.tensor([annotation.get("iscrowd", 0) for annotation in annotations], dtype=torch.int64),
        }


def as_lists(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Collate images of different sizes, and targets, as lists."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)


class DetectionData(DiskData):
    """COCO 2017 (``coco``) or Penn-Fudan pedestrians (``pennfudan``), under ``KALMANNORM_DATA``.

    After `setup`, ``num_classes`` is the largest category id + 1. There is no test split: COCO's
    test images have no public annotations, and papers report scores on its validation images. Each
    split keeps its first ``limit`` images. For the other arguments see `DiskData`.
    """

    def __init__(
        self,
        name: str,
        gradient_batch: int = 1,
        *,
        score_batch: int = 1,
        workers: int = 4,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(gradient_batch, score_batch, seed, num_workers=workers, collate_fn=as_lists)
        if name not in SOURCES:
            raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
        self.dataset, self.limit = name, limit

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        source = SOURCES[self.dataset]
        folder = find(self.dataset, source.layout, source.origin)
        if folder is None:
            raise missing(self.dataset, source.layout, source.origin)
        self.train_set = DetectionSet(folder, source.train, True, self.limit)
        self.validation_set = DetectionSet(folder, source.validation, False, self.limit)
        self.num_classes = max(self.train_set.coco.getCatIds()) + 1
