"""The comparison: what it refuses, what it searches, what it says, and all of it once, small."""

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import browser
import pytest
import torch
from PIL import Image

from kalmannorm.lab import cli, compare
from kalmannorm.lab.compare import Plan, classifier
from kalmannorm.lab.compare_report import terminal_table, verdict, write_page
from kalmannorm.lab.data.generated import generate_folders
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.results import Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_folders(tmp_path_factory.mktemp("images"), "pets", classes=2, train=20, val=4, size=40)


LINE = ["--methods", "bn,kn", "--size", "32", "--steps", "2", "--rates", "0.01", "--seeds", "1", "--workers", "1"]


@pytest.mark.slow
def test_a_comparison_from_beginning_to_end(folder, tmp_path, capsys):
    line = ["compare", str(folder), *LINE, "--output", str(tmp_path / "out")]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert "KalmanNorm" in out
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["split"]) for row in rows] == [
        ("bn", "0", "validation"), ("kn", "0", "validation"), ("bn", "1", "test"), ("kn", "1", "test"),
    ]  # fmt: skip
    # Of 40 training images, a tenth is held out for validation; the 8 in val are the test.
    quarters = [4 * float(row["accuracy_running"]) for row in rows[:2]]
    assert quarters == [round(quarter) for quarter in quarters]
    splits = {path.parts[-3]: Result.read(path.parent).split for path in (tmp_path / "out").rglob("result.json")}
    assert splits == {"search": "validation", "runs": "test"}
    assert not list((tmp_path / "out" / "search").glob("*/last.ckpt"))
    assert len(list((tmp_path / "out" / "runs").glob("*/last.ckpt"))) == 2
    # Nothing is trained again; and another comparison does not go into the same folder.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    content = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert cli.main(line) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert (tmp_path / "out" / "results.csv").read_text(encoding="utf-8") == content
    capsys.readouterr()
    assert cli.main([*line, "--steps", "3"]) == 2
    assert "holds a comparison with steps=2; got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bn,xy"], "--methods: unknown method 'xy'; expected some of bn, brn"),
        (["--methods", "bn,frozen"], "--methods: 'frozen' keeps the statistics of a trained network"),
        (["--methods", "gn", "--network", "resnet19"], "no classifier 'resnet19'; it has for example resnet18"),
        (["--network", "alexnet"], "alexnet has no BatchNorm"),
        (["--network", "inception_v3"], "--size: inception_v3 cannot take images of 32 pixels"),
        (["--gradient_batch", "3"], "--gradient_batch: expected a multiple of statistics_batch=2; got 3"),
        (["--gradient_batch", "0"], "--gradient_batch: expected a multiple of statistics_batch=2; got 0"),
        (["--gradient_batch", "64"], "--gradient_batch: expected at most the 36 training images; got 64"),
        (["--rates", "0.1,x"], "--rates: expected numbers separated by commas; got '0.1,x'"),
        (["--rates", "0.1,-1"], "--rates: expected numbers above 0"),
        (["--seeds", "0"], "--seeds: expected at least 1; got 0"),
        (["--steps", "many"], "--steps: expected int; got many"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(folder, tmp_path, capsys, options, message):
    assert cli.main(["compare", str(folder), *LINE, "--output", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_network_that_a_method_does_not_suit_is_named_with_it(folder, tmp_path, capsys, monkeypatch):
    def normalize(network, method, **options):
        if method == "kn":
            raise ValueError("it cannot be traced")

    monkeypatch.setattr(compare, "normalize", normalize)
    assert cli.main(["compare", str(folder), *LINE, "--output", str(tmp_path / "out")]) == 2
    assert "--methods: kn does not suit resnet18: it cannot be traced" in capsys.readouterr().err


def test_missing_images_are_said_in_one_line(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"the folder '{tmp_path / 'none'}' was not found" in err
    assert "expected one with images as CLASS/*.jpg, or as train/CLASS/*.jpg" in err
    assert "image-net" not in err


def test_the_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "--help"])
    assert ended.value.code == 0
    listed = ",".join(key for key in METHODS if key != "frozen")
    assert f"someof{listed}." in "".join(capsys.readouterr().out.split())


def test_classifiers_give_logits_alone():
    for name, size in (("resnet18", 32), ("googlenet", 32), ("shufflenet_v2_x0_5", 32)):
        assert classifier(name, 5)(torch.zeros(2, 3, size, size)).shape == (2, 5), name


PLAN = Plan("some/pets", ("bn", "gn", "kn"), 2, 4, "resnet18", 32, 10, (0.01, 0.1), 2, 4, 50, 0.25)


def test_the_search_is_scored_on_validation_images_and_keeps_scores_alone(tmp_path):
    searched, counted = (PLAN.trial("bn", 0.1, 0, split, tmp_path).job for split in ("validation", "test"))
    assert (searched.split, searched.keep, searched.folder) == ("validation", False, tmp_path / "search/bn-rate-0.1")
    assert (counted.split, counted.keep, counted.folder) == ("test", True, tmp_path / "runs/bn-seed-0")
    assert searched.config == counted.config


def outcome(method, rate, seed, accuracy, search=False, losses=(1.0,) * 10, error=""):
    trial = PLAN.trial(method, rate, seed, "validation" if search else "test", Path("out"))
    scores = {"accuracy_running": accuracy, "accuracy_online": accuracy / 2}
    environment = {"torch": "2", "machine": "a long name of a machine " * 9}
    result = Result({"model": {"rate": rate}}, scores, 9.0, 0.02, list(losses), [], environment)
    return replace(trial, error=error) if error else compare._ended(trial, result)


def test_the_best_rate_is_the_one_of_the_highest_accuracy_then_of_the_lowest_loss():
    low = [1.0] * 10
    assert compare._best([outcome("bn", 0.1, 0, 0.5), outcome("bn", 0.2, 0, 0.6)]) == 0.2
    rows = [outcome("bn", 0.1, 0, 0.5, losses=[2.0] * 10), outcome("bn", 0.2, 0, 0.5, losses=low)]
    assert compare._best(rows) == 0.2
    assert compare._best([]) is None


@pytest.mark.parametrize("wrong", [{"losses": [1.0, math.nan]}, {"losses": [math.inf] * 2}, {"accuracy": math.nan}])
def test_a_run_that_diverged_never_wins_the_search(wrong):
    diverged = outcome("bn", 0.3, 0, **{"accuracy": 0.9, **wrong})
    assert diverged.error.startswith("diverged: ")
    assert diverged.accuracy == 0
    assert compare.by_method([diverged, outcome("bn", 0.1, 0, 0.2)])["bn"][0].rate == 0.1
    assert compare.by_method([diverged]) == {"bn": []}
    assert next(csv.DictReader(io.StringIO(compare._as_csv([diverged]))))["error"] == diverged.error


def some_diverge(jobs, workers, console):
    """Trainings at a rate of 0.1, and one at another, whose accuracy is the higher and whose loss is nan."""

    def result(job):
        given = job.config["model"]["init_args"]
        diverges = given["rate"] == 0.1 or (given["normalization"], job.seed) == ("kn", 2)
        scores = dict.fromkeys(("accuracy_running", "accuracy_online"), 0.9 if diverges else 0.7)
        return Result(job.config, scores, 1.0, 0.1, [1.0, math.nan if diverges else 1.0], [], {"torch": "2"})

    return [result(job) for job in jobs]


def test_what_diverged_is_named_and_left_out(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run_jobs", some_diverge)
    line = ["compare", str(folder), *LINE, "--rates", "0.01,0.1", "--seeds", "3", "--output", str(tmp_path / "out")]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    left_out = "Left out: KalmanNorm (default), rate 0.01, seed 2 diverged: the loss was nan at step 2"
    assert left_out in out
    assert "Left out: BatchNorm, rate 0.1, seed 0 diverged" in out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert left_out in page
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert cells[:3] == ["BatchNorm", "0.01", "70.0 ± 0.0"]
    assert cells[6:9] == ["KalmanNorm (default) (2 of 3 runs)", "0.01", "70.0 ± 0.0"]


def test_where_all_diverged_there_is_nothing_to_compare(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run_jobs", some_diverge)
    line = ["compare", str(folder), *LINE, "--rates", "0.1", "--output", str(tmp_path / "out")]
    assert cli.main(line) == 2
    said = "nothing to compare; BatchNorm, rate 0.1, seed 0 diverged: the loss was nan at step 2"
    assert said in capsys.readouterr().err
    assert "diverged" in (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")


def test_what_went_wrong_is_an_outcome_and_not_the_end(monkeypatch, tmp_path):
    trials = [PLAN.trial("bn", rate, 0, "validation", tmp_path) for rate in (0.1, 0.2)]
    result = outcome("bn", 0.2, 0, 0.5).result
    monkeypatch.setattr(compare, "run_jobs", lambda *rest: [RuntimeError("no\nmemory"), result])
    failed, fine = compare._run(trials, 1, None)
    assert (failed.result, failed.error, failed.accuracy) == (None, "RuntimeError: no memory", 0.0)
    assert fine.accuracy == 0.5
    assert compare.by_method([failed, fine]) == {"bn": [fine]}
    first, second = csv.DictReader(io.StringIO(compare._as_csv([failed, fine])))
    assert (first["accuracy_running"], first["error"]) == ("", "RuntimeError: no memory")
    assert (second["accuracy_online"], second["seconds_per_step"], second["error"]) == ("0.25", "0.02", "")


def test_what_ended_before_is_only_read(monkeypatch, tmp_path):
    ended, left = (PLAN.trial("bn", rate, 0, "validation", tmp_path) for rate in (0.1, 0.2))
    ended.job.folder.mkdir(parents=True)
    (ended.job.folder / "config.yaml").write_text("{}")
    outcome("bn", 0.1, 0, 0.5).result.write(ended.job.folder)
    monkeypatch.setattr(compare, "run_jobs", lambda jobs, *rest: [RuntimeError(job.name) for job in jobs])
    first, second = compare._run([ended, left], 1, None)
    assert (first.accuracy, first.error) == (0.5, "")
    assert second.error == "RuntimeError: search/BatchNorm, rate 0.2"


SECONDS = {"BN": 0.010, "GN": 0.012, "KN": 0.015}


def test_a_clear_winner_is_named_with_the_distance_and_the_cost():
    said = verdict({"BN": [0.50, 0.52], "GN": [0.70, 0.72], "KN": [0.90, 0.92]}, SECONDS, 0.1, 1000)
    assert said == (
        "KN has the highest accuracy, 91.0 ± 1.4 % of 1000 test images. It beats GN by 20.0 points (14 times the "
        "deviation between seeds) and BN by 40.0 points (28 times the deviation between seeds). "
        "A step of KN takes 15.0 ms, 1.25 times GN's and 1.50 times BN's."
    )


def test_what_is_within_the_spread_is_no_difference():
    said = verdict({"BN": [0.50, 0.52], "GN": [0.88, 0.92], "KN": [0.89, 0.93]}, SECONDS, 0.1, 1000)
    assert "It beats BN by 40.0 points" in said
    assert "There is no difference beyond the spread to GN (1.0 points, where seeds deviate by 2.8)." in said
    assert "Of these, a step of GN takes the least time." in said


def test_seeds_that_agree_need_more_than_a_test_images_difference():
    same = {"BN": [0.90, 0.90], "KN": [0.90, 0.92]}
    assert "no difference beyond the spread" in verdict(same, SECONDS, 0.1, 50)
    apart = {"BN": [0.90, 0.90], "KN": [0.94, 0.94]}
    assert "It beats BN by 4.0 points (all seeds alike)" in verdict(apart, SECONDS, 0.1, 50)
    assert "no difference beyond" in verdict(apart, SECONDS, 0.1, 20)


def test_one_seed_says_nothing_of_chance():
    said = verdict({"BN": [0.5], "KN": [0.9]}, SECONDS, 0.1, 1000)
    assert "40.0 points above BN. With a single seed nothing says how much of that is chance" in said
    assert "beats" not in said


def test_networks_that_guess_have_no_winner():
    said = verdict({"BN": [0.10, 0.11], "KN": [0.10, 0.13]}, SECONDS, 0.1, 1000)
    assert said.startswith("No method learned anything in these runs")
    assert "guessing gives 10.0 %" in said
    # A seed that fails does not say that those of others did not learn.
    assert verdict({"KN": [0.9, 0.3, 0.9]}, SECONDS, 0.1, 1000).startswith("KN has the highest accuracy, 70.0 ± 34.6 %")


def test_to_name_the_largest_class_is_to_guess(tmp_path, capsys, monkeypatch):
    """Of 20 test images 18 are of one class: 0.9 is what a network has that learned nothing."""
    for name, count in (("common", 180), ("rare", 20)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{number}.png")

    def guess(jobs, workers, console):
        scores = dict.fromkeys(("accuracy_running", "accuracy_online"), 0.9)
        return [Result(job.config, scores, 1.0, 0.1, [1.0, 1.0], [], {"torch": "2"}) for job in jobs]

    monkeypatch.setattr(compare, "run_jobs", guess)
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["compare", str(tmp_path / "images"), *LINE, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "No method learned anything" in out
    assert "guessing gives 90.0 %" in " ".join(out.split())


def test_a_method_alone_gets_its_number():
    said = verdict({"KN": [0.9, 0.9]}, SECONDS, 0.1, 100)
    assert said == "KN has the highest accuracy, 90.0 ± 0.0 % of 100 test images."


@pytest.fixture(scope="module")
def outcomes():
    accuracies = {"bn": 0.5, "kn": 0.9}
    searched = [outcome(key, rate, 0, score, True) for key, score in accuracies.items() for rate in (0.01, 0.1)]
    searched.append(outcome("gn", 0.01, 0, 0, True, error="it broke"))
    finished = [outcome(key, 0.1, seed, score + seed / 100) for key, score in accuracies.items() for seed in (1, 2)]
    return searched, finished


@pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE], ids=["desktop", "phone"])
def test_the_report_is_readable_and_says_what_the_terminal_says(outcomes, tmp_path, size):
    page = write_page(tmp_path / "report.html", PLAN, *outcomes, 2)
    with browser.started() as chromium:
        found = browser.look(chromium, page, size)
    browser.assert_readable(found)
    assert found.facts["images"] == 2
    text = found.facts["text"]
    assert terminal_table(PLAN, outcomes[1]).caption in text
    assert "KalmanNorm (default) has the highest accuracy, 91.5 ± 0.7 % of 50 test images" in text
    assert "GroupNorm, rate 0.01, seed 0 failed: it broke" in text
    assert "No run of GroupNorm counts: each failed or diverged." in text
    assert "the best rate, 0.1, is at an end of those searched" in text
    assert "kalmannorm compare some/pets --methods bn,gn,kn --statistics_batch 2 --gradient_batch 4" in text
    cells = re.findall(r"<td>(.*?)</td>", page.read_text(encoding="utf-8"))
    assert cells[6:] == ["KalmanNorm (default)", "0.1", "91.5 ± 0.7", "45.8 ± 0.4", "1.000", "20.0"]
