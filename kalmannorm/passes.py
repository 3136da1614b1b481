"""Batches of a loader run through a network, and the statistics that its layers see in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import closing
from itertools import islice
from operator import length_hint
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kalmannorm.functional import kalman_update, observe
from kalmannorm.gaussian import Gaussian
from kalmannorm.traversal import device_of


def run_batches(model: nn.Module, loader: Iterable[Any], see: Callable[[Any], object], *, caller: str,
                max_batches: int | None, progress: bool, process_group: dist.ProcessGroup | None = None,
                title: str = "") -> None:  # fmt: skip
    """Call ``see`` with the batches of a loader, at most ``max_batches``, moved to a model's device.

    Errors name the public function ``caller``, and so does the first process's progress bar without ``title``. It is an
    error if no process of the group has a batch.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"kalmannorm.{caller} got max_batches={max_batches}, expected None or a number above 0")
    device = device_of(model)
    is_first = process_group is None or dist.get_rank(process_group) == 0
    count = 0
    with closing(_with_progress(loader, max_batches, progress and is_first, title or caller)) as batches:
        for batch in batches:
            see(_to_device(batch, device))
            count += 1
    if process_group is not None:
        of_all = torch.tensor(count, device=device)
        dist.all_reduce(of_all, group=process_group)
        count = int(of_all)
    if not count:
        raise ValueError(f"kalmannorm.{caller} got an empty loader for {type(model).__name__}, expected a batch")


def call_with(model: nn.Module, batch: Any) -> object:
    """Call a model with a batch: a tensor, a sequence that begins with the input, or keyword arguments."""
    if isinstance(batch, Mapping):
        try:
            inspect.signature(model.forward).bind(**batch)
        except TypeError as error:
            raise TypeError(
                f"the loader gave a batch with the keys {list(batch)}, expected arguments of {type(model).__name__}'s "
                f"forward ({error}); or forward=, which makes the call"
            ) from error
        return model(**batch)
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) or (isinstance(first, tuple | list) and first and isinstance(first[0], Tensor)):
        return model(first)
    held = ", ".join(type(each).__name__ for each in batch) or "nothing" if isinstance(batch, tuple | list) else ""
    raise TypeError(
        f"the loader gave a batch of type {type(batch).__name__} ({f'of {held}' if held else 'no tensor'}), expected a "
        "tensor, a tuple or list that begins with a tensor or a list of tensors, or a mapping; or forward=, which "
        "makes the call"
    )


def _to_device(value: Any, device: torch.device) -> Any:
    """Move what has a ``to`` method, in tuples, lists and mappings too."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to_device(each, device) for key, each in value.items()}
    if isinstance(value, tuple | list):
        moved = [_to_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _with_progress(loader: Iterable[Any], most: int | None, shown: bool, title: str) -> Generator[Any, None, None]:
    """The batches, at most so many, under a progress bar if one is installed."""
    batches = islice(loader, most)
    bar = _progress_bar(title) if shown else None
    if bar is None:
        yield from batches
    else:
        total = length_hint(loader) or most
        yield from bar(batches, total and min(total, most or total))


def _progress_bar(title: str) -> Callable[[Iterable[Any], int | None], Iterable[Any]] | None:
    """Wraps an iterable of a given length in a progress bar, of rich or else tqdm; None where neither is installed."""
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import track  # noqa: PLC0415
    except ImportError:
        pass
    else:
        console = Console(stderr=True)
        return lambda batches, total: track(batches, title, total, console=console, transient=True)
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        return None
    return lambda batches, total: tqdm(batches, title, total, leave=False)


class Population:
    """Mean and variance of all samples that a layer saw, ``(1, C)`` in float64, and their number."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        channels = getattr(self.layer, "num_features", 0) or self.layer.num_channels
        zeros = torch.zeros(1, channels, device=device_of(self.layer), dtype=torch.float64)
        self.statistics = Gaussian(zeros, zeros)
        self.samples = zeros.new_zeros(())

    def add(self, statistics: Gaussian, samples: int | Tensor) -> None:
        """Merge those of a batch, ``(S, C)``: an update whose gain is the batch's share of all samples."""
        self.samples = self.samples + samples
        share = samples / self.samples.clamp_min(1)
        newest = statistics.map(torch.Tensor.double).pool([0])
        self.statistics = kalman_update(self.statistics, newest, share)

    def observe(self, x: Tensor) -> None:
        """Merge those of an input ``(N, C, *)``."""
        if x.numel():
            self.add(observe(x), x.shape[0])


def merge_over_processes(populations: Collection[Population], group: dist.ProcessGroup | None) -> None:
    """Merge what the processes of a group saw, in the order of their ranks, so that all get the same numbers."""
    if group is None:
        return
    own = [torch.cat([p.samples[None], p.statistics.mean[0], p.statistics.var[0]]) for p in populations]
    sizes = [len(numbers) for numbers in own]
    mine = torch.cat([numbers.to(own[0].device) for numbers in own])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    for population, seen in zip(populations, zip(*[row.split(sizes) for row in rows], strict=True), strict=True):
        device = population.samples.device
        population.clear()
        for numbers in seen:
            mean, var = numbers[1:].to(device).chunk(2)
            population.add(Gaussian(mean[None], var[None]), numbers[0].to(device))
