"""Running experiments: an equal search, a winner by validation alone, tables from files, the paper's too."""

import html
import itertools
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import browser
import pytest
import test_experiments
import torch
import yaml
from filelock import FileLock
from test_experiments import RATE, of

from kalmannorm.lab import experiments, jobs, page
from kalmannorm.lab.cli import main
from kalmannorm.lab.configuration import Run
from kalmannorm.lab.data.classification import ClassificationData
from kalmannorm.lab.experiments import merge
from kalmannorm.lab.fitting import fit
from kalmannorm.lab.jobs import Job, fit_on_devices
from kalmannorm.lab.results import Result
from kalmannorm.lab.rows import read_table
from kalmannorm.lab.tables import write_table
from kalmannorm.lab.training import Classifier

ENVIRONMENT = {"commit": "0123456789abcdef", "machine": "none", "date": "2026-01-01"}
SHORT = {"trainer": {"max_steps": 4, "val_check_interval": 2}, "checkpoint_every": 2}
ARMS = {"kn-2": {"note": "The filter."}, "kn-4": of("kn", label="KN", column=4)}
STUDY = merge(test_experiments.STUDY, {"config": SHORT, "arms": ARMS})


@pytest.fixture
def written(writes):
    return writes(STUDY, note={"rate": "Ours."}, tiny={"data": {"init_args": {"gradient_batch": 4}}})


def result(job, **changes):
    """A run that is the better the nearer its rate is to 0.02, and the worse on test images."""
    rate = job.config["model"]["init_args"]["rate"]
    accuracy = 0.9 - abs(rate - 0.02) - job.seed / 1000 - (job.split == "test") / 10
    scores = {"accuracy_running": accuracy, "accuracy_online": accuracy / 3}
    steps = job.config["trainer"]["max_steps"]
    validations = [{"step": steps, "accuracy_running": accuracy}]
    given = {"scores": scores, "losses": [1.0] * steps, "validations": validations, **changes}
    return Result(config=job.config, seconds=2.0, seconds_per_step=1 / 3, environment=ENVIRONMENT, **given)


def kept(job, tell):
    """A run that takes no time, with what a training leaves in its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    found = replace(result(job), config=Run(job.config).complete())
    (job.folder / "config.yaml").write_text(yaml.safe_dump(found.config))
    found.write(job.folder)
    return found


@pytest.fixture
def here(here, monkeypatch, tmp_path, images, refused):
    """Runs that take no time, if `train` is not replaced."""
    here.output, here.train = tmp_path / "out", lambda job, tell: result(job)
    here.run = lambda path, *options: main(["run", str(path), "--output", str(here.output), *options])
    here.refuses = lambda words, path, *options: refused(["run", path, "--output", here.output, *options], words)
    here.rows = lambda name="runs.csv", of="ours": read_table(here.output / of / name).to_dict("records")
    # To draw takes longer than all else.
    monkeypatch.setattr(page, "_drawn", lambda drawing: "a figure")
    return here


def test_arms_get_the_same_search_and_the_best_in_validation_counts(here, written, capsys):
    assert here.run(written()) == 0
    found = here.rows()
    searched = [row for row in found if row["kind"] == "search"]
    finals = [row for row in found if row["kind"] == "final"]
    assert found == [*searched, *finals]
    arms = list(STUDY["arms"])
    assert [(row["arm"], row[RATE]) for row in searched] == list(itertools.product(arms, ("0.01", "0.02", "0.03")))
    assert {(row["seed"], row["split"]) for row in searched} == {("100", "validation")}
    assert [row[RATE] for row in searched if row["chosen"] == "yes"] == ["0.02"] * 3
    assert [(row["arm"], row["seed"], row[RATE], row["split"]) for row in finals] == [
        (arm, seed, "0.02", "test") for arm in arms for seed in ("0", "1")
    ]
    assert finals[1]["accuracy_running"] == "0.799"
    assert (finals[0]["seconds_per_step"], finals[0]["steps"]) == ("0.333333", "4")
    assert finals[0]["commit"] == ENVIRONMENT["commit"]
    # The configurations: what the arms share, the arm's own, and the point of the search.
    last = here.jobs[-1]
    assert (last.config["seed_everything"], last.config["trainer"]["accelerator"]) == (1, "cpu")
    assert last.config["model"]["init_args"]["normalization"] == "kn"
    assert "cell" not in last.config
    assert len({job.folder for job in here.jobs}) == len(here.jobs) == 15
    out = capsys.readouterr().out
    assert "BN | 79.95 ± 0.07 |" in out
    assert "KN | 79.95 ± 0.07 | 79.95 ± 0.07 |" in out
    assert "KN, 2: The filter." in out
    assert "at the end" not in out
    assert out.index("accuracy running") < out.index("accuracy online")
    curves = here.rows("curves.csv")
    assert [row["step"] for row in curves[:4]] == ["1", "2", "3", "4"]
    assert (curves[3]["loss"], curves[3]["accuracy_running"], curves[2]["accuracy_running"]) == ("1", "0.79", "")


def test_an_arm_may_have_a_search_of_its_own_or_none(here, written, capsys):
    grid = {RATE: [0.02, 0.01], "model.init_args.weight_decay": [1e-4, 1e-3]}
    arms = {"bn-2": {"search": grid}, "kn-2": {"search": {}}, "kn-4": {"search": {RATE: [0.01, 0.015]}}}
    assert here.run(written(arms=arms)) == 0
    found = here.rows()
    counts = {arm: sum(row["arm"] == arm and row["kind"] == "search" for row in found) for arm in arms}
    assert counts == {"bn-2": 4, "kn-2": 0, "kn-4": 2}
    out = capsys.readouterr().out
    assert "different sizes" in out
    assert "KN, 4: the best rate, 0.015, is at the end of those searched (0.01 to 0.015)." in out
    assert "rate 0.02, weight_decay 0.0001" in out
    assert "as it is" in out


def test_what_diverges_or_fails_never_wins_and_stops_nothing(here, written, capsys):
    def train(job, tell):
        rate = job.config["model"]["init_args"]["rate"]
        method = job.config["model"]["init_args"]["normalization"]
        if method == "bn":
            raise RuntimeError("no\nmemory")
        if rate == 0.02:  # the highest score
            return result(job, losses=[1.0, math.nan, math.nan, math.nan])
        if rate == 0.01:
            raise FloatingPointError("the loss at step 3 is nan")
        if job.seed == 1:
            return result(job, scores={"accuracy_running": math.nan})
        return result(job)

    here.train = train
    assert here.run(written(arms={"kn-4": {"label": "KN4"}})) == 1
    found = here.rows()
    assert {row[RATE] for row in found if row["chosen"]} == {"0.03"}
    errors = {(row["arm"], row["kind"], row[RATE], row["seed"]): row["error"] for row in found if row["error"]}
    assert errors["kn-2", "search", "0.02", "100"] == "diverged: the loss was nan at step 2"
    assert errors["kn-2", "search", "0.01", "100"] == "FloatingPointError: the loss at step 3 is nan"
    assert errors["kn-2", "final", "0.03", "1"] == "diverged: accuracy_running is nan"
    assert not [row for row in found if row["arm"] == "bn-2" and row["kind"] == "final"]
    out = capsys.readouterr().out
    assert "79.00 (1 of 2 runs)" in out
    assert "bn-2, search of rate 0.03, seed 100: RuntimeError: no memory" in out
    assert "BN, 2: each run of the search failed or diverged, so there is no final run." in out
    assert "KN, 2: the best rate, 0.03, is at the end of those searched (0.01 to 0.03)." in out


def test_the_verdict_is_shown_and_says_what_does_not_count(here, written, capsys):
    def train(job, tell):
        return result(job, losses=[math.nan] * 4) if (job.seed, job.split) == (1, "test") else result(job)

    here.train = train
    known = {"guessing": 0.1, "images": 100}
    assert here.run(written(search={}, verdict=known), "--only", "kn-2") == 0
    assert "Left out, as they failed or diverged: 1 of 2 runs of KN." in capsys.readouterr().out
    # An arm is known by its column too.
    assert here.run(written(search={}, verdict=known, scored="validation")) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "has the highest accuracy" in line)
    assert all(name in said for name in ("BN, 2", "KN, 2", "KN, 4", "of 100 validation images"))


def test_a_file_that_was_changed_after_a_run_is_refused_and_loses_nothing(here, written):
    assert here.run(written()) == 0
    for job in here.jobs[:2]:
        kept(job, None)
    assert here.run(written()) == 0
    before = {path: path.read_bytes() for path in here.output.rglob("*") if path.is_file()}
    trained = len(here.jobs)
    for option in ([], ["--report"], ["--collect"]):
        words = "another configuration: trainer.max_steps is 4 there; got 6"
        here.refuses(words, written(config={"trainer": {"max_steps": 6}}), *option)
    assert {path: path.read_bytes() for path in here.output.rglob("*") if path.is_file()} == before
    assert len(here.jobs) == trained


def test_two_processes_do_not_train_in_one_folder(here, written):
    path = written(search={}, seeds=1)
    (here.output / "ours").mkdir(parents=True)
    with FileLock(here.output / "ours" / ".lock"):
        words = f"--output: another process is running ours in {here.output / 'ours'}"
        here.refuses(words, path, "--only", "kn-2")
    assert here.run(path, "--only", "kn-2") == 0
    with FileLock(here.output / "ours" / ".lock"):
        assert here.run(path, "--report") == 0
    # Nor in one whose training it shares.
    (path.parent / "others.yaml").write_text(yaml.safe_dump(start_of(arms={"bn": {"run": "ours/bn-2"}})))
    with FileLock(here.output / "ours" / ".lock"):
        assert here.run(path.parent / "others.yaml") == 2


def test_a_score_that_there_is_not_is_said(here, written):
    assert here.run(written(metric="accuracy"), "--only", "kn-2") == 1
    assert "no score is called 'accuracy'; there are accuracy_running" in here.rows()[0]["error"]


def test_divergence_alone_is_no_failure(here, written):
    here.train = lambda job, tell: result(job, losses=[math.inf] * 4)
    assert here.run(written()) == 0
    assert not any(row["chosen"] for row in here.rows())
    assert all(row["accuracy_running"] for row in here.rows())


def test_the_report_is_of_the_file_of_runs_alone(here, written, capsys):
    path = written()
    assert here.run(path) == 0
    folder = here.output / "ours"
    before = {name: (folder / name).read_bytes() for name in ("table.md", "figure.svg", "report.html")}
    shown = capsys.readouterr().out
    kept = here.output.parent / "kept" / "ours"
    kept.mkdir(parents=True)
    for name in ("runs.csv", "curves.csv"):
        (folder / name).rename(kept / name)
    trained = len(here.jobs)
    assert main(["run", str(path), "--report", "--output", str(kept.parent)]) == 0
    (kept / "report.html").write_text((kept / "report.html").read_text().replace(str(kept.parent), str(here.output)))
    assert {name: (kept / name).read_bytes() for name in before} == before
    assert capsys.readouterr().out.partition("Report:")[0] in shown
    assert len(here.jobs) == trained
    here.refuses(f"there is no {folder / 'runs.csv'}", path, "--report")
    here.output, file = kept.parent, kept / "runs.csv"
    wrong = {
        "arm,label\nbn,BN\n": "is not a study's file of runs: it has no study, column",
        "": "cannot be read as a table",
    }
    for content, words in wrong.items():
        file.write_text(content)
        for option in ("--report", "--grow"):
            here.refuses(f"{file} {words}", path, option)


def test_one_column_is_a_table_of_scores(here, written, capsys):
    arms = {name: {"label": name, "column": "all"} for name in STUDY["arms"]}
    assert here.run(written(arms=arms, seeds=1)) == 0
    out = capsys.readouterr().out
    assert "|      | accuracy running | accuracy online |" in out
    assert "| kn-4 | 80.00            | 26.67           |" in out
    assert "on test images; one seed." in out


def test_no_run_looks_at_test_images_but_those_that_count(here, written, monkeypatch):
    """Real trainings; and a second call trains nothing."""
    seen, now = [], []
    original = ClassificationData.test_dataloader
    monkeypatch.setattr(ClassificationData, "test_dataloader", lambda self: (seen.append(now[-1]), original(self))[1])

    def train(job, tell):
        now.append(job)
        return jobs._fit(job, tell)

    here.train = train
    path = written(search={RATE: [0.01, 0.02]}, seeds=1)
    assert here.run(path, "--only", "kn-2") == 0
    assert [(job.split, job.seed) for job in here.jobs] == [("validation", 100), ("validation", 100), ("test", 0)]
    assert seen == here.jobs[2:]
    found = here.rows()
    # Of 16 validation images and 16 test images.
    assert all(float(row["accuracy_running"]) * 16 % 1 == 0 for row in found)
    assert [(job.folder / "last.ckpt").exists() for job in here.jobs] == [False, False, True]
    results = {job.folder / "result.json": (job.folder / "result.json").stat().st_mtime_ns for job in here.jobs}
    assert here.run(path, "--only", "kn-2") == 0
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert here.rows() == found
    assert len(seen) == 1
    # With validation images alone, the test images are never looked at.
    assert here.run(written(search={RATE: [0.01, 0.02]}, seeds=1, scored="validation"), "--only", "kn-2") == 0
    assert len(seen) == 1
    assert {row["split"] for row in here.rows()} == {"validation"}


def test_what_has_ended_is_told_without_training_more(here, written):
    here.train = kept
    path, file = written(search={RATE: [0.01, 0.02]}, seeds=2), here.output / "ours" / "runs.csv"
    here.refuses("no run of ours has finished", path, "--collect")
    assert here.run(path, "--only", "kn-2") == 0
    whole, true, trained = (here.rows(), here.rows("curves.csv")), file.read_text(), [*here.jobs]

    def told(*options):
        assert here.run(path, *options) == 0
        return here.rows(), here.rows("curves.csv")

    # What is there goes before what is told of it; and arms without a run are no reason to say nothing.
    for options in (["--collect"], ["--grow", "--only", "kn-2"]):
        file.write_text(true.replace(whole[0][0]["accuracy_running"], "0.999"))
        assert told(*options) == whole
    here.train = None
    # Of folders that are gone, the rows are: of one that counts, and of one of the search.
    gone = [(job.folder, job.folder.rename(job.folder.with_name("gone"))) for job in (trained[-1], trained[0])]
    assert told("--collect") == whole
    for folder, elsewhere in gone:
        elsewhere.rename(folder)
    # The second run that counts was cut off, and so was the search's best: the other one is then all there is.
    (trained[-1].folder / "result.json").unlink()
    assert told("--collect")[0] == whole[0][:-1]
    chosen = next(float(row[RATE]) for row in whole[0] if row["chosen"])
    best = next(job for job in trained if job.config["model"]["init_args"]["rate"] == chosen)
    (best.folder / "result.json").unlink()
    assert [(row["kind"], row["chosen"]) for row in told("--collect")[0]] == [("search", "yes")]
    # Another configuration in the same folder is not taken for this one.
    path = written(search={RATE: [0.01, 0.02]}, config={"trainer": {"max_steps": 6}})
    here.refuses("another configuration: trainer.max_steps is 4 there; got 6", path, "--collect")


def test_arms_that_are_not_asked_for_keep_their_rows(here, written):
    path = written()
    assert here.run(path) == 0
    whole, curves = here.rows(), here.rows("curves.csv")
    here.train = lambda job, tell: result(job, losses=[3.0] * 4)
    assert here.run(path, "--only", "kn-2") == 0
    again = here.rows()
    assert [(row["kind"], row["arm"]) for row in again] == [(row["kind"], row["arm"]) for row in whole]
    assert {row["last_loss"] for row in again if row["arm"] == "kn-2"} == {"3"}
    assert [row for row in again if row["arm"] != "kn-2"] == [row for row in whole if row["arm"] != "kn-2"]
    assert len(here.rows("curves.csv")) == len(curves)
    # An arm that the study has no longer stays, as the last. Searched settings of its own are its alone.
    wider = {"model.init_args.weight_decay": [1e-4, 1e-3]}
    content = yaml.safe_load(path.read_text())
    del content["arms"]["bn-2"]
    content["arms"]["new"] = of("gn", label="GN", column=2, search=wider)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert here.run(path) == 0
    left = here.rows()
    assert list(dict.fromkeys(row["arm"] for row in left)) == ["kn-2", "kn-4", "new", "bn-2"]
    path = written()
    assert {row["model.init_args.weight_decay"] for row in left if row["arm"] != "new"} == {""}
    gone = [{name: row[name] for name in whole[0]} for row in left if row["arm"] == "bn-2"]
    assert gone == [row for row in whole if row["arm"] == "bn-2"]
    table = (here.output / "ours" / "table.md").read_text()
    assert "runs.csv also has runs of bn-2, which " in table
    assert "| bn-2 " not in table
    # Runs of another size are other runs; where these files are all that there is of them, nothing is written over.
    words = "has runs of scale 1, whose own folders are gone; got --scale 0.5"
    here.refuses(words, path, "--only", "kn-4", "--scale", "0.5")
    assert here.rows() == left
    (here.output / "ours" / "runs" / "1").mkdir(parents=True)
    assert here.run(path, "--only", "kn-4", "--scale", "0.5") == 0
    assert {(row["arm"], row["scale"]) for row in here.rows()} == {("kn-4", "0.5")}


def test_a_study_grows_by_what_its_files_do_not_tell(here, written):
    assert here.run(written(search={RATE: [0.01, 0.04]})) == 0
    first, here.jobs[:] = here.rows(), []
    assert here.run(written(search={RATE: [0.01, 0.04, 0.02, 0.05]}, seeds=3), "--grow") == 0
    trained = [(job.split, job.seed, job.config["model"]["init_args"]["rate"]) for job in here.jobs]
    assert sorted(trained) == sorted(3 * [("validation", 100, 0.02), ("validation", 100, 0.05)]
                                     + 3 * [("test", seed, 0.02) for seed in range(3)])  # fmt: skip
    grown, curves = here.rows(), here.rows("curves.csv")
    assert [row for row in first if row["kind"] == "search" and row[RATE] == "0.04"] == [
        row for row in grown if row[RATE] == "0.04"
    ]
    # What counted by the choice before stays in the file, and gives way in the table: it is as if trained at once.
    earlier = [row for row in first if row["kind"] == "final"]
    assert [row for row in grown if row["kind"] == "final" and row[RATE] == "0.01"] == earlier
    grown = [row for row in grown if row not in earlier]
    curves = [row for row in curves if row["kind"] == "search" or row[RATE] == "0.02"]
    table = (here.output / "ours" / "table.md").read_text()
    here.output = here.output.with_name("anew")
    assert here.run(written(search={RATE: [0.01, 0.04, 0.02, 0.05]}, seeds=3)) == 0
    assert (grown, curves) == (here.rows(), here.rows("curves.csv"))
    told = "27 runs, 12 of them of the search, 6 with settings that were chosen earlier, left out, 0.015 hours"
    anew = (here.output / "ours" / "table.md").read_text()
    assert table == anew.replace("21 runs, 12 of them of the search, 0.012 hours", told)
    here.jobs.clear()
    assert here.run(written(search={RATE: [0.01, 0.04, 0.02, 0.05]}, seeds=4), "--grow", "--only", "kn-*") == 0
    assert [(job.seed, job.split) for job in here.jobs] == [(3, "test")] * 2
    # An interrupted one is told of with what was told before.
    whole = here.rows()
    here.jobs.clear()
    assert here.run(written(search={RATE: [0.01, 0.04, 0.02, 0.05]}, seeds=5), "--grow", "--collect") == 0
    assert (here.rows(), here.jobs) == (whole, [])


def test_runs_that_nothing_else_tells_of_stay(here, written, capsys):
    """Of fewer seeds and of a narrower search, where only the files were kept."""
    assert here.run(written(seeds=3)) == 0
    first, curves = here.rows(), here.rows("curves.csv")
    table = (here.output / "ours" / "table.md").read_text()
    here.jobs.clear()
    for option in ("--grow", "--collect"):
        assert here.run(written(seeds=3), option, "--seeds", "1", "--only", "kn-2") == 0
        assert (here.rows(), here.rows("curves.csv"), here.jobs) == (first, curves, [])
        assert (here.output / "ours" / "table.md").read_text() == table
    # Without the value that was best, and its runs that counted: they stay, and count no more.
    assert here.run(written(search={RATE: [0.01, 0.03]}, seeds=3), "--grow", "--only", "kn-2") == 0
    own = [row for row in here.rows() if row["arm"] == "kn-2"]
    assert [(row[RATE], row["chosen"]) for row in own if row["kind"] == "search"] == [
        ("0.01", "yes"), ("0.03", ""), ("0.02", ""),
    ]  # fmt: skip
    assert [(row[RATE], row["seed"]) for row in own if row["kind"] == "final"] == [
        (rate, seed) for rate in ("0.01", "0.02") for seed in "012"
    ]
    out = capsys.readouterr().out
    assert "| KN | 78.90 ± 0.10 | 79.90 ± 0.10 |" in out
    assert "KN, 2: rate 0.02 was better, but is no longer searched." in out
    assert "21 runs, 9 of them of the search, 3 with settings that were chosen earlier" in out


def test_what_is_told_to_have_diverged_is_believed_and_what_failed_is_tried_again(here, written):
    def train(job, tell):
        rate = job.config["model"]["init_args"]["rate"]
        if rate == 0.04:
            raise FloatingPointError("the loss at step 1 is nan")
        if rate == 0.03:
            raise RuntimeError("no memory")
        return result(job, losses=[math.nan] * 4) if rate == 0.02 else result(job)  # that with the best score

    path, here.train = written(search={RATE: [0.01, 0.02, 0.03, 0.04]}, seeds=1), train
    assert here.run(path, "--only", "kn-2") == 1
    before, here.jobs[:], here.train = here.rows(), [], lambda job, tell: result(job)
    assert here.run(path, "--only", "kn-2", "--grow") == 0
    assert [job.config["model"]["init_args"]["rate"] for job in here.jobs] == [0.03]
    assert [row["error"] for row in here.rows()] == [before[0]["error"], before[1]["error"], "", before[3]["error"], ""]
    assert [row[RATE] for row in here.rows() if row["kind"] == "final"] == ["0.01"]


def test_the_table_has_arms_in_the_study_s_order(here, written, capsys):
    """An arm without a search has its first row in the file after those of all searches."""
    assert here.run(written(arms={"bn-2": {"search": {}}})) == 0
    assert [row["arm"] for row in here.rows()][-6:-4] == ["bn-2", "bn-2"]
    out = capsys.readouterr().out
    assert out.index("| BN |") < out.index("| KN |")
    assert out.index("| bn-2 ") < out.index("| kn-2 ") < out.index("| kn-4 ")


def test_a_search_may_be_shorter(here, written, capsys):
    path = written(search_scale=0.5, config={"trainer": {"max_steps": 8}})
    assert here.run(path) == 0
    lengths = {(job.split, job.config["trainer"]["max_steps"]) for job in here.jobs}
    assert lengths == {("validation", 4), ("test", 8)}
    assert "A search run takes 0.5 of the steps" in capsys.readouterr().out
    assert main(["run", str(path), "--list"]) == 0
    assert "| bn-2 | 3           | 2          | 8           | 28    |" in capsys.readouterr().out
    here.jobs.clear()
    here.output = here.output.with_name("half")
    assert here.run(path, "--scale", "0.5") == 0
    assert {(job.split, job.config["trainer"]["max_steps"]) for job in here.jobs} == {("validation", 2), ("test", 4)}
    assert "Scaled down (0.5): these numbers only show that the study runs." in capsys.readouterr().out


def test_what_was_interrupted_goes_on_and_the_others_do_not_wait(here, written, monkeypatch):
    original = Classifier.training_step
    steps = []

    def breaks(self, batch, index):
        steps.append(self.trainer.global_step)
        if steps == [0, 1, 2, 3]:
            raise RuntimeError("broken off")
        return original(self, batch, index)

    here.train = jobs._fit
    monkeypatch.setattr(Classifier, "training_step", breaks)
    path = written(search="absent", seeds=2)
    assert here.run(path, "--only", "bn-2") == 1
    assert [row["error"] for row in here.rows()] == ["RuntimeError: broken off", ""]
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]
    assert here.run(path, "--only", "bn-2") == 0
    # From the checkpoint of step 2 on, and the other run not again.
    assert steps[8:] == [2, 3]
    assert [row["error"] for row in here.rows()] == ["", ""]


def test_fit_scores_what_it_is_told_and_refuses_a_run_scored_otherwise(images, config, tmp_path):
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 3}
    found = fit(config, tmp_path / "run", split="validation")
    assert found.split == "validation"
    assert fit(config, tmp_path / "run", split="validation") == fit(config, tmp_path / "run") == found
    with pytest.raises(ValueError, match="scored on validation images; got split='test'"):
        fit(config, tmp_path / "run", split="test")
    assert fit(config, tmp_path / "other").split == "test"
    config["data"]["init_args"]["validation"] = 0
    with pytest.raises(ValueError, match="ClassificationData is configured without validation images"):
        fit(config, tmp_path / "none", split="validation")


def start_of(**changes):
    """A study to start from: two arms without a search."""
    content = {**STUDY, "title": "Before", "search": {}, "seeds": 2}
    return merge({key: value for key, value in content.items() if key != "arms"}, {"arms": {"bn": of("bn")}, **changes})


def test_what_is_started_from_is_trained_first_once(here, written, tmp_path, capsys):
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(start_of()))
    path = written(start="before/bn", arms={"kn-4": {"start": None}})
    assert here.run(path, "--list") == 0
    assert "15 runs" in (out := capsys.readouterr().out)
    assert "- kn-2: the weights of before/bn are missing, and are trained first.\n" in out
    assert "kn-4: the weights" not in out
    assert here.run(path) == 0
    first, *others = here.jobs
    assert (str(first), first.keep, first.split) == ("bn, seed 0", True, "test")
    assert len(others) == 15
    weights = [job.config["model"]["init_args"].get("weights") for job in others]
    kn4 = [job.name.startswith("kn-4") for job in others]
    assert sum(kn4) == 5
    assert weights == [None if none else str(first.folder / "last.ckpt") for none in kn4]
    assert first.folder.is_relative_to(here.output / "before" / "runs" / "1")
    assert (here.output / "before" / "runs.csv").is_file()
    # A file may take their place.
    here.jobs.clear()
    weights = tmp_path / "weights.pt"
    weights.touch()
    assert here.run(path, "--weights", str(weights), "--only", "bn-2") == 0
    assert {job.config["model"]["init_args"]["weights"] for job in here.jobs} == {str(weights)}


def test_weights_of_another_scale_are_not_those_asked_for(here, written, tmp_path):
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(start_of()))
    path = written(start="before/bn", search="absent", seeds=1)
    here.train = kept
    for scale in ("0.55", "0.5"):
        assert here.run(path, "--only", "kn-2", "--scale", scale) == 0
    scales = [job.folder.relative_to(here.output).parts[:3] for job in here.jobs]
    assert scales == [(name, "runs", scale) for scale in ("0.55", "0.5") for name in ("before", "ours")]


def test_a_start_is_the_run_that_it_is(here, written, tmp_path):
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(start_of()))
    shared = start_of(arms={"bn": {"run": "first/bn"}})
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(shared))
    assert here.run(written(start="before/bn", search="absent", seeds=1), "--only", "kn-2") == 0
    first, other = here.jobs
    assert first.folder.is_relative_to(here.output / "first")
    assert other.config["model"]["init_args"]["weights"] == str(first.folder / "last.ckpt")


@pytest.mark.slow
def test_trainings_start_from_what_was_trained_at_the_same_scale(here, written, tmp_path):
    here.train = lambda job, tell: fit(job.config, job.folder, tell, split=job.split)
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(start_of()))
    path = written(start="before/bn", search="absent", seeds=1, tiny={"trainer": {"max_steps": 2}})
    assert here.run(path, "--scale", "tiny", "--only", "*-2") == 0
    before, *after = (torch.load(job.folder / "last.ckpt", weights_only=True)["state_dict"] for job in here.jobs)
    tracked = "network.norm.num_batches_tracked"
    assert [state[tracked].item() - before[tracked].item() for state in after] == [2, 2]
    assert [row["error"] for row in here.rows()] == ["", ""]


def test_the_list_counts_the_chosen_arms_runs_and_steps_and_trains_nothing(here, written, capsys):
    assert here.run(written(), "--list", "--seeds", "5", "--scale", "2", "--only", "bn-*, kn-4") == 0
    out = capsys.readouterr().out
    assert "| kn-4 | 3           | 5          | 8           | 64    |" in out
    assert "16 runs, 6 of them of the search; 128 steps; " in out
    assert "kn-2" not in out
    assert "An estimate" in out
    assert not here.jobs
    assert not here.output.exists()


KEPT = Path(__file__).parents[2] / "docs" / "results" / "studies"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in KEPT.glob("*/runs.csv")))
def test_the_tables_that_are_kept_are_of_the_runs_that_are_kept(name, tmp_path):
    (tmp_path / "runs.csv").write_bytes((KEPT / name / "runs.csv").read_bytes())
    write_table(experiments.read(name), tmp_path)
    assert (tmp_path / "table.md").read_text() == (KEPT / name / "table.md").read_text()


def paper(job, tell):
    """A training of a table that takes no time: better with each seed, with validations at two steps; BRN's fails."""
    method = job.config["model"]["init_args"]["normalization"]
    if method == "brn":
        raise RuntimeError("it broke")
    if method == "kn-released" or (method, job.seed) == ("kn-paper", 1):
        raise FloatingPointError("the loss at step 3 is nan")
    validations = [{"step": step, "accuracy_running": step / 10} for step in (3, 6)]
    scores = {"accuracy_running": 0.5 + job.seed / 100, "accuracy_online": 0.25}
    return result(job, scores=scores, losses=[2.0, 1.0], validations=validations)


def test_a_table_of_the_paper_with_its_numbers_failures_and_page(here, capsys):
    here.train = paper
    options = ["--scale", "tiny", "--only", "inception-cifar10-*", "--seeds", "2"]
    assert here.run("table8", *options, "--kalman", "paper,released,default") == 1
    out = capsys.readouterr().out
    assert re.search(r"BN \(bs = 2\) +\| 50.50 ± 0.71 \(89.4\)", out)
    assert re.search(r"KN \(bs = 2\) +\| 50.00 \(1 of 2 runs\) \(90.9\)", out)
    assert re.search(r"KN \(bs = 2\), our default +\| 50.50 ± 0.71 +\|", out)
    assert re.search(r"KN \(bs = 2\), released code +\| diverged \(90.9\)", out)
    assert re.search(r"BRN \(bs = 2\) +\| - \(90.38\)", out)
    assert "inception-cifar10-brn-bs2, run of seed 1: RuntimeError: it broke\n" in out
    assert "run of seed 1: FloatingPointError: the loss at step 3 is nan\n" in out
    assert "not comparable with the paper" in out
    assert re.search(r"inception-cifar10-ln-bs2 .*\| 6 ± 0 ", out)  # steps to the baseline's
    assert out.strip().splitlines()[-1].endswith(f"Report: {here.output}/table8/report.html")
    found = [row for row in here.rows(of="table8") if row["arm"] == "inception-cifar10-ln-bs2"]
    assert [(row["seed"], row["accuracy_running"], row["scale"]) for row in found] == [
        ("0", "0.5", "tiny"), ("1", "0.51", "tiny"),
    ]  # fmt: skip
    page = (here.output / "table8" / "report.html").read_text(encoding="utf-8")
    assert "50.50 ± 0.71 (89.4)" in page
    forms = "--kalman paper,released,default"
    command = f"kalmannorm run table8 --scale tiny --seeds 2 {forms} --output {here.output} --only"
    assert f"{command} &#39;inception-cifar10-kn-bs2&#39;" in page
    assert page.count("a figure") == 1
    assert str(here.output) not in page.replace(f"--output {here.output}", "")
    # Another table that shows the same trainings.
    here.jobs.clear()
    assert here.run("table7", "--scale", "tiny", "--only", "*-bn-bs2", "--seeds", "1") == 0
    assert here.jobs[0].folder.is_relative_to(here.output / "table8")


def test_forms_of_kalman_normalization_are_chosen(here):
    here.train = paper
    options = ["--scale", "tiny", "--only", "*-kn*", "--seeds", "1", "--kalman", "released,default"]
    assert here.run("variants", *options) == 0
    assert [job.config["model"]["init_args"]["normalization"] for job in here.jobs] == ["kn-released", "kn"]
    shown = html.unescape((here.output / "variants" / "report.html").read_text(encoding="utf-8"))
    command = re.search(r"kalmannorm (run .* --only 'resnet32-kn-released')", shown)
    here.jobs.clear()
    assert main(shlex.split(command[1])) == 0
    assert [job.config["model"]["init_args"]["normalization"] for job in here.jobs] == ["kn-released"]


def test_without_any_data_it_is_one_line(here, monkeypatch):
    monkeypatch.setenv("KALMANNORM_DATA", str(here.output.parent))
    assert here.refuses("imagenet", "table1") == ""
    assert not here.output.exists()


def test_only_what_is_there_is_trained(here, capsys):
    here.train = paper
    assert here.run("table8", "--only", "inception-*-ln-bs2", "--seeds", "1", "--scale", "0.001") == 0
    found = {row["arm"]: row for row in here.rows(of="table8")}
    assert found["inception-cifar10-ln-bs2"]["error"] == ""
    assert "'svhn' was not found" in found["inception-svhn-ln-bs2"]["error"]
    assert "inception-svhn-ln-bs2, not run: " in capsys.readouterr().out


def test_what_is_computed_needs_no_data_and_speaks_of_no_seeds(here, capsys):
    assert here.run("table2", "--only", "resnet50-*") == 0
    out = capsys.readouterr().out
    assert re.search(r"KN +\| 25.58 \(25.58\)", out)
    assert "seed" not in out
    assert "steps" not in out
    assert here.run("table2", "--list") == 0
    assert "Nothing is trained." in capsys.readouterr().out


def test_a_rehearsal_makes_way_for_the_run(here, written):
    """Though its table is computed, or its runs are in another experiment's folder."""
    assert here.run("table2", "--only", "resnet50-bn", "--scale", "tiny") == 0
    assert here.run("table2", "--only", "resnet50-bn") == 0
    assert {row["scale"] for row in here.rows(of="table2")} == {"1"}
    here.train = lambda job, tell: [job.folder.mkdir(parents=True), result(job)][-1]
    options = ["--only", "*-bn-bs2", "--seeds", "1"]
    assert here.run("table7", "--scale", "tiny", *options) == 0
    assert here.run("table7", "--scale", "0.001", *options) == 0
    assert {row["scale"] for row in here.rows(of="table7")} == {"0.001"}
    for folder in (here.output / "table8" / "runs").iterdir():
        folder.rename(here.output / folder.name)
    here.refuses("has runs of scale 0.001, whose own folders are gone", "table7", "--scale", "0.002", *options)


def test_an_unfinished_run_of_another_experiment_is_not_recorded(here, written, tmp_path):
    written()
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(start_of()))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(start_of(arms={"bn": {"run": "first/bn"}})))
    here.train = lambda job, tell: [job.folder.mkdir(parents=True), result(job).write(job.folder), result(job)][-1]
    assert here.run(tmp_path / "ours.yaml") == 0
    for job in here.jobs:
        (job.folder / "config.yaml").write_text(yaml.safe_dump(Run(job.config).complete()))
    (here.jobs[1].folder / "result.json").unlink()
    assert here.run(tmp_path / "ours.yaml", "--collect") == 0
    assert [row["seed"] for row in here.rows()] == ["0"]


def test_devices_have_folders_of_their_own_and_weights_are_found_in_all(here, written, tmp_path, monkeypatch):
    folders = []
    written()

    def train(job):
        folders.append(job.folder)
        return kept(job, None)

    monkeypatch.setattr(jobs, "fit_on_devices", train)
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(start_of(search_seed=100)))
    options = ["--output", str(here.output), "--seeds", "1"]
    assert main(["run", str(tmp_path / "before.yaml"), "--devices", "2", *options]) == 0
    assert folders == [here.output / "before" / "runs" / "1-2-devices" / "bn" / "as-it-is" / "test-seed-0"]
    (tmp_path / "after.yaml").write_text(yaml.safe_dump(start_of(title="After", start="before/bn", search_seed=100)))
    assert main(["run", str(tmp_path / "after.yaml"), *options]) == 0
    assert [job.config["model"]["init_args"]["weights"] for job in here.jobs] == [str(folders[0] / "last.ckpt")]


@pytest.mark.slow
def test_figure_5_by_a_worker_and_table_7_from_the_same_trainings(tmp_path, monkeypatch, capfd):
    # Nothing of the machine's own data, nor of its cache.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KALMANNORM_DATA", "")
    options = ["--kalman", "default", "--scale", "tiny", "--seeds", "1", "--workers", "1", "--output", str(tmp_path)]
    assert main(["reproduce", "figure5", *options]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert re.search(r"BN +\| [\d.]+ ", out)
    assert (read_table(tmp_path / "figure5" / "runs.csv")["variance_gap"].astype(float) > 0).all()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(finished) == 2
    assert main(["run", "table7", "--only", "*-bs2*", *options]) == 0
    assert capfd.readouterr().out.count("(90.0)") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == finished
    with browser.started() as chromium:
        for size in (browser.DESKTOP, browser.PHONE):
            found = browser.look(chromium, tmp_path / "figure5" / "report.html", size)
            browser.assert_readable(found)
            assert found.facts["images"] == 3
            assert "not comparable with the paper's" in found.facts["text"]


def test_a_training_on_several_devices_that_fails_says_why(tmp_path, config, monkeypatch):
    """In the words of the first process that failed, of those that its command has started."""
    command = tmp_path / "python"
    said = ("a warning", "kalmannorm: 'cifar11' was not found", "RuntimeError: Connection closed by peer", "the end")
    command.write_text("\n".join(["#!/bin/sh", *(f'echo "{line}"' for line in said), "exit 2"]))
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    words = r"^kalmannorm: 'cifar11' was not found \(exit code 2; the whole output is in other\.log\)$"
    with pytest.raises(RuntimeError, match=words):
        fit_on_devices(Job("", 0, config, tmp_path / "other"))
    assert (tmp_path / "other.log").read_text().splitlines() == [*said]
