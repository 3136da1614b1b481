"""The demo: it repeats itself, and by the real command, Ctrl-C ends it."""

import multiprocessing
import os
import signal
import sys
import time

import pytest

from kalmannorm.lab.cli import main
from kalmannorm.lab.experiments import read
from kalmannorm.lab.fitting import fit

SMALL = {"train": 40, "scored": 20}


@pytest.fixture
def arms():
    """Configurations of a few steps on few images, by the name of the arm."""
    found = {arm.name: arm.scaled("tiny") for arm in read("demo").arms}
    for config in found.values():
        config["data"]["init_args"] |= SMALL
    return found


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
