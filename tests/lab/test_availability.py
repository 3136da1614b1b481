"""Which data are at hand; `test_run` has what a table does about those that are not."""

import os

import pytest

from kalmannorm.lab.availability import data_at, missing_data
from kalmannorm.lab.data.roots import VARIABLE
from kalmannorm.lab.experiments import config_of

CIFAR, IMAGENET = map(config_of, ("table8/resnet32-kn-bs2", "table1/resnet50-kn"))


@pytest.mark.usefixtures("root")
def test_what_can_be_downloaded_is_not_downloaded_to_find_out(asked_of_the_hub):
    assert "to be downloaded" in missing_data(CIFAR, download=False)
    assert "150 GB" in missing_data(IMAGENET, download=False)
    assert not asked_of_the_hub


def test_a_set_in_part_is_named_in_one_line(root):
    (root / "cifar10").mkdir()
    told = missing_data(CIFAR, download=False)
    assert "'cifar10' was not found" in told
    assert "\n" not in told
    for part in ("train", "test"):
        (root / "cifar10" / f"{part}-0.parquet").touch()
    assert missing_data(CIFAR, download=False) == ""


def test_the_place_holds_for_a_while(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    before = dict(os.environ)
    for scale in (1.0, "tiny"):
        with data_at(None if scale == "tiny" else tmp_path, [], tmp_path / "out", scale):
            assert os.environ[VARIABLE].startswith(str(tmp_path))
        assert dict(os.environ) == before
