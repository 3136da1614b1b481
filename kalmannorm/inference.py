"""Statistics at inference other than running averages: a batch's own, or those of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.freezing import unfrozen_layers
from kalmannorm.gaussian import Gaussian
from kalmannorm.modules import KalmanNorm, is_stock_batchnorm
from kalmannorm.passes import Population, call_with, merge_over_processes, run_batches
from kalmannorm.traversal import attributes_kept, in_eval, inputs_seen

_M = TypeVar("_M", bound=nn.Module)


@contextmanager
def online_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by the statistics of each batch in ``eval()`` (the paper's option B, Tables 4, 5, 7).

    You need it if ``eval()`` scores worse than training, above all at one image.

    Inside the ``with``, :class:`KalmanNorm` layers in ``eval()`` fuse each batch with its prior as in
    training, in groups of ``stats_batch_size`` if they have one; stock BatchNorm layers use the batch's
    statistics. Only a correction of priors that is still to come changes buffers. Frozen layers stay.

    Args:
        model: the network.

    Raises:
        ValueError: for a model without :class:`KalmanNorm` and BatchNorm layers, or with frozen ones only.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).eval()
        >>> image = 5 + torch.randn(1, 3, 16, 16)
        >>> with kn.online_statistics(model):
        ...     online = model(image)
        >>> bool(online.mean().abs() < model(image).mean().abs())
        True
    """
    layers = unfrozen_layers(model).values()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no KalmanNorm and no BatchNorm layer that is not frozen")
    kalman = [layer for layer in layers if isinstance(layer, KalmanNorm)]
    stock: list[Any] = [layer for layer in layers if is_stock_batchnorm(layer) and not layer.training]
    with attributes_kept(kalman, "online"), attributes_kept(stock, "running_mean", "running_var"):
        for layer in kalman:
            layer.online = True
        for layer in stock:  # BatchNorm without running statistics uses the batch's
            layer.running_mean = layer.running_var = None
        yield


def recalibrate(model: _M, loader: Iterable[Any], *, forward: Callable[[nn.Module, Any], object] | None = None,
                max_batches: int | None = None, progress: bool = True,
                process_group: dist.ProcessGroup | None = None) -> _M:  # fmt: skip
    """Replace running statistics by those of a data set under the present weights.

    Running averages lag behind the weights, and they are averages over the inputs of layers in training.
    In ``eval()`` inputs differ, since the layers below normalize by other statistics. In a deep network
    that was trained at one or two images the difference grows from layer to layer, and ``eval()`` may
    fail.

    This runs the data through the fixed network in ``eval()``. Each layer computes the statistics that
    it would normalize by in training, merges them with those of earlier batches, and normalizes by the
    result. So the statistics of every layer are those of its inputs in ``eval()``. Each sample has the
    same weight: the mean of the means and, by the law of total variance, the mean of the variances plus
    the variance of the means. For a first layer with ``gain=1.0`` and samples of one size, these are
    the mean and the biased variance of the data set, however it is cut into batches. Precise BatchNorm
    (Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 3) takes the inputs in training.

    Frozen layers, training flags and all other buffers stay, ``num_batches_tracked`` too. Running
    statistics change at the very end, so an error leaves them unchanged.

    Args:
        model: the network, changed in place. For ``DistributedDataParallel``, its inner module runs.
        loader: its batches, of training and of the training's size. Each is a tensor; or a tuple or list that begins
            with a tensor, or with a list of them, as torchvision's detection models take; or a mapping, called as
            ``model(**batch)``. Tensors are moved to the device of the model's first tensor.
        forward: ``forward(model, batch)`` calls the model on other batches.
        max_batches: stop after so many; None for all.
        progress: show a progress bar of rich or tqdm, if one of them is installed.
        process_group: merge over its processes, each with other data; all must call this, with equally many batches
            if layers share statistics.

    Returns:
        The model.

    Raises:
        ValueError: without a layer with running statistics that is not frozen, without a batch, or for new statistics
            that are not finite.
        TypeError: for a batch that is none of these, without ``forward``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(1)))
        >>> loader = [(torch.full((2, 1, 4, 4), pixel), "label") for pixel in (1.0, 3.0)]
        >>> model = kn.recalibrate(model, loader)
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([1.]))
    """
    network: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    layers = layers_to_recalibrate(network)
    populations = {name: _Current(layer) for name, layer in layers.items()}
    with attributes_kept(layers.values(), "running_mean", "running_var"):
        with collecting(network, populations.values(), by_running=True):
            run_batches(
                network, loader, partial(forward or call_with, network), caller="recalibrate", max_batches=max_batches,
                progress=progress, process_group=process_group,
            )  # fmt: skip
        merge_over_processes(populations.values(), process_group)
    new = _finite_statistics(populations)
    for layer in layers.values():
        if isinstance(layer, KalmanNorm):
            layer.keep_correction_target()
    with torch.no_grad():
        for buffer, value in new:
            buffer.copy_(value)
    if never := [name for name, population in populations.items() if not population.samples]:
        warnings.warn(f"layers that no batch came through keep their running statistics: {never}", stacklevel=2)
    return model


def tracking_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm and Kalman layers with running statistics that are not frozen, by name."""
    return {name: layer for name, layer in unfrozen_layers(model).items() if layer.running_mean is not None}


def layers_to_recalibrate(model: nn.Module) -> dict[str, _BatchNorm]:
    """As :func:`tracking_layers`; an error where there is none."""
    layers = tracking_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer with running statistics that is not frozen, expected a KalmanNorm or "
            "BatchNorm layer"
        )
    return layers


class _Current(Population):
    """Its layer's running statistics are those of all samples up to now."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__(layer)
        self.buffer = layer.running_mean

    def add(self, statistics: Gaussian, samples: int | Tensor) -> None:
        """Merge those of a batch, ``(S, C)``."""
        super().add(statistics, samples)
        now = self.statistics.map(lambda t: t[0].to(self.buffer))
        self.layer.running_mean, self.layer.running_var = now.mean, now.var


@contextmanager
def collecting(model: nn.Module, collectors: Iterable[Any], *, by_running: bool = False) -> Iterator[None]:
    """Run a model in ``eval()``, and give the statistics by which layers would normalize in training to collectors.

    Each has a ``layer``. Its ``observe(x)`` gets a stock layer's inputs, ``(N, C, *)``, and its
    ``add(statistics, samples)`` a Kalman layer's fused statistics, ``(S, C)``. Layers then normalize by
    these statistics, or ``by_running`` ones.
    """
    with ExitStack() as stack:
        stock, kalman = [], []
        for each in collectors:
            if isinstance(each.layer, KalmanNorm):
                each.layer.collect = each.add
                stack.callback(vars(each.layer).pop, "collect", None)
                kalman.append(each.layer)
            else:
                stock.append((each.layer, each.observe))
        way = _fusing_then_by_running(kalman) if by_running else online_statistics(model)
        with in_eval(model), inputs_seen(stock), way:
            yield


@contextmanager
def _fusing_then_by_running(layers: Iterable[KalmanNorm]) -> Iterator[None]:
    """Let layers in ``eval()`` fuse each batch, and then replace their output by that of running statistics."""

    def by_running(layer: KalmanNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        with attributes_kept([layer], "online"):
            layer.online = False
            return layer.forward(*args, **kwargs)

    with ExitStack() as stack, attributes_kept(layers, "online"):
        for layer in layers:
            layer.online = True
            stack.callback(layer.register_forward_hook(by_running, with_kwargs=True, prepend=True).remove)
        yield


def _finite_statistics(populations: Mapping[str, Population]) -> list[tuple[Tensor, Tensor]]:
    """Running statistics, and the values to write to them; an error if one is not finite in the buffer's type."""
    new = []
    for name, population in populations.items():
        if not population.samples:
            continue
        layer, found = population.layer, population.statistics.map(lambda t: t[0])
        for buffer, value in ((layer.running_mean, found.mean), (layer.running_var, found.var)):
            if not value.to(buffer).isfinite().all():
                raise ValueError(
                    f"{type(layer).__name__} {name!r} got statistics that are not finite in {buffer.dtype}, "
                    "expected finite ones; no layer was changed"
                )
            new.append((buffer, value))
    return new
