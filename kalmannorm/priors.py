"""The prior that a layer fuses with, and those that `eval()` computes once and keeps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.autograd import is_exporting, is_transformed
from kalmannorm.kernels.formulas import at_least_float32, noise_share
from kalmannorm.steps import SCALARS, found_in, step_of

# The process noise ``R`` that a layer begins with, as a share of the prior's variance.
INITIAL_NOISE = 0.01


def noise_ratio(noise: Tensor) -> Tensor:
    """``R`` over the prior's variance, ``(C,)``, in float32 at least, from the parameter ``process_noise``."""
    return noise_share(at_least_float32(noise), INITIAL_NOISE)


def with_noise(belief: Gaussian, noise: Tensor | None) -> Gaussian:
    """A prior, ``(S, C)``, with the process noise of the parameter ``process_noise``, if there is one."""
    return belief if noise is None else Gaussian(belief.mean, belief.var * (1 + noise_ratio(noise)))


class Prior(NamedTuple):
    """The prior as a layer's kernel takes it."""

    belief: Gaussian | None  # in a shape of `kalmannorm.propagation.belief_for`; None where it is unknown
    noise: Tensor | None  # the parameter of its process noise, (C,)
    shift: Tensor | None = None  # its correction, (C,), as `kalmannorm.kernels.arguments.Given` has it
    scale: Tensor | None = None

    def corrected(self, groups: int) -> Gaussian | None:
        """Mean and variance, ``(S, C)``, with process noise and corrected."""
        if self.belief is None:
            return None
        belief = with_noise(self.belief.per_channel(groups), self.noise)
        if self.shift is None or self.scale is None:
            return belief
        return Gaussian(belief.mean + self.shift, belief.var * self.scale)

    def copied(self) -> Prior:
        """Without gradients, in memory of its own."""
        belief = None if self.belief is None else self.belief.detach().map(Tensor.clone).packed()
        return Prior(belief, *(None if t is None else t.detach().clone() for t in self[1:]))


class KeptPriors:
    """Priors that depend on parameters alone, kept from one forward pass to the next, by layer and number of its call.

    The next pass uses them if parameters, buffers, shapes of inputs, and numbers and strings among the arguments stay.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, int], Prior] = {}
        self.key: Any = None
        self.tensors: list[weakref.ref[Tensor]] = []
        self.layers: Sequence[Any] = ()
        self.calls: dict[Any, int] = {}
        self.are_used = False
        self.are_complete = False

    def begin(self, module: nn.Module, layers: Sequence[Any], values: Any, may_keep: bool) -> None:
        """Begin a pass: a call of a network with these values; ``may_keep`` is :func:`may_be_kept` of its layers.

        Kept priors are complete if the last pass called each layer that fuses exactly once: no error ended it, and
        inputs did not change its course. Then nothing is recorded.
        """
        tensors: list[Tensor] = []
        if not may_keep:
            key = None
        elif torch.compiler.is_compiling():  # an exporter gets the kept priors, as constants
            key = self.key if self._hold_for_export(module, layers, values) else None
        else:
            tensors = tensors_of(module)
            key = _what_they_depend_on(module, tensors, layers, values)
        now = [*map(id, tensors)]
        is_same = [id(ref()) for ref in self.tensors] == now  # and no later tensor in the memory of one that is gone
        if not torch.compiler.is_compiling() and (key is None or not is_same):
            self.kept, self.key = {}, None  # a step may follow, and some leave no trace in `_version`
        once = {layer: 1 for layer in layers if layer.is_fusing and not layer.ignores_prior}
        self.are_complete = key is not None and key == self.key and self.calls == once
        self.layers, self.calls, self.are_used = layers, {}, key is not None
        if self.are_used and key != self.key:
            self.kept, self.key, self.tensors = {}, key, [weakref.ref(t) for t in tensors]

    def of(self, layer: Any, compute: Callable[[], Prior]) -> Prior:
        """The prior of a layer's next call in this pass."""
        place = layer, self.calls.get(layer, 0)
        self.calls[layer] = place[1] + 1
        if place in self.kept:
            return self.kept[place]
        if layer not in self.layers:  # of a network that is no part of this one: the key does not see its tensors
            return compute()
        if self.are_complete:
            # Called once in the recorded pass, and more often in this one: the belief about this input is unknown.
            return self.kept[layer, 0]
        prior = compute()
        if torch.compiler.is_compiling():  # an exporter's stand-ins
            return prior
        with torch.inference_mode(False):
            self.kept[place] = prior.copied()
        return self.kept[place]

    def _hold_for_export(self, module: nn.Module, layers: Sequence[Any], values: Any) -> bool:
        """Whether the kept priors are still right, for inputs of any batch size; parameters are an exporter's now."""
        if self.key is None or not is_exporting():
            return False
        inputs, course, switched, states = self.key
        given = list(found_in(values, Tensor))
        sizes = [(size, known) for t, (shape, _, _) in zip(given, inputs, strict=False)
                 for size, known in zip(t.shape[1:], shape[1:], strict=False)]  # fmt: skip
        return (
            [t.ndim for t in given] == [len(shape) for shape, _, _ in inputs]
            and all(type(size) is int and size == known for size, known in sizes)
            and course == _course(values)
            and switched == _switched(module, layers)
            and states == _states(t for ref in self.tensors if (t := ref()) is not None)
        )


def may_be_kept(layers: Sequence[Any]) -> bool:
    """Whether each layer that fuses uses a prior that depends on parameters alone. In training none does."""
    return all(layer.keeps_priors and not layer.is_observed for layer in layers if layer.is_fusing)


def _what_they_depend_on(module: nn.Module, tensors: Sequence[Tensor], layers: Sequence[Any], values: Any) -> Any:
    """Equal for two passes with equal priors; None if priors depend on the batch or on chance, or need gradients."""
    if is_transformed() or any(each.training for each in module.modules()):  # dropout, for one
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if (course := _course(values)) is None:
        return None
    given = list(found_in(values, Tensor))
    if any(type(t) not in (Tensor, nn.Parameter) for t in (*given, *tensors)):  # stand-ins
        return None
    if any((step := step_of(t)) is not None and step.source != "input" for t in given):
        return None  # another network's output, with a belief of its own
    # Integers' values may lead to other priors. Changes of inference tensors are not counted.
    if any(not t.is_floating_point() for t in given) or any(t.is_inference() for t in tensors):
        return None
    inputs = tuple((t.shape, t.dtype, t.device) for t in given)
    return inputs, course, _switched(module, layers), _states(tensors)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, those of a shared one repeatedly; faster than torch's own walk."""
    return [t for each in module.modules() for t in (*each._parameters.values(), *each._buffers.values())
            if t is not None]  # fmt: skip


def _course(value: Any) -> Any:
    """What a pass's course may depend on: its arguments without tensors' values; None if some cannot be compared."""
    if isinstance(value, Mapping):
        return None if (course := _course([*value.values()])) is None else (*value, course)
    if isinstance(value, tuple | list):
        courses = [_course(each) for each in value]
        return None if None in courses else courses
    if isinstance(value, Tensor):
        return Tensor
    return (type(value), value) if type(value) in SCALARS else None


def _switched(module: nn.Module, layers: Sequence[Any]) -> tuple[float, ...]:
    """Differs once a layer's training flag or ``eps`` was set, or a hook was added or removed."""
    hooks = [key for each in module.modules() for key in (*each._forward_pre_hooks, *each._forward_hooks)]
    return sum(layer.times_switched for layer in layers), *[layer.eps for layer in layers], *hooks


def _states(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Differs once one of the tensors was changed or moved."""
    return tuple([(t._version, t.data_ptr()) for t in tensors])
