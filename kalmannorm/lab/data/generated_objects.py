"""Small sets of generated objects to detect, on disk in the layouts of the real ones, with COCO's annotations.

On grey noise lie up to three coloured shapes, apart from one another: of the categories, the odd ones are red
rectangles and the even ones blue ellipses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

from kalmannorm.lab.data.objects import SOURCES, Files

__all__ = ["generate_objects"]

COLOURS = ((220, 40, 40), (40, 60, 220))
CATEGORIES = {"coco": {1: "rectangle", 2: "ellipse"}, "pennfudan": {1: "person"}}


def generate_objects(root: Path, name: str, train: int = 16, validation: int = 8, side: int = 96) -> Path:
    """Write a set as `objects.DetectionData` reads it, unless it is there.

    Args:
        root: The folder for data sets; the set gets its own folder in there.
        name: ``"coco"`` or ``"pennfudan"``.
        train: Images to train on.
        validation: Images to score.
        side: Height and width of the images, in pixels, from 32.

    Returns:
        The set's folder.

    Raises:
        ValueError: An unknown name.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
    folder = root / name
    for first, (files, count) in (
        (1, (SOURCES[name].train, train)),
        (train + 1, (SOURCES[name].validation, validation)),
    ):
        if not (folder / files.annotations).is_file():
            _write_split(folder, files, range(first, first + count), side, CATEGORIES[name])
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
            mask = _shape(draw, side, int(quarter), ellipse=category % 2 == 0)
            pixels[mask] = np.array(COLOURS[category % 2 - 1]) + draw.normal(0, 8, 3)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, **_entry(mask)}
            )
        images.append({"id": number, "file_name": f"{number:04}.jpg", "height": side, "width": side})
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / files.images / f"{number:04}.jpg", quality=95)
    named = [{"id": number, "name": text} for number, text in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": named}
    # Last, and under another name first: where this file is, the split is complete.
    partial = (folder / files.annotations).with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(folder / files.annotations)


def _shape(draw: np.random.Generator, side: int, quarter: int, ellipse: bool) -> np.ndarray:
    """The pixels ``(side, side)``, bool, of a shape somewhere in a quarter of the image."""
    half = side // 2
    height, width = draw.integers(half // 2, half - 2, 2)
    top, left = draw.integers(0, half - height), draw.integers(0, half - width)
    row, column = np.mgrid[:side, :side] - np.array([half * (quarter // 2), half * (quarter % 2)])[:, None, None]
    down, right = (row - top + 0.5) / height, (column - left + 0.5) / width
    if ellipse:
        inside: np.ndarray = (down - 0.5) ** 2 + (right - 0.5) ** 2 <= 0.25
        return inside
    return (down > 0) & (down < 1) & (right > 0) & (right < 1)  # type: ignore[no-any-return]


def _entry(mask: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's annotations give it, with its box and area."""
    encoded = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": run_lengths.toBbox(encoded).tolist(),
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
    }
