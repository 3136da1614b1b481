"""Small sets of generated images, on disk in the layouts of the real ones, for trying a training without its data.

Each class is a picture of a few coloured patches; an image is that picture with random brightness and noise. A network
learns to classify them in tens of steps. Images for detection have up to three separate rectangles on grey noise:
those of odd categories are red, those of even ones blue.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from kalmannorm.lab.data.objects import SOURCES, Files
from kalmannorm.lab.data.roots import source
from kalmannorm.lab.results import write_atomically

PATCHES = 4
COLOURS = ((220, 40, 40), (40, 60, 220))
CATEGORIES = {"coco": {1: "red", 2: "blue"}, "pennfudan": {1: "person"}}


def generate_for(data: Mapping[str, Any], root: Path) -> Path:
    """Write the set that a configuration's ``data`` names, unless it exists; return its folder."""
    kind, options = data["class_path"].rpartition(".")[2], data["init_args"]
    if kind == "ClassificationData":
        return generate_images(root, options["name"])
    if kind == "FolderData":
        folder = options.get("folder", "imagenet")
        return root / folder if (root / folder).exists() else generate_folders(root, folder)
    if kind == "DetectionData":
        return generate_objects(root, options["name"])
    if kind in ("ClutterData", "SignalData", "VolumeData"):
        return root  # they need no files
    raise ValueError(f"there are no generated images for {kind}")


def pictures(count: int, size: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generated images ``(count, size, size, 3)``, uint8, and labels ``(count,)``, class by class.

    The size is a multiple of 4. The seed decides brightness and noise, not the classes.
    """
    classes = np.random.default_rng(num_classes).integers(60, 196, (num_classes, PATCHES, PATCHES, 3))
    labels = np.arange(count) % num_classes
    draw = np.random.default_rng(seed)
    clean = classes[labels].repeat(size // PATCHES, 1).repeat(size // PATCHES, 2)
    images = clean * draw.uniform(0.8, 1.2, (count, 1, 1, 1)) + draw.normal(0, 12, clean.shape)
    return images.clip(0, 255).astype(np.uint8), labels


def generate_images(root: Path, name: str, train: int = 64, test: int = 16) -> Path:
    """Write a set as `images.load_images` reads it, unless it exists; return its folder."""
    known = source(name)
    folder = root / known.folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate((*known.training, "test")):
        path = folder / f"{part}-00000-of-00001.parquet"
        if not path.exists():
            images, labels = pictures(test if part == "test" else train, 32, known.num_classes, seed)
            columns = {known.image: [Image.fromarray(image) for image in images], known.label: labels.tolist()}
            part_of_set = datasets.Dataset.from_dict(columns).cast_column(known.image, datasets.Image())
            # Written under another name first, so that an existing file is complete.
            part_of_set.to_parquet(path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
    return folder


def generate_folders(root: Path, name: str, classes: int = 8, train: int = 8, val: int = 2, size: int = 72) -> Path:
    """Write a set as `folders.FolderData` reads it; ``train`` and ``val`` are images of each class."""
    for seed, (part, count) in enumerate((("train", train), ("val", val))):
        images, labels = pictures(count * classes, size, classes, seed)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / name / part / f"class{label}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=95)
    return root / name


def generate_objects(root: Path, name: str, train: int = 16, validation: int = 8, side: int = 96) -> Path:
    """Write a set as `objects.DetectionData` reads it, unless it exists; ``side`` is at least 32."""
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
    folder = root / name
    numbers = {
        SOURCES[name].train: range(1, train + 1),
        SOURCES[name].validation: range(train + 1, train + validation + 1),
    }
    for files, own in numbers.items():
        if not (folder / files.annotations).is_file():
            _write_split(folder, files, own, side, CATEGORIES[name])
    return folder


def _write_split(folder: Path, files: Files, numbers: range, side: int, categories: dict[int, str]) -> None:
    (folder / files.images).mkdir(parents=True, exist_ok=True)
    (folder / files.annotations).parent.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in numbers:
        draw = np.random.default_rng(number)
        pixels = draw.normal(128, 12, (side, side, 3))
        for quarter in draw.permutation(4)[: draw.integers(1, 4)]:
            category = int(draw.choice(list(categories)))
            mask = _rectangle(draw, side, int(quarter))
            pixels[mask] = np.array(COLOURS[category % 2 - 1]) + draw.normal(0, 8, 3)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, **_entry(mask)}
            )
        images.append({"id": number, "file_name": f"{number:04}.jpg", "height": side, "width": side})
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / files.images / f"{number:04}.jpg", quality=95)
    named = [{"id": number, "name": text} for number, text in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": named}
    # Written last: its existence means that the split is complete.
    write_atomically(folder / files.annotations, json.dumps(content))


def _rectangle(draw: np.random.Generator, side: int, quarter: int) -> np.ndarray:
    """The mask ``(side, side)``, bool, of a rectangle at a random place in a quarter of the image."""
    half = side // 2
    height, width = draw.integers(half // 2, half - 2, 2)
    top = half * (quarter // 2) + draw.integers(0, half - height)
    left = half * (quarter % 2) + draw.integers(0, half - width)
    mask = np.zeros((side, side), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def _entry(mask: np.ndarray) -> dict[str, Any]:
    """A mask in COCO's annotation format, with its box and area."""
    encoded = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": run_lengths.toBbox(encoded).tolist(),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
    }
