"""A root for data in a temporary folder, and no way to the network."""

import datasets
import pytest


@pytest.fixture
def root(monkeypatch, tmp_path):
    """An empty folder that KALMANNORM_DATA names; whatever `datasets` caches goes beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("KALMANNORM_DATA", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


@pytest.fixture(autouse=True)
def asked_of_the_hub(monkeypatch):
    """What was asked of the hub, which can't be reached."""
    asked = []
    load = datasets.load_dataset

    def without_network(path, *args, **kwargs):
        if path == "parquet":
            return load(path, *args, **kwargs)
        asked.append(path)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(datasets, "load_dataset", without_network)
    return asked
