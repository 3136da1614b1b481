"""Statistics at inference other than the running ones: a batch's own, or those of all data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from operator import length_hint
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.freezing import is_frozen
from kalmannorm.functional import kalman_update, observe
from kalmannorm.gaussian import Gaussian
from kalmannorm.modules import KalmanNorm, is_stock_batchnorm
from kalmannorm.propagation import paused

__all__ = ["online_statistics", "recalibrate"]

_M = TypeVar("_M", bound=nn.Module)


@contextmanager
def online_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the statistics of each batch in ``eval()`` (the paper's option B, Tables 4, 5, 7).

    You need it where ``eval()`` scores worse than training, at one image above all.

    Inside the ``with``, :class:`KalmanNorm` layers in ``eval()`` fuse each batch with its prior as in
    training, by groups of ``stats_batch_size`` if they have it; stock BatchNorm layers use the batch's
    statistics. No buffer changes. Layers in training are left alone, and so are frozen ones.

    Args:
        model: the network.

    Raises:
        ValueError: where the model has no layer with running statistics, or only frozen ones.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).eval()
        >>> image = 5 + torch.randn(1, 3, 16, 16)
        >>> with kn.online_statistics(model):
        ...     online = model(image)
        >>> bool(online.mean().abs() < model(image).mean().abs())
        True
    """
    kalman = [m for m in model.modules() if isinstance(m, KalmanNorm) and not is_frozen(m)]
    batch: list[Any] = [m for m in model.modules() if is_stock_batchnorm(m) and not is_frozen(m)]
    if not kalman and not batch:
        raise ValueError(f"{type(model).__name__} has no KalmanNorm and no BatchNorm layer that is not frozen")
    was_online = [layer.online for layer in kalman]
    # A BatchNorm layer without running statistics uses the batch's.
    kept = [(layer, layer.running_mean, layer.running_var) for layer in batch if not layer.training]
    for layer in kalman:
        layer.online = True
    for stock, _, _ in kept:
        stock.running_mean = stock.running_var = None
    try:
        yield
    finally:
        for layer, online in zip(kalman, was_online, strict=True):
            layer.online = online
        for stock, mean, var in kept:
            stock.running_mean, stock.running_var = mean, var


def recalibrate(model: _M, loader: Iterable[Any], *, forward: Callable[[nn.Module, Any], object] | None = None,
                max_batches: int | None = None, progress: bool = True,
                process_group: dist.ProcessGroup | None = None) -> _M:  # fmt: skip
    """Replace running statistics by those of a whole data set, under the weights as they are now.

    Running averages trail behind the weights. This runs the data through the fixed network, each
    :class:`KalmanNorm` layer fusing every batch with its prior as in training (and each stock BatchNorm
    layer using the batch's statistics), and merges what they were normalized by: the mean of the means,
    and by the law of total variance the mean of the variances plus the variance of the means. Each
    sample counts the same; where a layer's prior has no say (``gain=1.0``) and all samples have the same
    size, the result is the mean and the biased variance of the data set, however it is cut into
    batches. After Wu and Johnson, *Rethinking "Batch" in BatchNorm* (2021), section 3 (Precise BatchNorm).

    All else runs in ``eval()`` and keeps its state. Frozen layers keep their statistics and normalize by
    them. ``num_batches_tracked`` stays: it counts the batches of training. Training flags are restored,
    and buffers change at the very end only, so an error leaves the model as it was.

    Args:
        model: the network, changed in place. Of ``DistributedDataParallel``, the module inside is run.
        loader: its batches. Each is an input (a tensor); or a tuple or list that begins with the input
            (a tensor, or a list of them, as torchvision's detection models take); or a mapping, called
            as ``model(**batch)``. Tensors are moved to the device of the model's first tensor. Use
            training batches, of the training's batch size.
        forward: ``forward(model, batch)`` makes the call, for other batches.
        max_batches: stop after so many; None for all.
        progress: show a progress bar, by rich or else tqdm, if one of them is installed.
        process_group: merge over its processes, each of which saw other data; all must call this. Layers
            with a ``process_group`` of their own share every batch: their processes need equally many.

    Returns:
        The model.

    Raises:
        ValueError: where no layer has running statistics that are not frozen, where there is no batch,
            or where a layer's new statistics are not finite.
        TypeError: for a batch that is none of these, without ``forward``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(1)))
        >>> loader = [(torch.full((2, 1, 4, 4), pixel), "label") for pixel in (1.0, 3.0)]
        >>> model = kn.recalibrate(model, loader)
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([1.]))
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"kalmannorm.recalibrate got max_batches={max_batches}, expected None or a number above 0")
    network: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    populations = populations_of(network)
    device = next(iter([*network.parameters(), *network.buffers()])).device
    call = forward or call_with
    shown = progress and (process_group is None or dist.get_rank(process_group) == 0)
    batches = 0
    shown_batches = with_progress(loader, max_batches, shown, "recalibrate")
    with collecting(network, populations), closing(shown_batches):
        for batch in shown_batches:
            call(network, to_device(batch, device))
            batches += 1
    if process_group is not None:
        populations, batches = merge_over_processes(populations, batches, process_group)
    if batches == 0:
        raise ValueError(f"kalmannorm.recalibrate got an empty loader for {type(network).__name__}, expected a batch")
    new = _finite_statistics(populations)
    with torch.no_grad():
        for buffer, value in new:
            buffer.copy_(value)
    never = [name for name, population in populations.items() if not population.samples]
    if never:
        warnings.warn(f"layers that no batch came through keep their running statistics: {never}", stacklevel=2)
    return model


class Population:
    """What a layer saw of the data so far: mean and variance, ``(1, C)`` in float64, of so many samples."""

    def __init__(self, layer: _BatchNorm, running_mean: Tensor, running_var: Tensor) -> None:
        self.layer = layer
        self.running_mean = running_mean
        self.running_var = running_var
        zeros = torch.zeros(1, len(running_mean), device=running_mean.device, dtype=torch.float64)
        self.statistics = Gaussian(zeros, zeros)
        self.samples = zeros.new_zeros(())

    def empty(self) -> Population:
        """One for the same layer that has seen nothing."""
        return Population(self.layer, self.running_mean, self.running_var)

    def add(self, statistics: Gaussian, samples: int | Tensor) -> None:
        """Merge those of a batch, ``(S, C)``: an update whose gain is the batch's share of all samples."""
        self.samples = self.samples + samples
        share = samples / self.samples.clamp_min(1)
        newest = statistics.map(torch.Tensor.double).pool([0])
        self.statistics = kalman_update(self.statistics, newest, share)

    def observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a stock layer."""
        x: Tensor = args[0] if args else kwargs["input"]
        if x.numel():
            with paused():
                self.add(observe(x), x.shape[0])


def populations_of(model: nn.Module) -> dict[str, Population]:
    """An empty one for each layer to recalibrate."""
    populations = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and not is_frozen(layer):
            mean, var = layer.running_mean, layer.running_var
            if mean is not None and var is not None:
                populations[name] = Population(layer, mean, var)
    if not populations:
        raise ValueError(
            f"{type(model).__name__} has nothing to recalibrate: expected a KalmanNorm or BatchNorm layer "
            "with running statistics that is not frozen"
        )
    return populations


@contextmanager
def collecting(model: nn.Module, populations: dict[str, Population]) -> Iterator[None]:
    """Run a model in ``eval()`` by online statistics, which are added to ``populations``.

    What was compiled runs eagerly: one pass is not worth compiling it anew.
    """
    training = {module: module.training for module in model.modules()}
    handles = []
    try:
        model.eval()
        for population in populations.values():
            layer = population.layer
            if isinstance(layer, KalmanNorm):
                layer.collect = population.add
            else:
                handles.append(layer.register_forward_pre_hook(population.observe, with_kwargs=True))
        with online_statistics(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for population in populations.values():
            population.layer.__dict__.pop("collect", None)
        for handle in handles:
            handle.remove()


def call_with(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) or (isinstance(first, tuple | list) and first and isinstance(first[0], Tensor)):
        return model(first)
    raise TypeError(
        f"the loader gave a batch of type {type(batch).__name__} ({_kinds(batch)}), expected a tensor, a "
        "tuple or list that begins with a tensor or a list of tensors, or a mapping; or forward=, which makes the call"
    )


def _kinds(batch: Any) -> str:
    if not isinstance(batch, tuple | list):
        return "no tensor"
    return "of " + (", ".join(type(each).__name__ for each in batch) or "nothing")


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in tuples, lists and mappings, and what else can be moved."""
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(each, device) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[to_device(each, device) for each in value])
    if isinstance(value, tuple | list):
        return type(value)([to_device(each, device) for each in value])
    return value


def with_progress(loader: Iterable[Any], most: int | None, shown: bool, title: str) -> Generator[Any, None, None]:
    """The batches, at most so many, with a progress bar where one is installed."""
    batches = islice(loader, most)
    bar = _progress_bar(title) if shown else None
    if bar is None:
        yield from batches
    else:
        total = length_hint(loader) or most
        yield from bar(batches, total and min(total, most or total))


def _progress_bar(title: str) -> Callable[[Iterable[Any], int | None], Iterable[Any]] | None:
    """What shows how far an iterable is, given how long it is; of the libraries that are there."""
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


def merge_over_processes(populations: dict[str, Population], batches: int,
                         group: dist.ProcessGroup) -> tuple[dict[str, Population], int]:  # fmt: skip
    """What all processes saw, merged in the order of their ranks, so the same in each; and how many batches."""
    parts = [t for p in populations.values() for t in (p.samples[None], p.statistics.mean[0], p.statistics.var[0])]
    parts.append(parts[0].new_tensor([batches]))
    mine = torch.cat([t.to(parts[0].device) for t in parts])
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, mine, group=group)
    merged = {name: population.empty() for name, population in populations.items()}
    for row in rows:
        pieces = iter(row.split([len(t) for t in parts]))
        for population in merged.values():
            samples, mean, var = (next(pieces).to(population.samples.device) for _ in range(3))
            population.add(Gaussian(mean[None], var[None]), samples[0])
    return merged, int(sum(row[-1] for row in rows))


def _finite_statistics(populations: dict[str, Population]) -> list[tuple[Tensor, Tensor]]:
    """Buffers, and what is to be written to them."""
    new = []
    for name, population in populations.items():
        if not population.samples:
            continue
        found = population.statistics
        for buffer, value in ((population.running_mean, found.mean[0]), (population.running_var, found.var[0])):
            value = value.to(buffer)
            if not value.isfinite().all():
                raise ValueError(
                    f"{type(population.layer).__name__} {name!r} got statistics that are not finite in {buffer.dtype}, "
                    "expected finite ones; no layer was changed"
                )
            new.append((buffer, value))
    return new
