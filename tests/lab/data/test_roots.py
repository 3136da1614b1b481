"""Data are looked for where KALMANNORM_DATA says, and what is absent is asked for in one clear error."""

import re

import pytest

from kalmannorm.lab.data.roots import MissingDataError, data_root, find, missing

LAYOUT = ["train-*.parquet", "test-*.parquet"]
ORIGIN = "https://example.org/animals"


def test_without_the_variable_there_is_no_root(monkeypatch):
    monkeypatch.delenv("KALMANNORM_DATA", raising=False)
    assert data_root() is None
    assert find("animals", LAYOUT, ORIGIN) is None


def test_a_root_that_is_no_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KALMANNORM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NotADirectoryError, match="nowhere"):
        data_root()


def test_a_folder_is_found_once_it_is_complete(root):
    assert find("animals", LAYOUT, ORIGIN) is None
    (root / "animals").mkdir()
    (root / "animals" / "train-00000-of-00001.parquet").touch()
    with pytest.raises(MissingDataError) as raised:
        find("animals", LAYOUT, ORIGIN)
    assert "test-*.parquet" in str(raised.value.__cause__)
    (root / "animals" / "test-00000-of-00001.parquet").touch()
    assert find("animals", LAYOUT, ORIGIN) == root / "animals"


@pytest.mark.parametrize("has_root", [False, True])
def test_the_error_says_what_from_where_and_into_which_layout(monkeypatch, tmp_path, has_root):
    monkeypatch.delenv("KALMANNORM_DATA", raising=False)
    if has_root:
        monkeypatch.setenv("KALMANNORM_DATA", str(tmp_path))
    place = str(tmp_path) if has_root else "$KALMANNORM_DATA"
    with pytest.raises(MissingDataError, match=re.escape(f"{place}/animals/train-*.parquet")) as raised:
        raise missing("animals", LAYOUT, ORIGIN)
    assert ORIGIN in str(raised.value)
    assert ("Set KALMANNORM_DATA" in str(raised.value)) == (not has_root)
