"""CIFAR-10, CIFAR-100 and SVHN: whole sets of 32x32 images as tensors in memory, small enough for any GPU.

They are read from Parquet files under ``KALMANNORM_DATA``, in the layout of their Hugging Face repositories, or else
downloaded and cached by the ``datasets`` library.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from kalmannorm.lab.data.hub import hub_parts, local_parts
from kalmannorm.lab.data.memory import Labelled, Splits
from kalmannorm.lab.data.roots import Source, find, missing, source


def open_images(name: str) -> dict[str, Any]:
    """The parts of a set as ``datasets.Dataset``, still encoded; downloads them if necessary.

    Raises:
        MissingDataError: It is neither under ``KALMANNORM_DATA`` nor available from the hub.
    """
    known = source(name)
    parts = (*known.training, "test")
    if folder := find(known.folder, known.layout, known.origin):
        return local_parts(folder, parts)
    try:
        return hub_parts(known.repository, parts, known.configuration)
    except OSError as error:  # the hub's errors too: absent, no network, offline mode
        raise missing(known.folder, known.layout, known.origin) from error


def _decoded(part: Any, known: Source, indices: np.ndarray, classes: Sequence[int] | None) -> Labelled:
    """Images ``(N, 3, 32, 32)``, uint8, of a part, and labels ``(N,)``, int64, renumbered by ``classes``."""
    wanted = [known.image, known.label]
    if not set(wanted) <= set(part.column_names):
        raise ValueError(f"{known.folder} needs the columns {' and '.join(wanted)}; got {', '.join(part.column_names)}")
    # An Arrow table has the files' bytes, without a Python object for each row.
    table = part.select_columns(wanted).with_format("arrow")[indices]
    images = np.zeros((len(indices), 32, 32, 3), dtype=np.uint8)
    for place, row in zip(images, table[known.image].to_pylist(), strict=True):
        place[:] = np.asarray(Image.open(BytesIO(row["bytes"]), formats=("PNG", "JPEG")).convert("RGB"))
    labels = torch.tensor(table[known.label].to_pylist(), dtype=torch.int64)
    if classes is not None:
        labels = (labels[:, None] == torch.tensor(classes)).int().argmax(1)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def _indices(part: Any, known: Source, classes: Sequence[int] | None) -> np.ndarray:
    """Sorted indices of a part's images of these classes; all for None."""
    if classes is None:
        return np.arange(len(part))
    labels = part.select_columns([known.label]).with_format("numpy")[:][known.label]
    return np.flatnonzero(np.isin(labels, classes))


def load_images(
    name: str,
    *,
    validation: int = 5000,
    split_seed: int = 0,
    limit: int | None = None,
    classes: Sequence[int] | None = None,
) -> Splits:
    """Load a set, images ``(N, 3, 32, 32)``, uint8; the same arguments give the same splits.

    ``validation`` training images are held out, chosen by ``split_seed``. With ``classes``, only the
    images of these labels are used; their new labels are indices into ``classes``. With ``limit``,
    each split keeps its first ``limit`` images.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    known = source(name)
    last = known.num_classes - 1
    if classes is not None and not 0 < len(set(classes) & set(range(last + 1))) == len(classes):
        raise ValueError(f"classes must be different labels of {known.folder}, 0 to {last}; got {list(classes)}")
    parts = open_images(name)
    training, test = datasets.concatenate_datasets([parts[part] for part in known.training]), parts["test"]
    indices = _indices(training, known, classes)
    count = len(indices)
    if not 0 <= validation < count:
        raise ValueError(f"validation must be 0 to {count - 1}, so that an image is left to train on; got {validation}")
    shuffled = indices[np.random.default_rng(split_seed).permutation(count)]
    # Sorted, so that `limit` keeps the first images of the files.
    held_out, kept = np.sort(shuffled[:validation]), np.sort(shuffled[validation:])
    parts_of_splits = ((training, kept), (training, held_out), (test, _indices(test, known, classes)))
    return Splits(*(_decoded(part, known, chosen[:limit], classes) for part, chosen in parts_of_splits))
