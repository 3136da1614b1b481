"""Finding data sets in the folder of the environment variable ``KALMANNORM_DATA``, one folder for each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "KALMANNORM_DATA"


class MissingDataError(FileNotFoundError):
    """A data set was not found. The message says where to get it, where to put it, and in which layout."""


def data_root() -> Path | None:
    """The folder in ``KALMANNORM_DATA``; None if it is not set."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"{VARIABLE} must name a folder; got {named!r}")
    return root


def missing(name: str, layout: Sequence[str], origin: str) -> MissingDataError:
    """The error for a missing data set; ``layout`` has the patterns of its files."""
    root = data_root()
    place = str((root or Path(f"${VARIABLE}")) / name)
    first = "" if root else f"Set {VARIABLE} to a folder of your choice. "
    files = "".join(f"\n    {place}/{pattern}" for pattern in layout)
    return MissingDataError(f"the data set {name!r} was not found. {first}Get it from {origin}, as{files}")


def find(name: str, layout: Sequence[str], origin: str) -> Path | None:
    """The folder of a data set under the root; None if there is no such folder, or no root.

    Raises:
        MissingDataError: The folder is there, but a pattern of its layout matches nothing.
    """
    root = data_root()
    if root is None or not (root / name).is_dir():
        return None
    absent = [pattern for pattern in layout if not any((root / name).glob(pattern))]
    if absent:
        raise missing(name, layout, origin) from FileNotFoundError(f"nothing matches {', '.join(absent)}")
    return root / name


@dataclass(frozen=True)
class Source:
    """The source of a set of images.

    Attributes:
        folder: Its folder under ``KALMANNORM_DATA``.
        repository: Its repository on the Hugging Face hub; ``configuration`` is needed if there are several.
        image: Name of the column of encoded images; ``label`` of labels, 0 to ``num_classes`` - 1.
        training: The parts that make up the training images.
    """

    folder: str
    repository: str
    image: str
    label: str
    num_classes: int
    configuration: str | None = None
    training: tuple[str, ...] = ("train",)

    @property
    def origin(self) -> str:
        return f"https://huggingface.co/datasets/{self.repository}/tree/main/{self.configuration or ''}".rstrip("/")

    @property
    def layout(self) -> list[str]:
        """The Parquet files, as patterns relative to the folder."""
        return [f"{part}-*.parquet" for part in (*self.training, "test")]


_SVHN = ("svhn", "ufldl-stanford/svhn", "image", "label", 10, "cropped_digits")

SOURCES = {
    "cifar10": Source("cifar10", "uoft-cs/cifar10", "img", "label", 10),
    "cifar100": Source("cifar100", "uoft-cs/cifar100", "img", "fine_label", 100),
    "svhn": Source(*_SVHN),
    # With the 531,131 easier images, as usual for results near 98 %.
    "svhn_extra": Source(*_SVHN, training=("train", "extra")),
}


def source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"name must be one of {', '.join(SOURCES)}; got {name!r}")
    return SOURCES[name]
