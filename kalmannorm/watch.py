"""When beliefs travel: from where a network is entered to where it is left."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import is_transformed
from kalmannorm.propagation import Propagation, attach, current, is_resting
from kalmannorm.shards import watch_shards
from kalmannorm.steps import found_in, step_of

__all__ = ["Watch", "tensors_of"]


class Watch:
    """Opens the mode when a module is entered and closes it when the module is left.

    It sits, as two forward hooks, on every module that contains a Kalman layer; the outermost one
    entered opens the mode, the others find it open. So calling a part of a network works, and so
    does recomputing it in a checkpoint.

    Args:
        layers: the Kalman layers inside.
        given: what is believed of the module's inputs, by the names of its forward's arguments; None for a name means
            the first floating-point tensor. Mean and variance are ``(C,)``, or of one number for inputs of any shape.
        arguments: the names of its forward's positional arguments.
    """

    def __init__(self, layers: list[Any], given: Mapping[str | None, Gaussian], arguments: Sequence[str] = ()) -> None:
        self.layers = layers
        self.arguments = tuple(arguments)
        self.given = dict(given)
        self.known = self.given  # where the inputs are, and of their type
        self._warned = self._looked = False
        # Made once: torch.compile must find the mode somewhere when it breaks a graph inside.
        self.mode = Propagation(layers)

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if any(isinstance(each, fx.Proxy) for each in args):  # torch.fx traces the module
            return
        while (mode := current()) is not None and self._was_left_open(mode, module):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if current() is None and any(layer.is_fusing or layer.is_observed for layer in self.layers):
            watch_shards(module)
            self._begin(module, (*args, *kwargs, *kwargs.values()))
            if not is_resting(self.mode):
                self._start_beliefs(module, args, kwargs, self.mode)
            if not torch.compiler.is_compiling():
                self.mode.opener = module
                self._warn_of_replaced_layers(module)
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        elif mode is not None and self.given and _are_unknown_inputs((*args, *kwargs.values())):
            self._start_beliefs(module, args, kwargs, mode)  # a part knows what the whole was not told
        elif mode is not None and mode.input_belief is not None:
            mode.input_belief = _started_on_first(mode.input_belief, (*args, *kwargs.values()))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook; runs after an error too."""
        if current() is self.mode and _calls_on_the_stack(module) < 2:
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if torch.compiler.is_compiling():
                return
            self.mode.opener = None
            if output is not None and self.mode.input_belief is not None:
                self.mode.input_belief = None
                self._warn_of_unused_belief(module)

    def _begin(self, module: nn.Module, values: Any) -> None:
        """Say which priors of passes before may be used."""
        if not torch.compiler.is_dynamo_compiling():
            key, tensors = self._what_priors_depend_on(module, values)
            if key is not None or self.mode.of_threads:  # in a training none are kept
                self.mode.priors.begin(key, tensors, self.layers)

    def _what_priors_depend_on(self, module: nn.Module, values: Any) -> tuple[Any, list[Tensor]]:
        """What must be the same for priors to be the same, and the tensors among it; None where they also depend on the
        batch or on chance, or need gradients.

        An exporter gets what was kept before, as constants.
        """
        if not all(layer.keeps_priors and not layer.is_observed for layer in self.layers if layer.is_fusing):
            return None, []
        if torch.compiler.is_compiling():
            return (self.mode.priors.key if self._holds_for_export(values) else None), []
        if is_transformed() or any(each.training for each in module.modules()):  # dropout, for one
            return None, []
        tensors = tensors_of(module)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None, []
        given = list(found_in(values, Tensor))
        if any(type(t) not in (Tensor, nn.Parameter) for t in (*given, *tensors)):  # stand-ins
            return None, []
        if any(not t.is_floating_point() for t in given):  # whose values may lead to other priors
            return None, []
        if any(t.is_inference() for t in tensors):
            return None, []
        inputs = tuple((t.shape, t.dtype, t.device) for t in given)
        switched = sum(layer.times_switched for layer in self.layers)
        return (inputs, _options(values), switched, _states(tensors)), tensors

    def _holds_for_export(self, values: Any) -> bool:
        """Whether priors that were kept are still right, for inputs of any batch size. An exporter has put stand-ins in
        the place of the parameters that they depend on.
        """
        if self.mode.priors.key is None or not torch.compiler.is_exporting():
            return False
        inputs, options, switched, states = self.mode.priors.key
        tensors = [t for ref in self.mode.priors.tensors if (t := ref()) is not None]
        if _states(tensors) != states:
            return False
        given = list(found_in(values, Tensor))
        sizes = [(size, known) for t, (shape, _, _) in zip(given, inputs, strict=False)
                 for size, known in zip(t.shape[1:], shape[1:], strict=False)]  # fmt: skip
        return (
            [t.ndim for t in given] == [len(shape) for shape, _, _ in inputs]
            and all(type(size) is int and size == known for size, known in sizes)
            and options == _options(values)
            and switched == sum(layer.times_switched for layer in self.layers)
        )

    def _was_left_open(self, mode: Propagation, module: nn.Module) -> bool:
        """Whether an interrupt (an error closes it) has kept a mode from closing: who opened it is not being called."""
        if torch.compiler.is_compiling() or mode.opener is None:
            return False
        if mode is self.mode:
            return _calls_on_the_stack(module) < 2
        # Looked for only where another network is called: the parts of one find its mode open all the time.
        return self.layers[0] not in mode.layers and _calls_on_the_stack(mode.opener) == 0

    def _warn_of_replaced_layers(self, module: nn.Module) -> None:
        """At the first call: functions that replace BatchNorm layers take Kalman layers for such."""
        if self._looked:
            return
        self._looked = True
        inside = set(module.modules())
        gone = [layer for layer in self.layers if layer not in inside]
        if gone:
            remedy = "connect" if len(gone) < len(self.layers) else "to_batchnorm"
            warnings.warn(
                f"{len(gone)} of {len(self.layers)} Kalman layers of {type(module).__name__} were replaced after "
                f"kalmannorm.convert, the first is {gone[0].layer_name!r}. SyncBatchNorm.convert_sync_batchnorm does "
                "so: call it before kalmannorm.convert, which then shares statistics between processes. If the "
                f"replacement is meant, call kalmannorm.{remedy}(model)",
                stacklevel=2,
            )

    def _warn_of_unused_belief(self, module: nn.Module) -> None:
        if self._warned or None not in self.given:
            return
        self._warned = True
        channels = self.given[None].mean.numel()
        warnings.warn(
            f"input_stats given to kalmannorm.convert describe {channels} channels, but {type(module).__name__} got no "
            f"tensor of shape (N, {channels}, ...) that could be found, in lists, mappings and dataclasses too: the "
            "first layer has no prior",
            stacklevel=2,
        )

    def _start_beliefs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                       mode: Propagation) -> None:  # fmt: skip
        """Mark the inputs, so that all that comes of them is known to depend on them."""
        values = (*args, *kwargs.values())
        self._move_beliefs(values)
        # More positional arguments than names are those of `*args`.
        names = [*(*self.arguments, *map(str, range(len(self.arguments), len(args))))[: len(args)], *kwargs]
        for name, value in zip(names, values, strict=True):
            belief = self.known.get(name)
            for place, tensor in _tensors_in(name, value):
                if not (tensor.is_floating_point() or tensor.is_complex()):
                    continue  # indices, masks and classes are constants
                step = step_of(tensor)
                if step is not None and step.source != "input":
                    continue  # from another part, whose beliefs go on here
                known: Gaussian | Unknown = Unknown(f"the network's input {place!r}")
                if belief is not None and _fits(belief, tensor):
                    known = _laid_out(belief, tensor)
                elif belief is not None and tensor is value:
                    raise _misfit(belief, tensor, f"an input {place!r}", module)
                elif belief is not None:  # a list of images
                    mode.input_belief = belief
                attach(tensor, known, "input")
        if None in self.known:
            waiting = _started_on_first(self.known[None], values)
            direct = [t for t in values if isinstance(t, Tensor) and t.is_floating_point()]
            if waiting is not None and direct and waiting.mean.ndim:
                raise _misfit(waiting, direct[0], "an input", module)
            # A detector gets its images in a list; its first part gets them as a batch.
            if waiting is not None or mode.input_belief is not None:
                mode.input_belief = waiting

    def _move_beliefs(self, values: Any) -> None:
        """Keep the beliefs where the inputs are: a copy at each call would make the device wait, and no CUDA graph may
        hold one. A compiled call makes its copy: what it changed here would be compiled again.
        """
        if not self.given or torch.compiler.is_compiling():
            return
        tensor = next((t for t in found_in(values, Tensor) if t.is_floating_point()), None)
        if tensor is None or tensor.is_meta:
            return
        device, dtype = tensor.device, torch.promote_types(tensor.dtype, torch.float32)
        if all((device, dtype) == (known.mean.device, known.mean.dtype) for known in self.known.values()):
            return
        with torch.inference_mode(False):  # a later pass may need gradients
            moved = {name: belief.map(lambda t: t.to(device, dtype)) for name, belief in self.given.items()}
        if all(type(belief.mean) is Tensor for belief in moved.values()):  # and not a compiler's or exporter's stand-in
            self.known = moved


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, of one that is used twice each time; faster than torch's own walk."""
    return [t for each in module.modules() for t in (*each._parameters.values(), *each._buffers.values())
            if t is not None]  # fmt: skip


def _tensors_in(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """As :func:`found_in`, each with where it is: ``batch['image']``."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _tensors_in(f"{place}[{i}]", each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors_in(f"{place}[{key!r}]", each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors_in(f"{place}.{field.name}", getattr(value, field.name, None))


def _options(values: Any) -> tuple[Any, ...]:
    """By which a forward may take another course."""
    return tuple(found_in(values, bool | int | float | str))


def _states(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What changes where tensors change."""
    return tuple([(t._version, t.data_ptr()) for t in tensors])


def _started_on_first(given: Gaussian, values: Any) -> Gaussian | None:
    """Start a belief about the network's input on the first tensor that has its channels, unless that has
    another; return it where there is none. One of single numbers starts on the first argument of two or more axes.
    """
    anywhere = given.mean.ndim == 0
    for tensor in values if anywhere else found_in(values, Tensor):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.ndim < 2 or not _fits(given, tensor):
            return given
        step = step_of(tensor)
        if step is None or step.belief is None or isinstance(step.belief, Unknown):
            attach(tensor, _laid_out(given, tensor), "input")
        return None
    return given


def _are_unknown_inputs(values: Any) -> bool:
    steps = [step_of(tensor) for tensor in found_in(values, Tensor)]
    return any(step is not None and step.source == "input" and isinstance(step.belief, Unknown) for step in steps)


def _fits(given: Gaussian, tensor: Tensor) -> bool:
    return given.mean.ndim == 0 or (tensor.ndim >= 2 and tensor.shape[1] == len(given.mean))


def _misfit(given: Gaussian, tensor: Tensor, which: str, module: nn.Module) -> ValueError:
    channels = len(given.mean)
    return ValueError(
        f"input_stats given to kalmannorm.convert describe {channels} channels, but {type(module).__name__} got "
        f"{which} of shape {tuple(tensor.shape)}, expected (N, {channels}, ...)"
    )


def _laid_out(given: Gaussian, tensor: Tensor) -> Gaussian:
    """``(C,)`` as ``(1, C, 1, ...)``, of the tensor's rank; one number as size 1 along each axis."""
    dtype, shape = torch.promote_types(tensor.dtype, torch.float32), [1] * tensor.ndim
    if given.mean.ndim:
        shape[1] = -1
    return given.map(lambda t: t.to(tensor.device, dtype).view(shape))


def _calls_on_the_stack(module: nn.Module) -> int:
    """How many calls of a module are under way, up to 2: it may call itself, on its way through others."""
    if torch.compiler.is_compiling():
        return 1
    calls, least = 0, 0
    frame = sys._getframe()
    while frame is not None and calls < 2:
        name = frame.f_code.co_name
        calls += name == "_call_impl" and frame.f_locals.get("self") is module
        if name.startswith("torch_dynamo_resume"):  # where a graph was broken, a call may have lost its frame
            least = 1
        frame = frame.f_back  # type: ignore[assignment]
    return max(calls, least)
