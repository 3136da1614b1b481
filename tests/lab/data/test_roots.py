"""Data are looked for where KALMANNORM_DATA says, and what is absent is asked for in one clear error."""

import pytest

from kalmannorm.lab.data.roots import MissingDataError, data_root, find, missing

LAYOUT = ["train-*.parquet", "test-*.parquet"]
ORIGIN = "https://example.org/animals"


def test_a_root_that_is_no_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KALMANNORM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NotADirectoryError, match="nowhere"):
        data_root()


def test_without_the_variable_nothing_is_found_and_the_error_says_what_to_set(monkeypatch):
    monkeypatch.delenv("KALMANNORM_DATA", raising=False)
    assert data_root() is None
    assert find("animals", LAYOUT, ORIGIN) is None
    with pytest.raises(MissingDataError, match=r"\$KALMANNORM_DATA/animals/train-\*") as raised:
        raise missing("animals", LAYOUT, ORIGIN)
    assert f"Set KALMANNORM_DATA to a folder of your choice. Get it from {ORIGIN}" in str(raised.value)
