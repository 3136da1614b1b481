"""Tables from nothing but a command: trainings, resuming, what is missing, what fails, and the files."""

import csv
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import browser
import pytest
import torch
import yaml

from kalmannorm.lab import recipes, reproduce, trainings
from kalmannorm.lab.cli import main
from kalmannorm.lab.results import Result

SCORES = {"accuracy_running": 0.5, "accuracy_online": 0.25}


def fake_fit(job, tell):
    """A training that takes no time: better with each seed, and with validations at two steps."""
    if job.config["model"]["init_args"]["normalization"] == "brn":
        raise RuntimeError("Errors:\n  - it diverged\n  - more")
    scores = {name: value + job.seed / 100 for name, value in SCORES.items()}
    validations = [{"step": step, "accuracy_running": step / 10} for step in (3, 6)]
    return Result(job.config, scores, 1.0, 0.1, [2.0, 1.0], validations, {"machine": "none"})


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Trainings in this process, that do nothing; the folder for output."""
    monkeypatch.setattr(trainings, "_fit", fake_fit)

    def run_all(jobs, work, steps, workers, console, *, keep_going):
        assert keep_going
        return trainings.in_turn(jobs, lambda job: trainings._fit(job, None), steps, console)

    monkeypatch.setattr(trainings, "run_all", run_all)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "out"


def run(table, output, *options):
    return main(["reproduce", table, "--output", str(output), *options])


def rows(output, table):
    return list(csv.DictReader((output / table / "results.csv").open(encoding="utf-8")))


def test_a_table_with_its_numbers_failures_and_report(here, capsys):
    assert run("table8", here, "--scale", "tiny", "--only", "inception-cifar10-*", "--seeds", "2") == 1
    out = capsys.readouterr().out
    assert re.search(r"KN \(bs = 2\) +\| 50.50 ± 0.71 \(90.9\)", out)
    assert re.search(r"BRN \(bs = 2\) +\| - \(90.38\)", out)
    assert "seed 1 failed: RuntimeError: it diverged\n" in out
    assert "not comparable with the paper" in out
    assert out.strip().splitlines()[-1].endswith(f"Report: {here}/table8/report.html")
    found = [row for row in rows(here, "table8") if row["cell"].endswith("-kn-bs2")]
    assert [(row["seed"], row["accuracy_running"], row["scale"]) for row in found] == [
        ("0", "0.5", "tiny"),
        ("1", "0.51", "tiny"),
    ]
    assert found[0]["steps_to_baseline"] == "6"
    page = (here / "table8" / "report.html").read_text(encoding="utf-8")
    assert "50.50 ± 0.71 (90.9)" in page
    assert "it diverged" in page
    assert "kalmannorm reproduce table8 --scale tiny --seeds 2 --only inception-cifar10-kn-bs2" in page
    assert page.count("data:image/png;base64,") == 1
    assert "89.4" in (here / "table8" / "table.md").read_text(encoding="utf-8")


def test_a_run_that_diverged_is_named_and_not_in_the_mean(here, capsys, monkeypatch):
    def diverges(job, tell):
        if job.seed == 2:
            raise FloatingPointError("the loss at step 3 is nan")
        found = fake_fit(job, tell)
        return found if job.seed else replace(found, losses=[2.0, math.nan], scores=dict.fromkeys(SCORES, 0.1))

    monkeypatch.setattr(trainings, "_fit", diverges)
    assert run("table8", here, "--scale", "tiny", "--only", "inception-cifar10-kn-bs2", "--seeds", "4") == 0
    out = capsys.readouterr().out
    assert re.search(r"KN \(bs = 2\) +\| 52.00 ± 1.41 \(90.9\)", out)
    assert "- table8/inception-cifar10-kn-bs2: seed 0 diverged: the loss was nan at step 2\n" in out
    found = rows(here, "table8")
    assert [row["seed"] for row in found] == ["1", "3", "", ""]
    assert found[-1]["problem"] == "seed 2 failed: FloatingPointError: the loss at step 3 is nan"
    assert "seed 0 diverged" in (here / "table8" / "report.html").read_text(encoding="utf-8")
    assert "| 2     | 52.00 ± 1.41" in (here / "table8" / "table.md").read_text(encoding="utf-8")


def test_a_training_that_two_tables_show_has_one_folder(here, monkeypatch):
    done = []
    monkeypatch.setattr(trainings, "_fit", lambda job, tell: (done.append(str(job.folder)), fake_fit(job, tell))[1])
    assert run("figure4", here, "--scale", "tiny", "--seeds", "1", "--only", "resnet32-[bk]n") == 0
    assert run("variants", here, "--scale", "tiny", "--seeds", "1", "--only", "resnet32-kn") == 0
    runs = f"{here}/runs/tiny/table8"
    assert done == [f"{runs}/resnet32-{name}-bs2/seed-0" for name in ("bn", "kn", "kn")]


def test_absent_data_are_one_line_and_the_other_cells_go_on(here, capsys, monkeypatch):
    (here.parent / "empty").mkdir()
    monkeypatch.setenv("KALMANNORM_DATA", str(here.parent / "empty"))
    assert run("table1", here) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "imagenet" in err
    assert not here.exists()


def test_only_what_is_there_is_trained(here, capsys, images):
    assert run("table8", here, "--only", "inception-*-ln-bs2", "--seeds", "1", "--scale", "0.001") == 0
    found = {row["cell"]: row for row in rows(here, "table8")}
    assert found["table8/inception-cifar10-ln-bs2"]["status"] == "finished"
    assert found["table8/inception-cifar10-ln-bs2"]["steps"] == "156"
    assert found["table8/inception-svhn-ln-bs2"]["status"] == "not run"
    assert "'svhn' was not found" in found["table8/inception-svhn-ln-bs2"]["problem"]


def test_computed_cells_need_no_data(here, capsys):
    assert run("table2", here, "--only", "resnet50-*") == 0
    assert re.search(r"KN +\| 25.58 \(25.58\)", capsys.readouterr().out)


def test_the_list_trains_nothing(here, capsys, monkeypatch, images):
    monkeypatch.setattr("kalmannorm.lab.costs.seconds_per_step", lambda config: 36.0)
    threads = torch.get_num_threads()
    assert run("table8", here, "--list", "--only", "resnet32-*", "--data", str(here.parent)) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "resnet32-kn-bs2" in line)
    assert "156,250" in line
    assert "20,000,000" in line
    assert "1,562.50" in line
    assert "to be downloaded" in line
    assert not here.exists()


def test_the_environment_is_as_before(here, monkeypatch):
    monkeypatch.delenv("KALMANNORM_DATA", raising=False)
    before = dict(os.environ)
    run("table8", here, "--scale", "tiny", "--seeds", "1", "--only", "resnet32-bn-bs2")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table99"], ["'table99'", "table8", "figure4"]),
        (["table8", "--only", "vgg*"], ["--only", "'vgg*'", "resnet32-kn-bs2"]),
        (["table8", "--scale", "small"], ["--scale", "tiny", "small"]),
        (["table8", "--scale", "0"], ["--scale", "got 0"]),
        (["table8", "--seeds", "0"], ["--seeds", "got 0"]),
        (["table8", "--devices", "2", "--workers", "2"], ["--workers"]),
        (["table8", "--data", "/nowhere"], ["--data", "/nowhere"]),
        (["table8", "--scale", "tiny", "--data", "/"], ["--data", "tiny"]),
        ([], ["table"]),
    ],
)
def test_bad_input_is_one_line_and_touches_nothing(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert not list(tmp_path.iterdir())


def command(output, *arguments):
    line = [sys.executable, "-m", "kalmannorm.lab.cli", "reproduce", *arguments, "--scale", "tiny", "--seeds", "1"]
    # Nothing of the machine's own data, nor of its cache.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "KALMANNORM_DATA": ""}
    done = subprocess.run(
        [*line, "--output", str(output)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
def test_table8_end_to_end_and_again_from_what_is_done(tmp_path):
    """All 24 cells by the real command; a second time trains nothing and shows the same."""
    first = command(tmp_path, "table8")
    found = rows(tmp_path, "table8")
    assert len(found) == len(recipes.names("table8")) == 24
    assert {row["status"] for row in found} == {"finished"}
    assert all(0 <= float(row["accuracy_online"]) <= 1 for row in found)
    assert not re.search(r"\| - ", first)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(finished) == 24
    assert command(tmp_path, "table7").count("(90.") == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == finished


@pytest.mark.slow
def test_figure5_compares_trained_networks(tmp_path):
    out = command(tmp_path, "figure5")
    assert re.search(r"BN +\| [\d.]+ ", out)
    assert all(float(row["variance_gap"]) > 0 for row in rows(tmp_path, "figure5") if row["status"] == "computed")
    page = tmp_path / "figure5" / "report.html"
    assert "Variance gaps" in page.read_text(encoding="utf-8")
    with browser.started() as chromium:
        for size in (browser.DESKTOP, browser.PHONE):
            found = browser.look(chromium, page, size)
            browser.assert_readable(found)
            assert found.facts["images"] == 2
            assert "not comparable with the paper's" in found.facts["text"]


@pytest.mark.slow
def test_on_several_devices_it_is_a_command_of_its_own(tmp_path, images, config):
    from kalmannorm.lab.launching import fit_on_devices

    config["trainer"]["max_steps"] = 4
    result = fit_on_devices(2, config, tmp_path / "run")
    assert len(result.losses) == 4
    assert result.config["trainer"]["devices"] == 2
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["trainer"]["strategy"] == "ddp"
    config["data"]["init_args"]["name"] = "cifar11"
    with pytest.raises(RuntimeError, match=r"cifar11.*exit code 2.*other\.log"):
        fit_on_devices(2, config, tmp_path / "other")


def test_scales_and_devices_have_folders_of_their_own(here, images, monkeypatch):
    folders = []
    monkeypatch.setattr(trainings, "_fit", lambda job, tell: (folders.append(job.folder), fake_fit(job, tell))[1])
    monkeypatch.setattr(
        trainings,
        "fit_on_devices",
        lambda devices, config, folder: trainings._fit(trainings.Job("", 0, config, folder), None),
    )
    for options in (["--scale", "tiny"], ["--scale", "0.001"], ["--scale", "tiny", "--devices", "2"]):
        assert run("table8", here, "--seeds", "1", "--only", "resnet32-bn-bs2", *options) == 0
    ends = ("tiny", "0.001", "tiny-2-devices")
    assert folders == [here / "runs" / end / "table8" / "resnet32-bn-bs2" / "seed-0" for end in ends]


def test_labels_say_what_can_be_compared():
    assert reproduce._label(0.05, 3).startswith("Scaled down: 0.05 of the paper's")
    assert "not comparable" in reproduce._label("tiny", 3)
    assert reproduce._label(1.0, 1) == "The paper's number of training steps, 1 seed."
