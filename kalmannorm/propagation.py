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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.rules import RULES, Belief

__all__ = ["Estimator", "Propagation", "Step", "Watch", "attach", "is_open", "paused", "prior_of", "step_of"]

Estimator = Literal["exact", "monte_carlo"]

_STEP = "_kalmannorm_step"

# A state that a network hands to itself from call to call must not grow a chain without end.
_LONGEST = 100

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


def _may_use(kept: Any, computed_in: Any, step: Step) -> bool:
    """Whether a value that a step keeps may be used where it is asked for.

    Not where a checkpointed region asks for the belief of something outside it, unless the region
    itself computed it: the region will run again, and must then compute the same things again.
    """
    return kept is not None and (computed_in == step.hooks or computed_in == _saved_tensor_hooks())


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
    """The step recorded on a tensor."""
    step = getattr(tensor, _STEP, None)
    return step if isinstance(step, Step) else None


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
    if isinstance(belief, Gaussian):
        belief = Gaussian(belief.mean, belief.var, shape)
    setattr(tensor, _STEP, Step(None, (), {}, shape, source=source, belief=belief))


class Propagation(TorchFunctionMode):
    """Records what happens to tensors that carry a step."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is torch.Tensor.__setitem__:
            _record_assignment(args)
        elif isinstance(output, Tensor):
            self._record(func, args, kwargs, output, None)
        elif isinstance(output, tuple | list) and not isinstance(output, torch.Size):
            for i, each in enumerate(output):
                if isinstance(each, Tensor):
                    self._record(func, args, kwargs, each, i)
        return output

    def _record(self, func: Any, args: Any, kwargs: Any, output: Tensor, index: int | None) -> None:
        if not _depends_on_input(args) and not (kwargs and _depends_on_input(kwargs.values())):
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
        self.mode = Propagation()

    def open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if _current() is self.mode and not _is_inside_itself(module):
            self.close(module, args, None)  # an interrupt (not an error) had kept it from closing
        if _current() is None and any(layer.is_fusing for layer in self.layers):
            self._start_beliefs(module, args, kwargs)
            self.mode.__enter__()  # type: ignore[no-untyped-call]

    def close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook; runs after an error too."""
        if _current() is self.mode and not _is_inside_itself(module):
            self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _start_beliefs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the inputs, so that all that comes of them is known to depend on them."""
        given = self.input_belief
        for tensor in _tensors_in((*args, *kwargs.values())):
            step = step_of(tensor)
            if step is not None and step.source != "input":
                continue  # from another part of the network, whose beliefs go on here
            belief: Belief = Unknown("the network's input")
            if given is not None and tensor.is_floating_point():
                belief, given = _input_belief(given, tensor, type(module).__name__), None
            attach(tensor, belief, "input")


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


def _input_belief(given: Gaussian, tensor: Tensor, name: str) -> Gaussian:
    channels = given.mean.shape[0]
    if tensor.ndim < 2 or tensor.shape[1] != channels:
        raise ValueError(
            f"input_stats given to kalmannorm.convert describe {channels} channels, "
            f"but {name} got an input of shape {tuple(tensor.shape)}, expected (N, {channels}, ...)"
        )
    shape = (1, channels, *[1] * (tensor.ndim - 2))
    return given.map(lambda t: t.to(tensor.device).reshape(shape))


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
        elif isinstance(value, dict):
            yield from _tensors_in(value.values())


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
    if _may_use(step.belief, step.belief_in, step):
        assert step.belief is not None
        return step.belief
    belief = _by_rule(step, *_operands(step, exact))
    if isinstance(belief, Gaussian):
        belief = Gaussian(belief.mean, belief.var, step.shape)
        belief = belief if step.grad else belief.detach()
    step.belief, step.belief_in, step.depth = belief, _saved_tensor_hooks(), 0
    return belief


def _operands(step: Step, evaluate: Callable[[Step], Any]) -> tuple[Any, dict[str, Any]]:
    """What the function was called with, each step replaced by its value."""
    args = tuple([_replace(a, Step, evaluate) for a in step.args])
    return args, {k: _replace(v, Step, evaluate) for k, v in step.kwargs.items()}


def _unknown_in(values: Any) -> Unknown | None:
    for value in values:
        if isinstance(value, Unknown):
            return value
        if type(value) in (list, tuple) and (found := _unknown_in(value)) is not None:
            return found
    return None


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
    if _may_use(step.draws, step.draws_in, step):
        assert step.draws is not None
        return step.draws
    if step.function is None:
        draws = _draw(step, groups)
    else:
        draws = _by_call(step, *_operands(step, lambda parent: drawn(parent, groups)))
    step.draws, step.draws_in, step.depth = draws, _saved_tensor_hooks(), 0
    return draws


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
