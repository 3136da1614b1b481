"""Many jobs at the same time, each in one of several processes, with a progress bar a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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

__all__ = ["Tell", "available_cpus", "bars", "in_turn", "run_all"]

J = TypeVar("J")
R = TypeVar("R")
Tell = Callable[[int], None]
"""Takes the number of steps done."""


def available_cpus() -> int:
    """CPUs that this process may use, where the system can tell: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bars(console: Console, *, shown: bool = True) -> Progress:
    """Progress bars that count steps, with the time that has passed and the time that is left."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown)


def run_all(
    jobs: Sequence[J],
    work: Callable[[J, Tell], R],
    steps: Callable[[J], int],
    workers: int,
    console: Console,
    *,
    keep_going: bool = False,
) -> list[R | Exception]:
    """Do ``jobs`` in ``workers`` processes of one thread each; with GPUs, each process has one of them to itself.

    Args:
        jobs: What can be sent to another process; ``str`` of one is the name of its bar.
        work: Does a job, and tells now and then how many steps are done; a function of a module.
        steps: How many steps a job has.
        workers: Number of processes.
        console: Where the bars are.
        keep_going: Return what a job raised in its place, and go on with the others. A job whose process ends (for
            want of memory, say) is tried once more, alone.

    Returns:
        The results, in the order of ``jobs``.

    Raises:
        Exception: What a job raised, at once, unless ``keep_going``.
    """
    with bars(console) as progress:
        team = _Team(jobs, work, steps, progress, keep_going)
        suspects: list[int] = []
        while left := [place for place in range(len(jobs)) if place not in team.outcomes and place not in suspects]:
            suspects += team.run(left, min(workers, len(left)))
        for place in suspects:
            if team.run([place], 1):
                team.outcomes[place] = ChildProcessError("its process was ended from outside (for want of memory?)")
    return [team.outcomes[place] for place in range(len(jobs))]


def in_turn(
    jobs: Sequence[J], work: Callable[[J], R], steps: Callable[[J], int], console: Console
) -> list[R | Exception]:
    """Do ``jobs`` one after another in this process, with a bar; what one raised takes its result's place."""
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
    """Jobs, known by their places in a list, and what came of them."""

    def __init__(
        self,
        jobs: Sequence[J],
        work: Callable[[J, Tell], R],
        steps: Callable[[J], int],
        progress: Progress,
        keep_going: bool,
    ) -> None:
        self.jobs, self.work, self.steps, self.keep_going = jobs, work, [steps(job) for job in jobs], keep_going
        self.progress = progress
        self.overall = progress.add_task("all steps", total=sum(self.steps))
        self.done = [0] * len(jobs)
        self.outcomes: dict[int, R | Exception] = {}

    def run(self, places: Sequence[int], workers: int) -> list[int]:
        """Do these jobs; where a process was ended, stop, and return the places of the jobs that had begun."""
        # Fresh processes: a forked one would inherit torch's thread pools in whatever state they are.
        context = multiprocessing.get_context("spawn")
        queue, number = context.Queue(), context.Value("i", 0)
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(workers, context, _start, (queue, number)) as pool:
            futures = {pool.submit(_work, self.work, place, self.jobs[place]): place for place in places}
            try:
                return self._follow(futures, queue)
            except BaseException:
                # Without this, leaving the pool would wait for every job that has begun.
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                raise

    def _follow(self, futures: dict[Future[R], int], queue: Any) -> list[int]:
        own: dict[int, tuple[int, TaskID]] = {}  # a process's job and bar
        pending, broken = set(futures), False
        while pending:
            done, pending = wait(pending, 0.2, FIRST_COMPLETED)
            while not queue.empty():
                self._show(own, *queue.get())
            for future in done:
                broken |= self._finish(future, futures[future])
        for _, bar in own.values():
            self.progress.remove_task(bar)
        if not broken:
            return []
        unfinished = [place for place in futures.values() if place not in self.outcomes]
        return [place for place, _ in own.values() if place in unfinished] or unfinished

    def _finish(self, future: Future[R], place: int) -> bool:
        """Keep what came of a job; True where it never came to an end."""
        try:
            self.outcomes[place] = future.result()
        except BrokenProcessPool:
            if not self.keep_going:
                raise
            return True
        except Exception as error:
            if not self.keep_going:
                raise
            self.outcomes[place] = error
        self._advance(place, self.steps[place])
        return False

    def _show(self, own: dict[int, tuple[int, TaskID]], process: int, place: int, step: int) -> None:
        if process not in own or own[process][0] != place:
            if process in own:
                self.progress.remove_task(own[process][1])
            own[process] = place, self.progress.add_task(str(self.jobs[place]), total=self.steps[place])
        self.progress.update(own[process][1], completed=step)
        if place not in self.outcomes:
            self._advance(place, step)

    def _advance(self, place: int, step: int) -> None:
        self.done[place] = step
        self.progress.update(self.overall, completed=sum(self.done))


_queue: Any = None


def _start(queue: Any, number: Any) -> None:
    global _queue  # noqa: PLW0603  (a queue can only be handed to a process when it starts)
    _queue = queue
    torch.set_num_threads(1)
    with number:
        mine, number.value = number.value, number.value + 1
    _take_gpu(mine)
    # Ctrl-C is the parent's to answer; and no worker outlives a parent that was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _take_gpu(number: int) -> None:
    """Show this process one GPU of those it could see; CUDA looks when it is first used."""
    count = torch.cuda.device_count()
    if count > 1:
        seen: Iterable[Any] = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [name for name in seen if name] or list(range(count))
        os.environ["CUDA_VISIBLE_DEVICES"] = str(names[number % len(names)])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(work: Callable[[J, Tell], R], place: int, job: J) -> R:
    def tell(step: int) -> None:
        _queue.put((os.getpid(), place, step))

    tell(0)
    return work(job, tell)
