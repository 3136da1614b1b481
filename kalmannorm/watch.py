"""The hooks that open the recording mode when a network is entered, and close it when the network is left."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import is_transformed
from kalmannorm.priors import may_be_kept
from kalmannorm.recording import Recorder, attach, current, fits, is_made, is_resting, laid_out, started_on_first
from kalmannorm.shards import watch_shards
from kalmannorm.steps import found_in, placed_in, step_of

# So many layers may be without a prior in a small network.
_FEW = 2


class Watch:
    """Opens the mode when a module is entered and closes it when the module is left.

    Every module that contains a Kalman layer has its two hooks. The outermost module opens the mode, the others find
    it open. So a part of a network can be called by itself, or be recomputed in a checkpoint.

    Args:
        layers: the Kalman layers inside.
        given: the beliefs about the module's inputs, by arguments' names, or None for the first floating-point tensor.
            Mean and variance are ``(C,)``, or one number for inputs of any shape.
        arguments: the names of its forward's positional arguments.
        name: of the module in the network, which the layers' names begin with.
    """

    _warned = _looked = _counted = False  # what is said once

    def __init__(self, layers: list[Any], given: Mapping[str | None, Gaussian], arguments: Sequence[str] = (),
                 name: str = "") -> None:  # fmt: skip
        self.prefix = f"{name}." if name else ""
        self.layers = layers
        self.arguments = tuple(arguments)
        self.given = dict(given)
        self.known = self.given  # on the inputs' device, and of their type
        # Made once, as torch.compile looks for the mode again when it breaks a graph inside.
        self.mode = Recorder(layers)

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if any(isinstance(each, fx.Proxy) for each in args):  # torch.fx traces the module
            return
        while (mode := current()) is not None and self._was_left_open(mode, module):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if current() is None and any(layer.is_fusing or layer.is_observed for layer in self.layers):
            watch_shards(module)
            if not torch.compiler.is_dynamo_compiling():
                self._begin(module, (*args, *kwargs, *kwargs.values()))
            if not is_resting(self.mode):
                self._start_beliefs(module, args, kwargs, self.mode)
            if not torch.compiler.is_compiling():
                self.mode.opener = module
                self.mode.without_prior.clear()  # where an interrupt has left some
                self.mode.passes[threading.get_ident()] = []
                self._warn_of_replaced_layers(module)
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        elif mode is not None and self.given and self._knows_more(args, kwargs):
            self._start_beliefs(module, args, kwargs, mode)  # `input_stats` were given to this part alone
        elif mode is not None and mode.waiting and (waiting := mode.await_input(None)) is not None:
            mode.await_input(started_on_first(waiting, (*args, *kwargs.values()), inside=True))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook; runs after an error too, which leaves no output."""
        if current() is not self.mode or _calls_on_the_stack(module) >= 2:
            return
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling():
            return
        self.mode.end_pass()
        waiting = self.mode.await_input(None)
        if output is not None and waiting is not None:
            self._warn_of_unused_belief(waiting, module)
        if output is not None and module.training and not self._counted:
            self._warn_of_few_priors(module)
        self.mode.without_prior.clear()

    def _begin(self, module: nn.Module, values: Any) -> None:
        """Find out which kept priors this pass may use. A network that only trains never keeps any."""
        may_keep = may_be_kept(self.layers)
        if may_keep or self.mode.of_threads:
            self.mode.priors.begin(module, self.layers, values, may_keep)

    def _was_left_open(self, mode: Recorder, module: nn.Module) -> bool:
        """Whether an interrupt has kept a mode from closing: the module that opened it is not being called."""
        if torch.compiler.is_compiling() or mode.opener is None:
            return False
        if mode is self.mode:
            return _calls_on_the_stack(module) < 2
        # Looked for only where another network is called, as the parts of one always find its mode open.
        return self.layers[0] not in mode.layers and _calls_on_the_stack(mode.opener) == 0

    def _warn_of_replaced_layers(self, module: nn.Module) -> None:
        """Warn once: functions that replace BatchNorm layers replace Kalman layers too."""
        if self._looked or getattr(module, "_is_replica", False):  # of DataParallel, whose layers are copies
            return
        self._looked = True
        inside = dict(module.named_modules())
        stay = set(inside.values())
        gone = [layer for layer in self.layers if layer not in stay]
        there = (inside.get(layer.layer_name.removeprefix(self.prefix)) for layer in gone)
        found = [each for part in there if part is not None for each in part.modules()]
        if not any(isinstance(each, _BatchNorm) or "Norm" in type(each).__name__ for each in found):
            return  # removed, as a head that is not wanted
        has_stock = any(isinstance(each, _BatchNorm) and not hasattr(each, "layer_name") for each in stay)
        new = "kalmannorm.convert(model) converts the new ones. " if has_stock else ""
        remedy = "connect" if len(gone) < len(self.layers) else "to_batchnorm"
        acts = ", with their activations, which kalmannorm.freeze would keep" if hasattr(gone[0], "act") else ""
        warnings.warn(
            f"{len(gone)} of {len(self.layers)} Kalman layers of {type(module).__name__} were replaced after "
            f"kalmannorm.convert, the first is {gone[0].layer_name!r}{acts}. SyncBatchNorm.convert_sync_batchnorm does "
            f"so: call it before kalmannorm.convert, which then shares statistics between processes. {new}If the "
            f"replacement is meant to stay, call kalmannorm.{remedy}(model)",
            stacklevel=2,
        )

    def _warn_of_few_priors(self, module: nn.Module) -> None:
        """Warn once, in training: a function without a rule may end the beliefs of a whole network."""
        without, self._counted = self.mode.without_prior, True
        if len(without) > max(_FEW, len(self.layers) / 2):
            name, reason = next(reversed(without.items()))
            warnings.warn(
                f"{len(without)} of {len(self.layers)} Kalman layers of {type(module).__name__} have no prior and act "
                f"as stock layers, such as {name!r}: {reason}. kalmannorm.describe(model, x) shows all",
                stacklevel=2,
            )

    def _warn_of_unused_belief(self, given: Gaussian, module: nn.Module) -> None:
        if self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        channels = given.mean.numel()
        warnings.warn(
            f"input_stats describe {channels} channels, but {type(module).__name__} got no tensor of shape "
            f"(N, {channels}, ...) that could be found, in lists, mappings and dataclasses too: the first layer has no "
            "prior",
            stacklevel=2,
        )

    def _start_beliefs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Recorder) -> None:
        """Attach a belief to each input, `Unknown` where none was given, so that steps lead back to it."""
        values = (*args, *kwargs.values())
        self._move_beliefs(values)
        # More positional arguments than names are those of `*args`.
        names = [*(*self.arguments, *map(str, range(len(self.arguments), len(args))))[: len(args)], *kwargs]
        unmet = dict(self.known)
        for name, value in zip(names, values, strict=True):
            for place, tensor in placed_in(name, value, Tensor):
                if tensor.is_floating_point() or tensor.is_complex():  # indices, masks and classes are constants
                    key = place if place in self.known else name
                    unmet.pop(key, None)
                    if not _start_belief(tensor, self.known.get(key), place):
                        if tensor is value or key != name:
                            raise _misfit(self.known[key], tensor, f"an input {place!r}", module)
                        mode.await_input(self.known[key])  # a list of images
        if unmet and None not in self.known and len(unmet) == len(self.known):
            self._warn_of_unused_belief(next(iter(unmet.values())), module)
        if None in self.known:
            waiting = started_on_first(self.known[None], values)
            direct = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
            if waiting is not None and direct and waiting.mean.ndim:
                raise _misfit(waiting, direct[0], "an input", module)
            # A detector gets its images in a list, and its first part gets them as a batch.
            mode.await_input(waiting)

    def _knows_more(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a part was told of an input of which the network around it knows nothing, as of noise made there."""
        tensors = [t for t in found_in((args, kwargs), Tensor) if t.is_floating_point()]
        if any(map(_is_unknown, tensors)):
            return True
        values = (*zip(self.arguments, args, strict=False), *kwargs.items())
        named = found_in([value for name, value in values if name in self.known], Tensor)
        told = tensors[:1] if None in self.known else named
        return any(step_of(t) is None and not is_made(t) and type(t) is not nn.Parameter for t in told)

    def _move_beliefs(self, values: Any) -> None:
        """Keep the given beliefs on the inputs' device: a copy at each call would wait, and a CUDA graph allows none. A
        compiled call makes a copy, as a change here would compile it again.
        """
        if not self.given or is_transformed():  # torch.func makes wrappers that end with the call
            return
        floating = (t for t in found_in(values, Tensor) if t.is_floating_point())
        tensor = next(floating, next(found_in(values, Tensor), None))  # of bytes where there are no others
        if tensor is None or tensor.is_meta:
            return
        device, dtype = tensor.device, torch.promote_types(tensor.dtype, torch.float32)
        if all((device, dtype) == (known.mean.device, known.mean.dtype) for known in self.known.values()):
            return
        with torch.inference_mode(False):  # a later pass may need gradients
            moved = {name: belief.map(lambda t: t.to(device, dtype)) for name, belief in self.given.items()}
        if all(type(belief.mean) is Tensor for belief in moved.values()):  # and not a compiler's or exporter's stand-in
            self.known = moved


def _start_belief(tensor: Tensor, given: Gaussian | None, place: str) -> bool:
    """Attach ``given`` to an input, or :class:`Unknown`. Returns False if ``given`` does not fit the input."""
    can = given is None or fits(given, tensor)
    step = step_of(tensor)
    if step is not None and step.source != "input" and (given is None or not _is_unknown(tensor)):
        return True  # the output of another part of the network
    known = None if given is None or not can else laid_out(given, tensor)
    attach(tensor, known or Unknown(f"the network's input {place!r}"), "input")
    return can


def _is_unknown(tensor: Tensor) -> bool:
    """Whether nothing is believed of an input, or of what the network has made of one."""
    step = step_of(tensor)
    return step is not None and isinstance(step.belief, Unknown)


def _misfit(given: Gaussian, tensor: Tensor, which: str, module: nn.Module) -> ValueError:
    channels = len(given.mean)
    return ValueError(
        f"input_stats describe {channels} channels, but {type(module).__name__} got {which} of shape "
        f"{tuple(tensor.shape)}, expected (N, {channels}, ...), or one number for all channels"
    )


def _calls_on_the_stack(module: nn.Module) -> int:
    """The number of calls of a module in progress, at most 2: a module may call itself, through others."""
    if torch.compiler.is_compiling():
        return 1
    calls, least = 0, 0
    frame = sys._getframe()
    while frame is not None and calls < 2:
        name = frame.f_code.co_name
        calls += name == "_call_impl" and frame.f_locals.get("self") is module
        if name.startswith("torch_dynamo_resume"):  # behind a graph break a call may have lost its frame
            least = 1
        frame = frame.f_back  # type: ignore[assignment]
    return max(calls, least)
