"""Parquet files of Hugging Face repositories, from a folder or from the hub."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset


class HubImages(Dataset[tuple[Any, int]]):
    """Pictures and labels with the interface of an ``ImageFolder``, decoded one by one."""

    def __init__(self, part: Any, transform: Callable[[Any], Any] | None = None) -> None:
        label = part.features.get("label")
        if "image" not in part.features or not hasattr(label, "names"):
            raise ValueError(f"expected the columns image and label, labels with names; got {part.features}")
        self.part, self.transform = part, transform
        self.classes: list[str] = label.names

    @property
    def targets(self) -> list[int]:
        """The label of each picture, without decoding pictures."""
        labels: list[int] = self.part.select_columns("label").with_format("numpy")[:]["label"].tolist()
        return labels

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.part[index]
        picture = row["image"].convert("RGB")
        return picture if self.transform is None else self.transform(picture), row["label"]


def local_parts(folder: Path, parts: Iterable[str]) -> dict[str, Any]:
    """The parts of a repository, each from ``PART-*.parquet`` in a folder; empty if a part has no files."""
    files = {part: sorted(map(str, folder.glob(f"{part}-*.parquet"))) for part in parts}
    if not all(files.values()):
        return {}
    return {part: datasets.load_dataset("parquet", data_files=files, split=part) for part in files}


def hub_parts(repository: str, parts: Iterable[str], configuration: str | None = None) -> dict[str, Any]:
    """The parts of a repository from the hub, cached by ``datasets``; an OSError if they are not available."""
    return {part: datasets.load_dataset(repository, configuration, split=part) for part in parts}
