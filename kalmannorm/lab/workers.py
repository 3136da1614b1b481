"""Many jobs at the same time, each in one of several processes, with a progress bar a process."""

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
    jobs: Sequence[J], work: Callable[[J, Tell], R], steps: Callable[[J], int], workers: int, console: Console
) -> list[R | Exception]:
    """Do ``jobs`` in ``workers`` processes of one thread, and of one GPU if there are any, each.

    Args:
        jobs: What can be sent to another process; ``str`` of one is the name of its bar.
        work: Does a job, and tells now and then how many steps are done; a function of a module.
        steps: How many steps a job has.
        workers: Number of processes.
        console: Where the bars are.

    Returns:
        The results, in the order of ``jobs``; in place of one what its job raised. A job whose
        process ends (for want of memory, say) is tried once more, alone.
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
    """Jobs, known by their places in a list, and what came of them: nothing where a process was ended."""

    def __init__(
        self, jobs: Sequence[J], work: Callable[[J, Tell], R], steps: Callable[[J], int], progress: Progress
    ) -> None:
        self.jobs, self.work, self.steps, self.progress = jobs, work, [steps(job) for job in jobs], progress
        self.overall = progress.add_task("all steps", total=sum(self.steps))
        self.bars: dict[int, TaskID] = {}
        self.done = [0] * len(jobs)
        self.running: set[int] = set()
        self.outcomes: dict[int, R | Exception] = {}
        # Fresh processes: a forked one would inherit torch's thread pools in whatever state they are.
        self.context = multiprocessing.get_context("spawn")
        self.queue = self.context.Queue()

    def run(self, places: Sequence[int], workers: int) -> None:
        """Do these jobs: a thread for each process, which gives it one after another."""
        others, left = set(multiprocessing.active_children()), iter(list(places))
        with ThreadPoolExecutor(workers) as threads:
            lanes = [threads.submit(self._lane, number, left) for number in range(workers)]
            try:
                while wait(lanes, 0.2).not_done:
                    self._show()
            except BaseException:
                # Without this, leaving would wait for every job.
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
        """Bring the bars up to date: in the main thread alone, so that they need no lock."""
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
    global _queue  # noqa: PLW0603  (a queue can only be handed to a process when it starts)
    _queue = queue
    torch.set_num_threads(1)
    _take_gpu(number)
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
    return work(job, lambda step: _queue.put((place, step)))
