"""The demo, by the real command: what it prints and writes, that it repeats itself, and that Ctrl-C ends it."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from kalmannorm.lab.cli import main
from kalmannorm.lab.experiments import read
from kalmannorm.lab.fitting import fit
from kalmannorm.lab.rows import read_table

SMALL = {"train": 40, "scored": 20}


@pytest.fixture
def arms():
    """Configurations of a few steps on few images, by the name of the arm."""
    found = {arm.name: arm.scaled("tiny") for arm in read("demo").arms}
    for config in found.values():
        config["data"]["init_args"] |= SMALL
    return found


@pytest.mark.usefixtures("_in_this_process")
def test_it_prints_a_verdict_and_writes_a_page(tmp_path, capsys):
    line = ["demo", "--only", "bn,kn", "--scale", "tiny", "--seeds", "2", "--workers", "1"]
    assert main([*line, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'demo' / 'report.html'}"
    assert "Scaled down (tiny)" in out
    assert "BatchNorm" in out
    assert "KalmanNorm (default)" in out
    assert "GroupNorm" not in out.partition("- ")[0].replace("GroupNorm has neither", "")
    rows = read_table(tmp_path / "demo" / "runs.csv").to_dict("records")
    assert [(row["arm"], row["seed"], row["split"]) for row in rows] == [
        ("bn", "0", "test"), ("bn", "1", "test"), ("kn", "0", "test"), ("kn", "1", "test"),
    ]  # fmt: skip
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "guessing gives 10.0 %" in page
    assert "kalmannorm run demo --scale tiny --seeds 2" in page
    assert str(tmp_path) not in page.replace(f"--output {tmp_path}", "")


def test_the_same_configuration_gives_the_same_numbers_and_methods_start_alike(arms, tmp_path):
    """The paper's estimator draws random numbers in training and again when it is scored online."""
    first, again = (fit(arms["kn-paper"], tmp_path / name) for name in ("first", "again"))
    assert (first.losses, first.scores) == (again.losses, again.scores)
    ghost = arms["bn"]["model"]["init_args"] | {"normalization": "ghost"}
    other = {**arms["bn"], "model": {**arms["bn"]["model"], "init_args": ghost}}
    plain = fit(arms["bn"], tmp_path / "bn").losses
    assert fit(other, tmp_path / "ghost").losses == pytest.approx(plain, rel=1e-4)
    assert fit(arms["gn"], tmp_path / "gn").losses != pytest.approx(plain, rel=1e-2)


def _group_exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def demo_for_long(folder):
    """In a group of its own, as a terminal starts a command."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (folder / "stderr").open("w") as file:
        os.dup2(file.fileno(), 2)
    line = ["demo", "--only", "bn", "--seeds", "1", "--workers", "1", "--scale", "100"]
    sys.exit(main([*line, "--output", str(folder / "out")]))


def test_ctrl_c_ends_it_at_once_with_one_line(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=demo_for_long, args=(tmp_path,))
    process.start()
    try:
        while not list((tmp_path / "out").rglob("config.yaml")):  # it trains
            assert process.is_alive()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
        process.join(20)
        assert process.exitcode == 130
        assert (tmp_path / "stderr").read_text().splitlines()[-1] == "kalmannorm: interrupted"
        patience = time.monotonic() + 10  # the system takes a moment to clean up after the dead
        while _group_exists(process.pid) and time.monotonic() < patience:
            time.sleep(0.1)
        assert not _group_exists(process.pid)
    finally:  # or it would train on
        if _group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "out").rglob("runs.csv"))
