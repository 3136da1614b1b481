"""The process pool: results in order, errors in their place, and no job lost with a process that died."""

import io
import os
import time

import pytest
from rich.console import Console

from kalmannorm.lab.workers import in_turn, run_all


def work(job, tell):
    """A job is what to do, and a number."""
    what, number = job
    tell(1)
    if what == "fail":
        raise ValueError(f"job {number}")
    if what == "die":
        time.sleep(0.5)  # its neighbour has begun too
        os._exit(9)
    if what == "sleep":
        time.sleep(1.5)
    return 10 * number, os.getpid()


def done(jobs, shown=None):
    return run_all(jobs, work, lambda job: 2, 2, Console(file=shown or io.StringIO()))


def test_results_are_in_the_order_of_the_jobs_with_errors_in_their_place():
    shown = io.StringIO()
    results = done([("sleep", 1), ("sleep", 2), ("fail", 3), ("go", 4)], shown)
    assert "8/8" in shown.getvalue()
    assert [results[place][0] for place in (0, 1, 3)] == [10, 20, 40]
    assert isinstance(results[2], ValueError)
    assert str(results[2]) == "job 3"
    processes = {results[place][1] for place in (0, 1, 3)}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_job_with_it():
    """Its neighbour, which had begun, and those that had not are done all the same."""
    results = done([("sleep", 1), ("die", 2), ("go", 3), ("go", 4)])
    assert isinstance(results[1], ChildProcessError)
    assert [results[place][0] for place in (0, 2, 3)] == [10, 30, 40]


def test_in_turn_keeps_errors_and_counts_steps():
    shown = io.StringIO()
    results = in_turn(
        [("go", 1), ("fail", 2)], lambda job: work(job, lambda step: None), lambda job: 7, Console(file=shown)
    )
    assert results[0][0] == 10
    assert isinstance(results[1], ValueError)
    assert "14/14" in shown.getvalue()
