"""Small sets of generated images, on disk in the layouts of the real ones: to try a training without its data.

A class is a picture of a few coloured patches; an image is that picture, a little darker or lighter, under noise. A
network learns to tell them apart in tens of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from kalmannorm.lab.data.generated_objects import generate_objects
from kalmannorm.lab.data.images import source

__all__ = ["generate_folders", "generate_for", "generate_images", "pictures"]

PATCHES = 4


def generate_for(data: Mapping[str, Any], root: Path) -> Path:
    """Write the set that a configuration's ``data`` names, unless it is there.

    Args:
        data: ``class_path`` and ``init_args`` of a data module.
        root: The folder for data sets.

    Returns:
        The set's folder; ``root`` itself for data that need no files.

    Raises:
        ValueError: A data module that there are no generated sets for.
    """
    kind, options = data["class_path"].rpartition(".")[2], data["init_args"]
    if kind == "ClassificationData":
        return generate_images(root, options["name"])
    if kind == "FolderData":
        folder = options.get("folder", "imagenet")
        return root / folder if (root / folder).exists() else generate_folders(root, folder)
    if kind == "DetectionData":
        return generate_objects(root, options["name"])
    if kind in ("ClutterData", "SignalData", "VolumeData"):
        return root  # which come without files
    raise ValueError(f"there are no generated images for {kind}")


def pictures(count: int, size: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated images, class after class in turn.

    Args:
        count: Number of images.
        size: Their height and width, a multiple of 4.
        num_classes: Number of classes; the classes of a number are the same whatever the seed.
        seed: Of brightness and noise.

    Returns:
        Images ``(count, size, size, 3)``, uint8, and labels ``(count,)``.
    """
    classes = np.random.default_rng(num_classes).integers(60, 196, (num_classes, PATCHES, PATCHES, 3))
    labels = np.arange(count) % num_classes
    draw = np.random.default_rng(seed)
    clean = classes[labels].repeat(size // PATCHES, 1).repeat(size // PATCHES, 2)
    images = clean * draw.uniform(0.8, 1.2, (count, 1, 1, 1)) + draw.normal(0, 12, clean.shape)
    return images.clip(0, 255).astype(np.uint8), labels


def generate_images(root: Path, name: str, train: int = 64, test: int = 16) -> Path:
    """Write a set as `images.load_images` reads it, unless it is there.

    Args:
        root: The folder for data sets; the set gets its own folder in there.
        name: ``"cifar10"``, ``"cifar100"``, ``"svhn"`` or ``"svhn_extra"``.
        train: Images of each part that is trained on.
        test: Images to score.

    Returns:
        The set's folder.

    Raises:
        ValueError: An unknown name.
    """
    known = source(name)
    folder = root / known.folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate((*known.training, "test")):
        path = folder / f"{part}-00000-of-00001.parquet"
        if not path.exists():
            images, labels = pictures(test if part == "test" else train, 32, known.num_classes, seed)
            columns = {known.image: [Image.fromarray(image) for image in images], known.label: labels.tolist()}
            part_of_set = datasets.Dataset.from_dict(columns).cast_column(known.image, datasets.Image())
            # Under another name first: what is there is complete.
            part_of_set.to_parquet(path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    return folder


def generate_folders(root: Path, name: str, classes: int = 8, train: int = 8, val: int = 2, size: int = 72) -> Path:
    """Write a set as `folders.FolderData` reads it: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``.

    Args:
        root: The folder for data sets.
        name: The set's folder in there, such as ``"imagenet"``.
        classes: Number of classes.
        train: Images of a class to train on.
        val: Images of a class to score.
        size: Their height and width.

    Returns:
        The set's folder.
    """
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        images, labels = pictures(count * classes, size, classes, seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / name / part / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    return root / name
