"""Find the data of configurations, or generate them for the tiny scale."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets

from kalmannorm.lab.costs import build
from kalmannorm.lab.data.folders import locate
from kalmannorm.lab.data.generated import generate_for
from kalmannorm.lab.data.roots import SOURCES, VARIABLE, find
from kalmannorm.lab.experiments import Scale


@contextmanager
def data_at(place: Path | None, configs: Sequence[Mapping[str, Any]], output: Path, scale: Scale) -> Iterator[None]:
    """Set the folder of data sets for this process and its children.

    It is ``place``, or else that of ``KALMANNORM_DATA``. At the tiny scale, the configurations' data
    are generated in the output folder.
    """
    if place is not None and scale == "tiny":
        raise ValueError("--data: the tiny scale generates its data; leave this out")
    if place is not None and not place.is_dir():
        raise ValueError(f"--data: expected a folder; got {place}")
    changed = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    datasets.disable_progress_bars()
    cache = datasets.config.HF_DATASETS_CACHE
    if scale == "tiny":
        place = (output / "generated-data").absolute()
        for config in configs:
            generate_for(config["data"], place)
        # Keep generated images out of the user's cache.
        cache = place / "cache"
        changed["HF_DATASETS_CACHE"] = str(cache)
    if place is not None:
        changed[VARIABLE] = str(place.absolute())
    with patch.dict(os.environ, changed), patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
        yield


def missing_data(config: Mapping[str, Any], *, download: bool = True) -> str:
    """Why a configuration's data are not available, in one line; empty if they are.

    Without ``download`` nothing is downloaded, and data that could be are reported.
    """
    given = config["data"].get("init_args", {})
    known = SOURCES.get(given.get("name", ""))
    try:
        if not download and given.get("folder") == "imagenet" and locate("imagenet") is None:
            return "to be downloaded from the Hugging Face hub, once its terms are accepted there: some 150 GB"
        if not download and known is not None:
            here = find(known.folder, known.layout, known.origin)
            return "" if here else "to be downloaded from the Hugging Face hub, and kept"
        data = build(config, "data")
        data.prepare_data()
        data.setup("fit")
    except (FileNotFoundError, NotADirectoryError) as error:
        return " ".join(str(error).split())
    return ""
