"""How beliefs propagate: the moments of a recorded step, by the rules of the functions that lead to it.

`belief_for` is where a normalization layer asks. The paper's own estimator is in `kalmannorm.paper`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from kalmannorm.composed import as_one_function
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import in_grad_mode, is_transformed, saved_tensor_hooks
from kalmannorm.rules import RULES, Belief, Rule
from kalmannorm.rules.arithmetic import JOINT
from kalmannorm.rules.rectified import Rectified
from kalmannorm.rules.table import BELIEF_ALONE, BELIEF_FIRST, LIKE, as_rule_is_called
from kalmannorm.steps import Step, computed_in, found_in, may_use, replace, step_of

_T = TypeVar("_T")
NO_INPUT = Unknown("its input does not depend on a floating-point input, or went through torch.jit, vmap or DTensor")
_NOTHING = nullcontext()
# Errors of a rule that gets unexpected arguments or shapes, and of a torch function that gets draws.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError,
)  # fmt: skip


def belief_for(tensor: Tensor, groups: int) -> Belief:
    """The belief about an activation ``(N, C, *)``: the prior of the layer that gets it. Autocast must be off.

    Returns mean and variance in the shape that the kernels take, ``(1 or S, C, 1, ...)``; or why they are unknown.
    """
    step = step_of(tensor)
    if step is None:
        return NO_INPUT
    belief = exact(step)
    if isinstance(belief, Unknown):
        return belief
    ready = belief.is_per_channel(belief.shape[1]) and belief.groups in (1, groups)
    return belief if ready else belief.per_channel(groups)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Beliefs are computed in float32 whatever autocast does to activations."""
    kind = device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return _NOTHING  # the meta device has no autocast
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(kind):
        return _NOTHING
    return torch.autocast(kind, enabled=False)


def exact(step: Step) -> Belief:
    """Evaluate a step by the rules."""
    now = saved_tensor_hooks()

    def kept(step: Step) -> Belief | None:
        belief = step.belief
        return belief if belief is None or step.belief_in is now or may_use(step.belief_in, step, now) else None

    def apply_rule(step: Step) -> Belief:
        with in_grad_mode(step.grad):  # the step's own mode, as the value is kept for later calls
            belief = _by_rule(step, kept)
        if isinstance(belief, Gaussian):
            belief = belief.of(step.shape)
            if not step.grad:
                belief = belief.detach()
        step.belief, step.belief_in, step.depth = belief, computed_in(step.belief, now), 0
        return belief

    return evaluate(step, kept, apply_rule)


def settle(step: Step) -> None:
    """Evaluate a step of an earlier pass, and drop its parents: a state that a network passes to itself would keep all
    earlier passes. Autocast must be off.
    """
    if step.function is None or not (saved_tensor_hooks() is step.hooks is step.belief_in is None):
        return  # a checkpointed region runs again
    belief = exact(step)
    step.belief = belief.evaluate().of(step.shape) if isinstance(belief, Rectified) else belief
    step.function, step.args, step.kwargs, step.parents, step.source = None, (), {}, (), "an earlier pass"


def let_go_of_graph(step: Step, copies: dict[Step, Step]) -> None:
    """Let the step of a `detach` come from constant copies of its ancestors, which are added to ``copies``: a detached
    tensor that the network keeps would keep the autograd graph of its pass.
    """

    def known(step: Step) -> Step | None:
        if step not in copies and step.belief is not None:
            belief = step.belief.detach() if isinstance(step.belief, Gaussian) else step.belief
            source = step.source or "an earlier pass"
            copies[step] = Step(None, (), {}, step.shape, source=source, belief=belief, parents=())
        return copies.get(step)

    def copied(step: Step) -> Step:
        args, kwargs = replace((step.args, step.kwargs), Step, copies.__getitem__)
        copies[step] = Step(step.function, args, kwargs, step.shape, step.index, recorded_in=step.recorded_in)
        return copies[step]

    if step.hooks is not None:  # a checkpointed region runs again
        return
    with torch.no_grad():
        constant = evaluate(step, known, copied)
    for name in ("function", "args", "kwargs", "parents", "source", "belief"):
        setattr(step, name, getattr(constant, name))
    step.grad = False  # of a mask by a parameter


def true_depth(step: Step) -> int:
    """The ``depth`` of a step as it is now: steps below it may have been evaluated since it was recorded."""
    depths: dict[Step, int] = {}

    def known(step: Step) -> int | None:
        return depths.get(step) if step.belief is None and step.draws is None else 0

    def count(step: Step) -> int:
        depths[step] = 1 + max([depths.get(parent, 0) for parent in step.parents], default=0)
        return depths[step]

    return evaluate(step, known, count)


def evaluate(step: Step, kept: Callable[[Step], _T | None], compute: Callable[[Step], _T]) -> _T:
    """Compute the value of a step after its ancestors', without recursion: a chain may have a thousand calls.

    ``kept`` returns a step's value if it was computed before; ``compute`` computes and keeps it, from its parents'.
    """
    waiting = [step]
    while True:
        current = waiting[-1]
        value = kept(current)
        if value is None:
            if first := [parent for parent in current.parents if kept(parent) is None]:
                waiting += first
                continue
            value = compute(current)
        waiting.pop()
        if not waiting:
            return value


def operands(step: Step, value_of: Callable[[Step], Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | Unknown:
    """The function's arguments, each step among them replaced by its value; `Unknown` where one cannot be used."""
    values = {}
    for parent in step.parents:
        values[parent] = value = value_of(parent)
        if isinstance(value, Unknown):
            return value
    args, kwargs = tuple([values[a] if type(a) is Step else a for a in step.args]), step.kwargs
    if sum([type(a) is Step for a in step.args]) != len(step.parents):  # some are in lists or keywords
        args, kwargs = replace((args, kwargs), Step, values.__getitem__)
    by_fsdp = "torch.distributed.fsdp" in sys.modules and torch.distributed.is_initialized() and not is_transformed()
    if by_fsdp and any(map(_is_freed, found_in((*args, *kwargs.values()), Tensor | Gaussian))):
        return Unknown("it depends on parameters that FSDP has freed")
    return args, kwargs


def _is_freed(value: Tensor | Gaussian) -> bool:
    """Whether a parameter, or a belief that is one, has lost its elements: to read them would end the process."""
    while isinstance(value, Rectified):
        value = value.below
    tensor = value.mean if isinstance(value, Gaussian) else value
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    return bool(tensor.numel() > 0 and tensor.untyped_storage().size() == 0)


def _by_rule(step: Step, kept: Callable[[Step], Any]) -> Belief:
    called = operands(step, kept)
    if isinstance(called, Unknown):
        return called
    whole: Belief | None = None
    if step.function in JOINT:
        whole = _call_rule(as_one_function, step, (step, kept), {})
    return _by_its_own_rule(step, *called) if whole is None else whole


def _by_its_own_rule(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Belief:
    rule = RULES.get(step.function)  # type: ignore[arg-type]
    if rule is None:
        return Unknown(f"no rule for {function_name(step.function)}")
    known = as_rule_is_called(rule, args, kwargs)
    if known is None:
        return Unknown(f"{function_name(step.function)} was called with arguments that its rule does not take")
    args, kwargs = known
    # Not `bool(args)`, which torch 2.11 cannot compile.
    refused = len(args) > 0 and isinstance(args[0], Tensor) and rule in BELIEF_FIRST
    if rule in BELIEF_ALONE and step.function not in LIKE:
        refused = refused or any([isinstance(each, Gaussian) for each in (*args[1:], *kwargs.values())])
    if refused:
        return Unknown(f"{function_name(step.function)} with an argument that is computed from the input")
    belief = _call_rule(rule, step, args, kwargs)
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


def _call_rule(rule: Rule, step: Step, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a rule. If it raises, the moments are unknown; the network's own call succeeded, so training continues."""
    if torch.compiler.is_compiling():
        return rule(*args, **kwargs)
    try:
        return rule(*args, **kwargs)
    except FAILURES as error:
        if is_of_device(error):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        name = function_name(step.function)
        warnings.warn(
            f"the rule for {name} failed ({said}): what comes of it counts as unknown, and the next Kalman layer acts "
            "without a prior",
            stacklevel=2,
        )
        return Unknown(f"the rule for {name} failed ({said})")


def is_of_device(error: Exception) -> bool:
    """Whether an error is of memory, or of the capture of a CUDA graph, and not of the function that was called."""
    return isinstance(error, torch.OutOfMemoryError) or "captur" in str(error)


def first_line(error: Exception) -> str:
    return (str(error) or "no message").splitlines()[0]


def function_name(function: Any) -> str:
    """``torch.nn.functional.relu`` and the like."""
    name = None if torch.compiler.is_compiling() else resolve_name(function)
    return name or str(getattr(function, "__name__", function))
