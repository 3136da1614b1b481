"""What a run leaves behind reads back as it was."""

import math
import subprocess
from dataclasses import replace

import pytest
import yaml

import kalmannorm
from kalmannorm.lab.results import Result, environment, finished

RESULT = Result(
    config={"model": {"rate": 0.1}, "milestones": {0.5: 0.1}},
    scores={"accuracy_running": 0.1 + 0.2},
    seconds=1.5,
    seconds_per_step=1e-3,
    losses=[1 / 3, math.inf, 2.0],
    validations=[{"step": 10, "accuracy_running": 1 / 7}, {"step": 20, "accuracy_running": 0.5}],
    environment={"machine": "one"},
)


def stored(folder, result):
    (folder / "config.yaml").write_text(yaml.safe_dump(result.config))
    result.write(folder)
    return folder


@pytest.mark.parametrize("result", [RESULT, replace(RESULT, validations=[])])
def test_it_reads_back_exactly(tmp_path, result):
    assert not finished(tmp_path)
    assert Result.read(stored(tmp_path, result)) == result
    assert finished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "curve.csv", "result.json", "validations.csv",
    ]  # fmt: skip
    assert (tmp_path / "curve.csv").read_text().splitlines()[:2] == ["step,loss", "1,0.3333333333333333"]


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished run: expected a result\.json"):
        Result.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("result.json", '{"scores"'), ("result.json", "[]"), ("curve.csv", "a\n1\n"), ("config.yaml", "")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text):
    (stored(tmp_path, RESULT) / name).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        Result.read(tmp_path)


def test_the_environment_is_named():
    found = environment()
    assert {"commit", "torch", "lightning", "machine", "accelerator"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_a_commit_is_of_this_checkout_alone(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    installed = tmp_path / "site-packages" / "kalmannorm" / "__init__.py"
    monkeypatch.setattr(kalmannorm, "__file__", str(installed))
    assert environment()["commit"] == "unknown"
