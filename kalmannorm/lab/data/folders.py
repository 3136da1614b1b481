"""ImageNet-1k, and any images in one folder for each class, as a LightningDataModule."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import v2

from kalmannorm.lab.data.batches import DiskData, OrderedBatches
from kalmannorm.lab.data.hub import HubImages, hub_parts, local_parts
from kalmannorm.lab.data.roots import MissingDataError, data_root, find, missing

# ImageNet's, for pixels from 0 to 1; pretrained networks expect them for any images.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Downloading it needs a login that has accepted its terms. Its test images have no labels.
REPOSITORY = "ILSVRC/imagenet-1k"
HUB_PARTS = {"train": "train", "validation": "val"}
LAYOUT = ["train/*/*", "val/*/*"]
ORIGIN = (
    "where it is published (ImageNet-1k: https://image-net.org/download-images, its validation images sorted into "
    "one folder a class as the training images are)"
)
# Layouts of any other folder.
OWN_LAYOUTS = (
    "one with images as CLASS/*.jpg, or as train/CLASS/*.jpg, val/CLASS/*.jpg and perhaps test/CLASS/*.jpg "
    "(or .png and the like)"
)


def image_transform(size: int, train: bool) -> Callable[[Any], Any]:
    """Transform pictures to normalized float32 ``(3, size, size)``, as is usual for ImageNet."""
    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform: Callable[[Any], Any] = v2.Compose([v2.ToImage(), *(random if train else centre), *last])
    return transform


def locate(folder: str) -> Path | None:
    """The folder of this name under ``KALMANNORM_DATA``, or else at this path; None if there is neither."""
    found = find(folder, [], ORIGIN)
    return Path(folder) if found is None and Path(folder).is_dir() else found


def open_pictures(folder: str) -> dict[str, Any]:
    """The existing parts of a set of pictures, ``train`` at least, without a transform.

    Args:
        folder: Name of a folder under ``KALMANNORM_DATA``, or a path. ``"imagenet"`` may hold the Parquet files of its
            Hugging Face repository instead; without a folder it is downloaded from there.

    Raises:
        MissingDataError: There is no such folder, or parts are missing.
    """
    place = locate(folder)
    if place is None:
        if folder != "imagenet":
            under = f", neither as a path nor under {root}" if (root := data_root()) else ""
            raise MissingDataError(f"the folder {folder!r} was not found{under}; expected {OWN_LAYOUTS}")
        try:
            return _hub_images(hub_parts(REPOSITORY, HUB_PARTS))
        except OSError as error:  # the hub's errors too
            raise missing(folder, LAYOUT, f"{ORIGIN}, or log in at the Hugging Face hub for {REPOSITORY}") from error
    if tables := local_parts(place, HUB_PARTS):
        return _hub_images(tables)
    parts = {part: place / part for part in ("train", "val", "test") if (place / part).is_dir()}
    if parts and not {"train", "val"} <= set(parts):
        if folder != "imagenet":
            raise MissingDataError(f"{folder} has {' and '.join(parts)} of train, val and test; expected {OWN_LAYOUTS}")
        raise missing(folder, LAYOUT, ORIGIN)
    return {part: _Pictures(str(path)) for part, path in (parts or {"train": place}).items()}


class _Pictures(ImageFolder):  # type: ignore[misc]
    """An ImageFolder without hidden files and folders, such as ``.ipynb_checkpoints`` and ``._1.jpg``."""

    def __init__(self, folder: str) -> None:
        def is_picture(path: str) -> bool:
            hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
            return not hidden and has_file_allowed_extension(path, IMG_EXTENSIONS)

        super().__init__(folder, is_valid_file=is_picture)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        return names, {name: place for place, name in enumerate(names)}


def _hub_images(tables: dict[str, Any]) -> dict[str, Any]:
    return {HUB_PARTS[part]: HubImages(rows) for part, rows in tables.items()}


class FolderData(DiskData):
    """Images as ``train/CLASS/*.jpg``, ``val/CLASS/*.jpg`` and perhaps ``test/CLASS/*.jpg``, or as ``CLASS/*.jpg``.

    Settings must not be chosen on the images whose score is reported. So without a ``test`` folder, ``val`` is the test
    split, and validation images are held out from ``train``; without both, both splits are held out.

    After `setup`, ``classes`` are the names of the classes in the order of the labels; ``num_classes`` is their number.

    Args:
        folder: See `open_pictures`.
        gradient_batch: See `DiskData`; ``score_batch`` and ``seed`` too.
        size: Side of the images, in pixels.
        workers: Processes that load images.
        validation: Share of each class's training images to hold out if there is no ``test`` folder, at least one image
            (none of a class with very few images); without ``val`` as many more for the test split. ``"test"`` holds
            none out and validates on the test images, for curves as in papers; choose no settings by them.
        split_seed: Seed of the held-out images, and with ``limit`` of the kept ones.
        limit: Number of images to keep of each split, drawn from all classes.
        pictures: Expected value of ``found``: the number of pictures and a digest of their names and sizes.
    """

    test_set: Any

    def __init__(
        self,
        folder: str = "imagenet",
        gradient_batch: int = 256,
        *,
        score_batch: int = 64,
        size: int = 224,
        workers: int = 4,
        validation: float | Literal["test"] = 0.1,
        split_seed: int = 0,
        limit: int | None = None,
        pictures: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(gradient_batch, score_batch, seed, num_workers=workers)
        if validation != "test" and not 0 < validation < 0.5:
            raise ValueError(f"validation must be a share between 0 and 0.5, or 'test'; got {validation}")
        self.folder, self.size = folder, size
        self.validation, self.split_seed, self.limit, self.pictures = validation, split_seed, limit, pictures

    def setup(self, stage: str | None = None) -> None:
        """List the images, once."""
        if hasattr(self, "train_set"):
            return
        pictures = self.parts = open_pictures(self.folder)
        if self.pictures is not None and self.pictures != self.found:
            raise ValueError(f"{self.folder}: the pictures have changed: expected {self.pictures}; got {self.found}")
        if self.validation == "test" and "val" not in pictures:
            raise ValueError(f"{self.folder} has no test images to validate on: expected train/ and val/, or a share")
        self.classes, self.num_classes = _common_classes(self.folder, pictures), len(pictures["train"].classes)
        splits = _splits(pictures, self.validation, self.split_seed)
        for split, (part, indices) in splits.items():
            # A copy, since listing a large folder again would take minutes.
            transformed = copy.copy(pictures[part])
            transformed.transform = image_transform(self.size, split == "train")
            # In random order: the first files are all of one class.
            kept = Subset(transformed, np.sort(indices[: self.limit]).tolist())
            setattr(self, f"{split}_set", kept)

    @property
    def found(self) -> str:
        """After `setup`, the number of pictures, and a digest of their names and sizes, or of Parquet files' labels."""
        entries: list[str] = []
        for part, files in self.parts.items():
            paths = [Path(path) for path, _ in getattr(files, "samples", [])]
            entries += [f"{part}/{path.relative_to(files.root)} {path.stat().st_size}" for path in paths] or [
                f"{part} {label}" for label in files.targets
            ]
        return f"{len(entries)} pictures, {hashlib.sha256(repr(entries).encode()).hexdigest()[:12]}"

    def test_dataloader(self) -> OrderedBatches:
        return OrderedBatches(self.test_set, self.score_batch, self.trainer, **self.options)


def _common_classes(place: str, folders: dict[str, Any]) -> list[str]:
    known: list[str] = folders["train"].classes
    for part, files in folders.items():
        if differing := ", ".join(sorted(set(known) ^ set(files.classes))):
            raise ValueError(f"{place}: train and {part} must have the same classes; only in one: {differing}")
    return known


def _splits(pictures: dict[str, Any], share: float | Literal["test"], seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Each split's folder and the indices of its images, in random order; ``share`` is the argument ``validation``."""
    order = {part: np.random.default_rng(seed).permutation(len(files)) for part, files in pictures.items()}
    whole = {part: (part, indices) for part, indices in order.items()}
    if share == "test":
        scored = whole["test" if "test" in pictures else "val"]
        return {"train": whole["train"], "validation": scored, "test": scored}
    if "test" in pictures:
        return {"train": whole["train"], "validation": whole["val"], "test": whole["test"]}
    held_out = ["validation"] if "val" in pictures else ["validation", "test"]
    parts = _cut(order["train"], np.asarray(pictures["train"].targets), share, len(held_out))
    splits = {split: ("train", part) for split, part in zip([*held_out, "train"], parts, strict=True)}
    return splits if "test" in splits else {**splits, "test": whole["val"]}


def _cut(order: np.ndarray, labels: np.ndarray, share: float, times: int) -> list[np.ndarray]:
    """Cut ``order`` into ``times`` parts with a share of each class, at least one image, and the rest."""
    # Shares are of each class, so that small classes are represented. A class with too few images for all parts and
    # the rest is in the rest alone: it is trained on, but not scored.
    own = labels[order]
    counts = np.bincount(own)
    size = np.maximum(1, np.rint(share * counts)).astype(int)
    enough = counts > times
    # An image's index within its class.
    place = np.empty_like(order)
    place[np.argsort(own, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    part = np.where(enough[own], np.minimum(place // size[own], times), times)
    return [order[part == number] for number in range(times + 1)]
