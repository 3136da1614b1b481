"""The demo, end to end and small: what it prints, what it writes, and that it repeats itself."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kalmannorm.lab import demo, runs
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.runs import Job, Result


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run of the real command in a process of its own: its standard output, errors and folder."""
    folder = tmp_path_factory.mktemp("demo")
    line = ["-m", "kalmannorm.lab.cli", "demo", "--methods", "bn,kn", "--seeds", "1", "--steps", "20"]
    done = subprocess.run(
        [sys.executable, *line, "--workers", "1", "--validation", "--output", str(folder / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, folder / "out"


def test_it_prints_a_table_and_the_reports_path_last(tiny):
    out, err, folder = tiny
    assert "BatchNorm" in out
    assert "KalmanNorm (default)" in out
    assert "GroupNorm" not in out
    assert out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    assert err == ""


def test_csv_and_json_hold_each_run(tiny):
    folder = tiny[2]
    rows = list(csv.DictReader((folder / "results.csv").open(encoding="utf-8")))
    assert [(row["method"], row["seed"], row["split"], row["steps"]) for row in rows] == [
        ("bn", "0", "validation", "20"),
        ("kn", "0", "validation", "20"),
    ]
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert document["environment"]["command"].startswith("kalmannorm demo --methods bn,kn --seeds 1 --steps 20")
    for row, run in zip(rows, document["runs"], strict=True):
        assert len(run["losses"]) == 20
        assert float(row["accuracy_running"]) == pytest.approx(run["accuracy_running"], abs=1e-5)
        assert 0 <= run["accuracy_online"] <= 1
        assert run["seconds_per_step"] > 0
        assert run["job"]["rate"] == runs.RATES[run["job"]["method"]]


def test_the_report_shows_the_same_numbers_as_the_table_and_says_how_to_repeat_them(tiny):
    out, _, folder = tiny
    page = (folder / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", page)
    assert len(cells) == 2 * len(demo.HEADER)
    assert all(cell in out for cell in cells)
    assert page.count("data:image/png;base64,") == 2
    assert "kalmannorm demo --methods bn,kn --seeds 1 --steps 20 --data_seed 0 --validation<" in page


@pytest.fixture
def few_images(monkeypatch):
    """Runs in this process train and score on few images."""
    monkeypatch.setattr(runs, "SCORED_IMAGES", 40)
    runs.images.cache_clear()
    yield
    runs.images.cache_clear()


def test_the_same_job_gives_the_same_numbers_here_as_in_a_worker(tiny, few_images):
    recorded = json.loads((tiny[2] / "results.json").read_text(encoding="utf-8"))["runs"][1]
    assert runs.run(Job(**recorded["job"])).losses == pytest.approx(recorded["losses"], abs=2e-4)


def test_draws_repeat_themselves_too(few_images):
    """The paper's estimator draws random numbers in training and again when it is scored online."""
    first, again = (runs.run(Job("kn-paper", 0, 5, 1e-3)) for _ in range(2))
    assert first.losses == again.losses
    assert (first.accuracy_running, first.accuracy_online) == (again.accuracy_running, again.accuracy_online)


def test_methods_start_from_the_same_weights_and_see_the_same_images(few_images):
    """BatchNorm under another name, and by other layers, has its losses; another seed or another method does not."""
    first = runs.run(Job("bn", 3, 5, 1e-3)).losses
    assert runs.run(Job("ghost", 3, 5, 1e-3)).losses == pytest.approx(first, rel=1e-4)
    assert runs.run(Job("bn", 4, 5, 1e-3)).losses != pytest.approx(first, rel=1e-2)
    assert runs.run(Job("gn", 3, 5, 1e-3)).losses != pytest.approx(first, rel=1e-2)


def test_the_demos_groupnorm_has_the_groups_of_its_kept_results(few_images, monkeypatch):
    networks = [SmallConvNet()]
    monkeypatch.setattr(runs, "SmallConvNet", lambda: networks[0])
    runs.run(Job("gn", 0, 1, 1e-3))
    assert {norm.num_groups for norm in networks[0].norms} == {4}


def test_every_method_replaces_what_it_says():
    kinds = {}
    for key in runs.RATES:
        torch.manual_seed(0)
        model = normalize(SmallConvNet(), key)
        kinds[key] = {type(norm).__name__ for norm in model.norms}
        torch.manual_seed(0)
        assert torch.equal(model.convs[-1].weight, SmallConvNet().convs[-1].weight)
    assert kinds == {
        "bn": {"BatchNorm2d"},
        "gn": {"GroupNorm"},
        "kn-paper": {"KalmanNorm2d"},
        "kn": {"KalmanNorm2d"},
    }
    paper = normalize(SmallConvNet(), "kn-paper")
    assert {(norm.carry, norm.estimator, norm.spread) for norm in paper.norms} == {("posterior", "monte_carlo", False)}


def _result(method, seed, running, losses):
    return Result(Job(method, seed, len(losses), 0.1), running, 0.5, 0.004, losses)


def test_the_table_gives_mean_and_spread_over_seeds():
    results = [_result("bn", 0, 0.60, [9.0] * 9 + [1.0]), _result("bn", 1, 0.70, [9.0] * 9 + [2.0])]
    assert demo.summarize(results) == [["BatchNorm", "65.0 ± 7.1", "50.0 ± 0.0", "1.500 ± 0.707", "4.0"]]
    assert demo.summarize(results[:1]) == [["BatchNorm", "60.0", "50.0", "1.000", "4.0"]]


def test_a_run_that_diverged_is_still_written(tmp_path):
    """JSON has no NaN, and a figure must not fail on one."""
    results = [_result("bn", 0, 0.1, [2.0, float("nan"), float("inf")])]
    runs.write_json(tmp_path / "results.json", results, {})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["runs"][0]["losses"] == [2.0, None, None]
    environment = dict.fromkeys(("command", "kalmannorm", "torch", "python", "machine", "seconds"), "?")
    assert "BatchNorm" in demo.write_page(tmp_path / "page.html", results, environment).read_text()


def test_the_table_shows_that_one_of_several_runs_diverged():
    results = [_result("bn", 0, 0.1, [math.nan] * 10), _result("bn", 1, 0.7, [1.0] * 10)]
    assert demo.summarize(results) == [["BatchNorm", "40.0 ± 42.4", "50.0 ± 0.0", "nan ± nan", "4.0"]]


def test_a_run_that_fails_ends_the_demo_with_its_error():
    from rich.console import Console

    with pytest.raises(KeyError, match="unheard-of"):
        runs.run_all([Job("unheard-of", 0, 5, 0.1)], 1, Console(quiet=True))


def test_search_picks_the_rate_that_is_best_over_all_seeds_and_both_scores():
    from kalmannorm.lab.demo_search import best

    def result(rate, seed, running):
        return Result(Job("bn", seed, 1, rate), running, 0.5, 0.004, [1.0])

    results = [result(0.1, 0, 0.9), result(0.1, 1, 0.1), result(0.01, 0, 0.6), result(0.01, 1, 0.6)]
    assert best(results, "bn") == 0.01


def test_no_machine_path_gets_into_the_raw_results(tiny):
    folder = tiny[2]
    for name in ("results.csv", "results.json", "report.html"):
        assert str(Path.home()) not in (folder / name).read_text(encoding="utf-8")
        assert str(folder) not in (folder / name).read_text(encoding="utf-8")


def _group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_it_at_once_with_one_line(tmp_path):
    line = [
        sys.executable,
        "-m",
        "kalmannorm.lab.cli",
        "demo",
        "--methods",
        "bn",
        "--seeds",
        "1",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        [*line, "--steps", "100000", "--output", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Children of a job in the background would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread holds a lock here
    )
    try:
        while not (tmp_path / "out").exists():  # made once the command line has been read
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(8)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert err.splitlines()[-1] == "kalmannorm: interrupted"
        patience = time.monotonic() + 10  # the system takes a moment to clean up after the dead
        while _group_exists(process.pid) and time.monotonic() < patience:
            time.sleep(0.1)
        assert not _group_exists(process.pid)
    finally:  # or it would train on
        if _group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "out").iterdir())
