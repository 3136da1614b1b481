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
        time.sleep(0.3)  # its neighbour has begun too
        os._exit(9)
    if what == "sleep":
        time.sleep(0.8)
    return 10 * number, os.getpid()


def done(jobs, shown=None):
    return run_all(jobs, work, lambda job: 2, 2, Console(file=shown or io.StringIO()))


@pytest.mark.slow
def test_results_are_in_the_order_of_the_jobs_with_errors_in_their_place():
    """And a process that dies takes no other job with it: not its neighbour's, which had begun, nor those to come."""
    shown = io.StringIO()
    results = done([("sleep", 1), ("sleep", 2), ("die", 3), ("sleep", 4), ("fail", 5), ("go", 6)], shown)
    assert "11/12" in shown.getvalue()  # of the job that dies, the first of two steps
    assert [results[place][0] for place in (0, 1, 3, 5)] == [10, 20, 40, 60]
    assert isinstance(results[2], ChildProcessError)
    assert isinstance(results[4], ValueError)
    assert str(results[4]) == "job 5"
    assert len({results[0][1], results[1][1], os.getpid()}) == 3


def test_in_turn_keeps_errors_and_counts_steps():
    shown = io.StringIO()
    results = in_turn(
        [("go", 1), ("fail", 2)], lambda job: work(job, lambda step: None), lambda job: 7, Console(file=shown)
    )
    assert results[0][0] == 10
    assert isinstance(results[1], ValueError)
    assert "14/14" in shown.getvalue()
