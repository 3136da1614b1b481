"""A training step's forward and backward pass as a CUDA graph: what small networks spend on launches is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["CapturedStep"]


class CapturedStep:
    """Gives the loss of a batch and puts its gradients into ``.grad``, from the fourth batch on by replaying a graph.

    The kernels are those of the step as it is, and so are the numbers. What Python decides in the fourth batch stays
    decided: a network whose course depends on counts that are kept in Python must not be captured. As torch asks for,
    the first batches run as they are, on the stream that is captured. Batches of another shape do so at any time.

    Args:
        loss: From a batch, ``(N, *)`` and labels ``(N, *)``, to its loss, ``()``.
        parameters: What gets gradients. They are not added to those that are there.
        warm_up: Batches that run as they are; at least 1.
        record: Records what a function does, and returns what does it again: a CUDA graph's ``replay``.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        parameters: Iterable[nn.Parameter],
        *,
        warm_up: int = 3,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self._loss, self._parameters, self._left = loss, list(parameters), max(1, warm_up)
        self._record = record or _graph
        self._replay: Callable[[], None] | None = None
        self._batch: tuple[Tensor, ...] = ()
        self._gradients: list[Tensor | None] = []
        self._value = torch.empty(())
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss, detached; the gradients are in place when it returns."""
        layout = [_layout(tensor) for tensor in batch]
        if self._replay is None and self._left == 0:
            self._batch = tuple(tensor.clone() for tensor in batch)
            self._forget()
            self._replay = self._record(self._run)
            self._gradients = [parameter.grad for parameter in self._parameters]
        if self._replay is None or layout != [_layout(tensor) for tensor in self._batch]:
            self._left = max(0, self._left - 1)
            return self._as_it_is(*batch)
        for mine, tensor in zip(self._batch, batch, strict=True):
            mine.copy_(tensor)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._replay()
        return self._value.clone()

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _run(self) -> None:
        self._value = self._plain(self._batch)

    def _as_it_is(self, *batch: Tensor) -> Tensor:
        self._forget()
        device = batch[0].device
        if device.type != "cuda":
            return self._plain(batch)
        stream = self._stream = self._stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            value = self._plain(batch)
        torch.cuda.current_stream(device).wait_stream(stream)
        return value

    def _plain(self, batch: tuple[Tensor, ...]) -> Tensor:
        value = self._loss(*batch)
        value.backward()
        return value.detach()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
