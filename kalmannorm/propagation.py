"""How beliefs travel: a mode that watches torch calls, and beliefs that ride on tensors.

While a network runs, every torch function that meets a tensor with a belief is *recorded* on its
output as a :class:`Step`. Nothing is computed then. The next normalization layer asks for the belief
of its input (:func:`prior_of`), and only then the chain below is evaluated, by the exact rules or by
draws. So what no layer asks for, a classifier's head for one, costs nothing.

The record is an attribute of the tensor. It lives and dies with it, ``torch.compile`` traces it, and
an in-place function overwrites it with the right meaning. Three kinds of tensor meet a function:
those with a step (they depend on the network's input; the step may lead to nothing known), and those
without (parameters, constants), which a rule takes as they are.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from kalmannorm.checkpoints import enter_again
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.apply import is_transformed
from kalmannorm.rules import FACTORIES, RULES, Belief

__all__ = ["Estimator", "Propagation", "Step", "Watch", "attach", "is_open", "paused", "prior_of", "step_of"]

Estimator = Literal["exact", "monte_carlo"]

_STEP = "_kalmannorm_step"
_BASE = Tensor._base.__get__  # type: ignore[union-attr]

# A state that a network hands to itself from call to call must not grow a chain without end. A vision
# transformer with BatchNorm in its stem and at its end makes some 1,000 calls in between.
_LONGEST = 2000

# Beside a value that was computed before, in another place.
_AGAIN = "again"

# Inside a normalization layer the mode has nothing to watch.
paused = torch._C.DisableTorchFunction


class Step:
    """One recorded call, or (``function=None``) a place where a belief starts.

    Args:
        function: the torch function that was called.
        args: its positional arguments, tensors that have a step replaced by it.
        kwargs: its keyword arguments, likewise.
        shape: the output's shape.
        index: which output, of a function that returns several.
        source: where the belief starts: the layer's name, or "input".
        belief: the belief that starts there, known at once.
    """

    __slots__ = (
        "args", "belief", "belief_in", "depth", "draws", "draws_in", "function", "grad", "hooks", "index", "kwargs",
        "shape", "source",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any],
                 shape: tuple[int, ...], index: int | None = None, source: str = "",
                 belief: Belief | None = None) -> None:  # fmt: skip
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.shape = shape
        self.index = index
        self.source = source
        self.belief = belief
        self.draws: Tensor | Unknown | None = None
        self.grad = torch.is_grad_enabled()
        self.hooks = self.belief_in = self.draws_in = _saved_tensor_hooks()
        self.depth = 0
        for parent in self.parents():
            self.depth = max(self.depth, parent.depth + 1)

    def parents(self) -> Iterator[Step]:
        """The steps that this one was computed from."""
        return _steps_in((*self.args, *self.kwargs.values()))

    # A tensor may be saved or copied. What is believed of it is of this run alone, and stays behind.
    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load(weights_only=True) knows

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self


def _saved_tensor_hooks() -> Any:
    """Which checkpointed region, if any, is being run. See :func:`_may_use`."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _stay_open(layers: Sequence[Any]) -> None:
    """A checkpointed region that finds the mode open must find it open when it runs again.

    Watched modules inside open it themselves, but a region may be any function.
    """
    if (hooks := _saved_tensor_hooks()) is not None:
        enter_again(hooks, lambda: Propagation(layers))


def _may_use(kept: Any, computed_in: Any, step: Step) -> bool:
    """Whether a value that a step keeps may be used where it is asked for.

    Not where a checkpointed region asks for the belief of something outside it, unless the region
    itself computed it, or it was there before any region asked: the region will run again, and must
    then compute the same things again.
    """
    now = _saved_tensor_hooks()
    return kept is not None and (computed_in in (step.hooks, now) or computed_in == (_AGAIN, now))


def _computed_in(kept: Any) -> Any:
    """What to note beside a value that is computed now, in the place of what a step kept, if anything."""
    now = _saved_tensor_hooks()
    return now if kept is None else (_AGAIN, now)


def _steps_in(values: Any) -> Iterator[Step]:
    for value in values:
        if isinstance(value, Step):
            yield value
        elif isinstance(value, list | tuple):
            yield from _steps_in(value)


def _replace(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """Replace what is of one kind, in lists and tuples too."""
    if isinstance(value, kind):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)([_replace(v, kind, by) for v in value])
    return value


# -- recording -------------------------------------------------------------------------------------


def step_of(tensor: Tensor) -> Step | None:
    """The step recorded on a tensor, or on the one that it is an alias of."""
    step = getattr(tensor, _STEP, None)
    if step is None and not torch.compiler.is_compiling() and (base := tensor._base) is not None:
        # Where nothing is watched, FSDP and DDP pass a tensor through an autograd function that returns it.
        step = getattr(base, _STEP, None) if _place(tensor) == _place(base) else None
    return step if isinstance(step, Step) else None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of its storage a tensor shows."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _step_or_tensor(tensor: Tensor) -> Step | Tensor:
    return step_of(tensor) or tensor


def attach(tensor: Tensor, belief: Belief, source: str) -> None:
    """Start a belief on a tensor.

    Args:
        tensor: the activation.
        belief: what is believed of it.
        source: who says so: a layer's name, or "input".
    """
    shape = tuple(tensor.shape)
    if (mode := _current()) is not None:
        _stay_open(mode.layers)
    if isinstance(belief, Gaussian):
        belief = Gaussian(belief.mean, belief.var, shape)
    setattr(tensor, _STEP, Step(None, (), {}, shape, source=source, belief=belief))


class Propagation(TorchFunctionMode):
    """Records what happens to tensors that carry a step.

    Args:
        layers: who may ask for what is recorded.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.input_belief: Gaussian | None = None  # one that no tensor has been found for yet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in FACTORIES:
            return output
        if func is torch.Tensor.__setitem__:
            _record_assignment(args)
        elif isinstance(output, Tensor):
            if func != _BASE:  # who looks at what a view is a view of computes nothing
                self._record(func, args, kwargs, output, None)
        elif isinstance(output, tuple | list) and not isinstance(output, torch.Size):
            for i, each in enumerate(output):
                if isinstance(each, Tensor):
                    self._record(func, args, kwargs, each, i)
        return output

    def _record(self, func: Any, args: Any, kwargs: Any, output: Tensor, index: int | None) -> None:
        if not _depends_on_input(args) and not (kwargs and _depends_on_input(kwargs.values())):
            return
        if func is Tensor.view_as and len(args) == 2 and args[0] is args[1]:
            # How autograd copies the input that an autograd function returns: without grad, but the
            # function's own gradient follows.
            setattr(output, _STEP, step_of(args[0]))
            return
        if args and output is args[0] and not torch.compiler.is_compiling() and output._base is not None:
            attach(output._base, Unknown("a view of it was changed in place"), "")
        recorded = tuple([_replace(a, Tensor, _step_or_tensor) for a in args])
        keywords = {k: _replace(v, Tensor, _step_or_tensor) for k, v in kwargs.items()}
        step = Step(func, recorded, keywords, tuple(output.shape), index)
        if step.depth > _LONGEST:
            attach(output, Unknown(f"more than {_LONGEST} calls since the last normalization layer"), "")
        else:
            setattr(output, _STEP, step)


def _depends_on_input(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if step_of(value) is not None:
                return True
        elif type(value) in (list, tuple) and _depends_on_input(value):
            return True
    return False


def _record_assignment(args: Any) -> None:
    """``x[i] = y``: what is believed of ``x``, and of the tensor it is a view of, holds no more."""
    target = args[0]
    if any(isinstance(a, Tensor) and step_of(a) is not None for a in args):
        lost = Unknown("assigned in place, element by element")
        attach(target, lost, "")
        if not torch.compiler.is_compiling() and target._base is not None:
            attach(target._base, lost, "")


def is_open() -> bool:
    """Whether a mode is watching this thread."""
    return _current() is not None


def _current() -> Propagation | None:
    for mode in torch.overrides._get_current_function_mode_stack():
        if isinstance(mode, Propagation):
            return mode
    return None


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
        if _current() is self.mode and not _is_inside_itself(module):
            self.close(module, args, None)  # an interrupt (not an error) had kept it from closing
        if _current() is None and any(layer.is_fusing for layer in self.layers):
            watch_shards(module)
            self._start_beliefs(module, args, kwargs)
            self.mode.__enter__()  # type: ignore[no-untyped-call]
        elif (mode := _current()) is not None and mode.input_belief is not None:
            mode.input_belief = _started_on_first(mode.input_belief, (*args, *kwargs.values()))

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook; runs after an error too."""
        if _current() is self.mode and not _is_inside_itself(module):
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _start_beliefs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the inputs, so that all that comes of them is known to depend on them."""
        values = (*args, *kwargs.values())
        for tensor in _tensors_in(values):
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


def _started_on_first(given: Gaussian, values: Any) -> Gaussian | None:
    """Start a belief about the network's input on the first tensor that has its channels, unless that has
    another; return it where there is none.
    """
    channels = given.mean.shape[0]
    for tensor in _tensors_in(values):
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


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


# -- sharded parameters ----------------------------------------------------------------------------


def watch_shards(module: nn.Module) -> None:
    """Evaluate what leaves a module whose parameters FSDP frees as soon as it is left.

    FSDP may have come after :func:`kalmannorm.connect`, so this is asked whenever the mode opens.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or torch.compiler.is_compiling():
        return
    for each in module.modules():
        if isinstance(each, fsdp.FSDPModule) and _leave_shard not in each._forward_hooks.values():
            each.register_forward_hook(_leave_shard, prepend=True)  # before FSDP's own


def _leave_shard(module: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook."""
    if (mode := _current()) is None:
        return
    with paused():
        for tensor in _tensors_in((output,)):
            if (step := step_of(tensor)) is not None:
                with without_autocast(tensor.device):
                    setattr(tensor, _STEP, _without_shards(step, module, mode.layers))


def _without_shards(step: Step, module: Any, layers: Sequence[Any]) -> Step:
    """The same step, with values that need a module's parameters no more, neither to be computed, nor
    in their backward pass: that asks FSDP to gather them again.
    """
    new = Step(step.function, step.args, step.kwargs, step.shape, step.index, step.source)
    belief = exact(step)
    if isinstance(belief, Gaussian):
        belief = Gaussian(_gathered(belief.mean, module), _gathered(belief.var, module), step.shape)
    new.belief = belief
    if (groups := _groups_of_draws(layers, step)) is not None:
        draws = drawn(step, groups)
        new.draws = draws if isinstance(draws, Unknown) else _gathered(draws, module)
    return new


def _groups_of_draws(layers: Sequence[Any], step: Step) -> int | None:
    """How many draws the layers that draw will ask for; None where none does, or none could."""
    for layer in layers:
        if layer.estimator == "monte_carlo" and step.shape:
            with suppress(ValueError):
                return int(layer._groups(step.shape[0]))
    return None


def _gathered(tensor: Tensor, module: Any) -> Tensor:
    """A copy, as an output's mean is the bias itself; when a gradient passes it, the module's parameters
    will be there.
    """
    tensor = tensor.clone()
    if tensor.requires_grad:
        tensor.register_hook(lambda _: module.unshard())
    return tensor


# -- evaluating ------------------------------------------------------------------------------------


def prior_of(tensor: Tensor, groups: int, estimator: Estimator = "exact") -> Belief:
    """What is believed of an activation: the prior of the layer that gets it.

    Args:
        tensor: the activation, ``(N, C, *)``.
        groups: the layer's number of statistic groups ``S``.
        estimator: ``"exact"`` moments by the rules, or ``"monte_carlo"``: draws of one feature map a
            group, put through the same torch functions as the activation was.

    Returns:
        Mean and variance ``(S, C)``, or why they are unknown.
    """
    step = step_of(tensor)
    if step is None:
        return Unknown("the input does not depend on the network's input")
    with without_autocast(tensor.device):
        if estimator == "exact":
            belief = exact(step)
            return belief if isinstance(belief, Unknown) else belief.per_channel(groups)
        draws = drawn(step, groups)
        return draws if isinstance(draws, Unknown) else Gaussian.of_draws(draws, groups)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Beliefs are computed in float32 whatever autocast does to activations."""
    if device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # the meta device has no autocast


def exact(step: Step) -> Belief:
    """Evaluate a step by the rules."""

    def apply_rule(step: Step) -> None:
        belief = _by_rule(step, *_operands(step, _kept_belief))
        if isinstance(belief, Gaussian):
            belief = Gaussian(belief.mean, belief.var, step.shape)
            belief = belief if step.grad else belief.detach()
        step.belief, step.belief_in, step.depth = belief, _computed_in(step.belief), 0

    _evaluate(step, _kept_belief, apply_rule)
    belief = _kept_belief(step)
    assert belief is not None
    return belief


def _kept_belief(step: Step) -> Belief | None:
    return step.belief if _may_use(step.belief, step.belief_in, step) else None


def _evaluate(step: Step, kept: Callable[[Step], Any], compute: Callable[[Step], None]) -> None:
    """Compute and keep the value of a step, after those of all that lead to it.

    Not by recursion: a vision transformer makes a thousand calls between two batch normalizations.
    """
    waiting = [step]
    while waiting:
        current = waiting[-1]
        if kept(current) is None:
            first = [parent for parent in current.parents() if kept(parent) is None]
            if first:
                waiting.extend(first)
                continue
            compute(current)
        waiting.pop()


def _operands(step: Step, evaluate: Callable[[Step], Any]) -> tuple[Any, dict[str, Any]]:
    """What the function was called with, each step replaced by its value."""
    args = tuple([_replace(a, Step, evaluate) for a in step.args])
    return args, {k: _replace(v, Step, evaluate) for k, v in step.kwargs.items()}


def _unknown_in(values: Any) -> Unknown | None:
    for value in values:
        if isinstance(value, Unknown):
            return value
        if _is_freed(value.mean if isinstance(value, Gaussian) else value):
            return Unknown("it depends on parameters that FSDP has freed")
        if type(value) in (list, tuple) and (found := _unknown_in(value)) is not None:
            return found
    return None


def _is_freed(value: Any) -> bool:
    """Whether a parameter's elements are gone: to read them would end the process."""
    if type(value) not in (Tensor, nn.Parameter) or is_transformed() or value.layout != torch.strided:
        return False
    return bool(value.numel() > 0 and value.untyped_storage().size() == 0)


def _by_rule(step: Step, args: Any, kwargs: dict[str, Any]) -> Belief:
    unknown = _unknown_in((*args, *kwargs.values()))
    if unknown is not None:
        return unknown
    rule = RULES.get(step.function)  # type: ignore[arg-type]
    if rule is None:
        return Unknown(f"no rule for {function_name(step.function)}")
    belief = rule(*args, **kwargs)
    if type(belief) is tuple:
        belief = belief[step.index or 0]
    elif step.index:  # the indices of a pooling, say
        return Unknown(f"output {step.index} of {function_name(step.function)}")
    if not isinstance(belief, Gaussian | Unknown):
        raise TypeError(
            f"the rule for {function_name(step.function)} returned {type(belief).__name__}, "
            "expected Gaussian or Unknown"
        )
    if isinstance(belief, Gaussian) and belief.ndim != len(step.shape):
        raise ValueError(
            f"the rule for {function_name(step.function)} returned a belief of shape {tuple(belief.mean.shape)} for "
            f"an output of shape {step.shape}, expected the same rank: size 1 along the axes where it does not vary"
        )
    return belief


def drawn(step: Step, groups: int) -> Tensor | Unknown:
    """Evaluate a step by draws of one feature map a group, ``(S, C, *)``; of one for each sample where
    there are no pixels to take moments over.
    """

    def draw(step: Step) -> None:
        draws = _draw(step, groups) if step.function is None else _by_call(step, *_operands(step, _kept_draws))
        step.draws, step.draws_in, step.depth = draws, _computed_in(step.draws), 0

    _evaluate(step, _kept_draws, draw)
    draws = _kept_draws(step)
    assert draws is not None
    return draws


def _kept_draws(step: Step) -> Tensor | Unknown | None:
    return step.draws if _may_use(step.draws, step.draws_in, step) else None


def _draw(step: Step, groups: int) -> Tensor | Unknown:
    belief = exact(step)
    if isinstance(belief, Unknown):
        return belief
    maps = groups if len(step.shape) > 2 else step.shape[0]
    return belief.draw((maps, *step.shape[1:]))


def _by_call(step: Step, args: Any, kwargs: dict[str, Any]) -> Tensor | Unknown:
    unknown = _unknown_in((*args, *kwargs.values()))
    if unknown is not None:
        return unknown
    name = step.function.__name__  # type: ignore[union-attr]
    if kwargs.get("training") and "norm" in name:
        return Unknown(f"{function_name(step.function)} changes buffers, so it is not put to draws")
    # The function may work in place, and other steps still need these draws.
    if name.endswith("_") or kwargs.get("inplace"):
        args = _replace(args, Tensor, Tensor.clone)
    try:
        with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
            output = step.function(*args, **kwargs)  # type: ignore[misc]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return Unknown(f"{function_name(step.function)} fails on draws: {str(error).splitlines()[0]}")
    output = output if step.index is None else output[step.index]
    if not output.is_floating_point():
        return Unknown(f"{function_name(step.function)} is not continuous")
    return output  # type: ignore[no-any-return]


def function_name(function: Any) -> str:
    """``torch.nn.functional.relu`` and the like."""
    name = None if torch.compiler.is_compiling() else resolve_name(function)
    return name or str(getattr(function, "__name__", function))
