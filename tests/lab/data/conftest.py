"""A root for data in a temporary folder."""

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
