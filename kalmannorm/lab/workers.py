"""Run jobs in several processes, with a progress bar for each."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

J = TypeVar("J")
R = TypeVar("R")
OnProgress = Callable[[int], None]
"""Takes the number of steps done."""


def available_cpus() -> int:
    """Number of CPUs that this process may use, which in a container may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bars(console: Console, *, shown: bool = True) -> Progress:
    """Progress bars that count steps, with elapsed and remaining time."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


def run_all(
    jobs: Sequence[J], work: Callable[[J, OnProgress], R], steps: Callable[[J], int], workers: int, console: Console
) -> list[R | Exception]:
    """Run ``jobs`` in ``workers`` processes, each with one thread and at most one GPU.

    Args:
        jobs: Picklable objects; ``str`` of one is the label of its bar.
        work: Does a job, and calls its second argument with the number of steps done; picklable.
        steps: From a job to its number of steps.
        workers: Number of processes.
        console: Where to show the bars.

    Returns:
        The results, in the order of ``jobs``; for a job that raised, the exception. A job whose
        process was killed (out of memory, for example) is run once more, alone.
    """
    with bars(console) as progress:
        team = _Team(jobs, work, steps, progress)
        team.run(range(len(jobs)), workers)
        for place in [place for place in range(len(jobs)) if place not in team.outcomes]:
            team.run([place], 1)
            ended = ChildProcessError("its process was ended from outside (for want of memory?)")
            team.outcomes.setdefault(place, ended)
    return [team.outcomes[place] for place in range(len(jobs))]


def in_turn(
    jobs: Sequence[J], work: Callable[[J], R], steps: Callable[[J], int], console: Console
) -> list[R | Exception]:
    """Run ``jobs`` one after another in this process, with a bar; for a job that raised, return the exception."""
    outcomes: list[R | Exception] = []
    with bars(console) as progress:
        bar = progress.add_task("all steps", total=sum(map(steps, jobs)))
        for job in jobs:
            progress.update(bar, description=str(job))
            try:
                outcomes.append(work(job))
            except Exception as error:
                outcomes.append(error)
            progress.advance(bar, steps(job))
    return outcomes


class _Team(Generic[J, R]):
    """Jobs, identified by their index, and their outcomes; a job whose process was killed has none."""

    def __init__(
        self, jobs: Sequence[J], work: Callable[[J, OnProgress], R], steps: Callable[[J], int], progress: Progress
    ) -> None:
        self.jobs, self.work, self.steps, self.progress = jobs, work, [steps(job) for job in jobs], progress
        self.overall = progress.add_task("all steps", total=sum(self.steps))
        self.bars: dict[int, TaskID] = {}
        self.done = [0] * len(jobs)
        self.running: set[int] = set()
        self.outcomes: dict[int, R | Exception] = {}
        # A forked process would inherit torch's thread pools in an undefined state.
        self.context = multiprocessing.get_context("spawn")
        self.queue = self.context.Queue()

    def run(self, places: Sequence[int], workers: int) -> None:
        """Run these jobs; each worker process has a thread that sends it one job after another."""
        others, left = set(multiprocessing.active_children()), iter(list(places))
        with ThreadPoolExecutor(workers) as threads:
            lanes = [threads.submit(self._lane, number, left) for number in range(workers)]
            try:
                while wait(lanes, 0.2).not_done:
                    self._show()
            except BaseException:
                # Otherwise leaving the `with` block would wait for every job.
                list(left)
                while wait(lanes, 0.05).not_done:
                    for process in set(multiprocessing.active_children()) - others:
                        process.kill()
                raise
        self._show()
        for lane in lanes:
            lane.result()

    def _lane(self, number: int, left: Iterator[int]) -> None:
        pool = None
        for place in left:
            pool = pool or ProcessPoolExecutor(1, self.context, _start, (self.queue, number))
            self.running.add(place)
            try:
                self.outcomes[place] = pool.submit(_work, self.work, place, self.jobs[place]).result()
            except BrokenProcessPool:
                pool = None
            except Exception as error:
                self.outcomes[place] = error
            self.running.discard(place)
        if pool:
            pool.shutdown()

    def _show(self) -> None:
        """Update the bars; only the main thread does, so they need no lock."""
        while not self.queue.empty():
            place, step = self.queue.get()
            self.done[place] = step
        for place in list(self.outcomes):
            self.done[place] = self.steps[place]
        for place in self.running - self.bars.keys():
            self.bars[place] = self.progress.add_task(str(self.jobs[place]), total=self.steps[place])
        for place, bar in self.bars.items():
            self.progress.update(bar, completed=self.done[place], visible=place in self.running)
        self.progress.update(self.overall, completed=sum(self.done))


_queue: Any = None


def _start(queue: Any, number: int) -> None:
    global _queue  # noqa: PLW0603  (a queue can only be passed to a process when it starts)
    _queue = queue
    torch.set_num_threads(1)
    _take_gpu(number)
    # The parent handles Ctrl-C, and a worker exits when its parent is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _take_gpu(number: int) -> None:
    """Make one GPU visible to this process, before CUDA is initialized."""
    count = torch.cuda.device_count()
    if count > 1:
        visible: Iterable[Any] = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [name for name in visible if name] or list(range(count))
        os.environ["CUDA_VISIBLE_DEVICES"] = str(names[number % len(names)])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Callable[[J, OnProgress], R], place: int, job: J) -> R:
    return work(job, lambda step: _queue.put((place, step)))
