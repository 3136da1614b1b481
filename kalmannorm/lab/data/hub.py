"""ImageNet-1k as its Hugging Face repository has it: Parquet files, whose pictures are decoded one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

__all__ = ["REPOSITORY", "HubImages", "hub_parts", "local_parts"]

# One must have accepted its terms there, and be logged in.
REPOSITORY = "ILSVRC/imagenet-1k"

# Its validation images have labels, its test images have none.
_PARTS = {"train": "train", "val": "validation"}


class HubImages(Dataset[tuple[Any, int]]):
    """Pictures and labels, as torchvision's ``ImageFolder`` gives them.

    Args:
        part: A ``datasets.Dataset`` with the columns ``image`` and ``label``.
        transform: From an RGB picture to what an item has in its place.

    Raises:
        ValueError: Other columns, or labels without names.
    """

    def __init__(self, part: Any, transform: Callable[[Any], Any] | None = None) -> None:
        label = part.features.get("label")
        if "image" not in part.features or not hasattr(label, "names"):
            raise ValueError(f"expected the columns image and label, labels with names; got {part.features}")
        self.part, self.transform = part, transform
        self.classes: list[str] = label.names

    @property
    def targets(self) -> list[int]:
        """The label of each picture, without opening any."""
        labels: list[int] = self.part.select_columns("label").with_format("numpy")[:]["label"].tolist()
        return labels

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A picture, transformed, and its label."""
        row = self.part[index]
        picture = row["image"].convert("RGB")
        return picture if self.transform is None else self.transform(picture), row["label"]


def local_parts(place: Path) -> dict[str, Any]:
    """The parts of the repository whose Parquet files lie in a folder; none where there are none."""
    files = {name: sorted(map(str, place.glob(f"{part}-*.parquet"))) for name, part in _PARTS.items()}
    if not all(files.values()):
        return {}
    return {name: datasets.load_dataset("parquet", data_files=files, split=name) for name in files}


def hub_parts() -> dict[str, Any]:
    """The same, from the hub, and kept by ``datasets``.

    Raises:
        OSError: They cannot be had: no network, or no leave.
    """
    return {name: datasets.load_dataset(REPOSITORY, split=part) for name, part in _PARTS.items()}
