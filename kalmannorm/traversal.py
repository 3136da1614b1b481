"""Walks over a network's modules: their names, their inputs, and their state, restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.modules import KalmanLayer
from kalmannorm.propagation import first_line
from kalmannorm.recording import paused

Look = Callable[[Tensor], None]


def kalman_layers(model: nn.Module) -> Iterator[tuple[str, KalmanLayer]]:
    """Each Kalman layer of a model with its first name."""
    for name, layer in model.named_modules():
        if isinstance(layer, KalmanLayer):
            yield name, layer


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU without any."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


@contextmanager
def attributes_kept(objects: Iterable[Any], *names: str) -> Iterator[None]:
    """Restore attributes of objects afterwards."""
    before = [(each, name, getattr(each, name)) for each in objects for name in names]
    try:
        yield
    finally:
        for each, name, value in before:
            setattr(each, name, value)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers afterwards, those that other tensors have replaced too."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules() for name, buffer in module.named_buffers(recurse=False)
    ]  # fmt: skip
    try:
        yield
    finally:
        for module, name, buffer, values in before:
            setattr(module, name, buffer)
            if all(step or size < 2 for step, size in zip(buffer.stride(), buffer.shape, strict=True)):  # not expanded
                buffer.data.copy_(values)  # no change to autograd, which may have saved it


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the random state afterwards, on the CPU and on the devices of a model's parameters."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda}))


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restore training flags, buffers and the state of corrections afterwards; compiled parts run eagerly inside."""
    flags, eager = attributes_kept(model.modules(), "training"), torch.compiler.set_stance("force_eager")
    layers = [layer for _, layer in kalman_layers(model)]
    known = attributes_kept(layers, "is_corrected", "awaits_correction", "dropped_statistics", "_settled")
    with flags, known, buffers_kept(model), eager:
        yield


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Run a model in ``eval()`` without gradients, and restore its state afterwards."""
    with state_kept(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def inputs_seen(looks: Iterable[tuple[nn.Module, Look]]) -> Iterator[None]:
    """Call a function with each input of its layer before the layer runs; what it computes moves no beliefs."""

    def hook(look: Look, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with paused():
            look(args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(partial(hook, look), with_kwargs=True) for layer, look in looks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def untraceable(model: nn.Module, error: Exception, remedy: str) -> ValueError:
    """The error to raise where ``torch.fx`` cannot trace a model."""
    return ValueError(
        f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {first_line(error)}), {remedy}"
    )
