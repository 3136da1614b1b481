"""When beliefs travel: from where a network is entered to where it is left."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.propagation import Propagation, attach, current
from kalmannorm.shards import watch_shards
from kalmannorm.steps import found_in, step_of

__all__ = ["Watch"]


class Watch:
    """Opens the mode when a module is entered and closes it when the module is left.

    It sits, as two forward hooks, on every module that contains a Kalman layer; the outermost one
    entered opens the mode, the others find it open. So calling a part of a network works, and so
    does recomputing it in a checkpoint.

    Args:
        layers: the Kalman layers inside.
        input_belief: what is believed of the module's first input, if anything.
    """

    def __init__(self, layers: list[Any], input_belief: Gaussian | None = None) -> None:
        self.layers = layers
        self.input_belief = input_belief
        # Made once: torch.compile must find the mode somewhere when it breaks a graph inside.
        self.mode = Propagation(layers)

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if current() is self.mode and not _is_inside_itself(module):
            self.close(module, args, None)  # an interrupt (not an error) had kept it from closing
        if current() is None and any(layer.is_fusing for layer in self.layers):
            watch_shards(module)
            self._start_beliefs(module, args, kwargs)
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        elif (mode := current()) is not None and mode.input_belief is not None:
            mode.input_belief = _started_on_first(mode.input_belief, (*args, *kwargs.values()))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook; runs after an error too."""
        if current() is self.mode and not _is_inside_itself(module):
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _start_beliefs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the inputs, so that all that comes of them is known to depend on them."""
        values = (*args, *kwargs.values())
        self._move_belief(values)
        for tensor in found_in(values, Tensor):
            step = step_of(tensor)
            if step is None or step.source == "input":  # else from another part, whose beliefs go on here
                attach(tensor, Unknown("the network's input"), "input")
        if self.input_belief is not None:
            waiting = _started_on_first(self.input_belief, values)
            direct = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
            if waiting is not None and direct:
                raise ValueError(
                    f"input_stats given to kalmannorm.convert describe {waiting.mean.shape[0]} channels, but "
                    f"{type(module).__name__} got an input of shape {tuple(direct[0].shape)}, "
                    f"expected (N, {waiting.mean.shape[0]}, ...)"
                )
            # A detector gets its images in a list; its first part gets them as a batch.
            if waiting is not None or self.mode.input_belief is not None:
                self.mode.input_belief = waiting

    def _move_belief(self, values: Any) -> None:
        """Keep the belief where the inputs are: a copy at each call would make the device wait, and no CUDA graph may
        hold one. A compiled call makes its copy: what it changed here would be compiled again.
        """
        given = self.input_belief
        if given is None or torch.compiler.is_compiling():
            return
        device = next((t.device for t in found_in(values, Tensor) if t.is_floating_point()), None)
        if device is None or device == given.mean.device or device.type == "meta":
            return
        moved = given.map(lambda t: t.to(device))
        if type(moved.mean) is Tensor:  # and not a compiler's or an exporter's stand-in
            self.input_belief = moved


def _started_on_first(given: Gaussian, values: Any) -> Gaussian | None:
    """Start a belief about the network's input on the first tensor that has its channels, unless that has
    another; return it where there is none.
    """
    channels = given.mean.shape[0]
    for tensor in found_in(values, Tensor):
        if not tensor.is_floating_point():
            continue
        if tensor.ndim < 2 or tensor.shape[1] != channels:
            return given
        step = step_of(tensor)
        if step is None or step.belief is None or isinstance(step.belief, Unknown):
            mean, var = (t.to(tensor.device).view(1, -1, *[1] * (tensor.ndim - 2)) for t in (given.mean, given.var))
            attach(tensor, Gaussian(mean, var), "input")
        return None
    return given


def _is_inside_itself(module: nn.Module) -> bool:
    """Whether a module's hook runs in a call that the module made to itself, on its way through others."""
    if torch.compiler.is_compiling():
        return False
    calls = 0
    frame = sys._getframe()
    while frame is not None and calls < 2:
        calls += frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2
