"""Small sets of pictures: as Parquet files in the layout of the Hugging Face hub, and in a folder for each class."""

import datasets
import numpy as np
from PIL import Image

CLASSES = ["bee", "cat", "dog"]
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label"), "svhn": ("image", "label")}


def numbered_images(count, first):
    """``(count, 32, 32, 3)``: noise but for the first pixel, which counts from ``first``."""
    images = np.random.default_rng(first).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = first + np.arange(count)
    return images


def write_parquet(root, name, counts):
    """Write ``{part: count}`` under ``root / name``; each part's numbers go on where the last one's end."""
    image, label = COLUMNS[name]
    (root / name).mkdir()
    first = 0
    for part, count in counts.items():
        pictures = [Image.fromarray(picture) for picture in numbered_images(count, first)]
        columns = {image: pictures, label: [number % 10 for number in range(first, first + count)]}
        data = datasets.Dataset.from_dict(columns).cast_column(image, datasets.Image())
        data.to_parquet(root / name / f"{part}-00000-of-00001.parquet")
        first += count


def write_classes(folder, count, classes=CLASSES):
    """As many pictures of each class, in a folder of its name."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30), (number, 0, 255)).save(folder / name / f"{number}.png")
