"""The value of a step: what is believed of its tensor, by rules, or by draws put through the functions."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.kernels.autograd import in_grad_mode, is_transformed, saved_tensor_hooks
from kalmannorm.rules import RULES, Belief, Rule
from kalmannorm.rules.linear import Linked
from kalmannorm.rules.pointwise import Deferred
from kalmannorm.rules.table import BELIEF_FIRST, DEFERRING, as_rule_is_called
from kalmannorm.steps import Step, computed_in, may_use, replace, step_of

__all__ = ["Estimator", "belief_for", "defer", "drawn", "exact", "function_name", "prior_of", "without_autocast"]

Estimator = Literal["exact", "monte_carlo"]

_NOTHING = nullcontext()
# What a rule may raise of shapes that it did not expect, and a torch function of draws.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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
    with without_autocast(tensor.device):
        belief = belief_for(tensor, groups, estimator)
        return belief if isinstance(belief, Unknown) else belief.per_channel(groups)


def belief_for(tensor: Tensor, groups: int, estimator: Estimator = "exact") -> Belief:
    """As :func:`prior_of`, but each axis that the belief does not depend on may have size 1, and there may be more of
    them: ``(1 or S, C, 1, ...)``. It is what the kernels take. To be asked :func:`without_autocast`.
    """
    step = step_of(tensor)
    if step is None:
        return Unknown("the input does not depend on a floating-point input of the network")
    if estimator == "monte_carlo":
        draws = drawn(step, groups)
        return draws if isinstance(draws, Unknown) else Gaussian.of_draws(draws, groups)
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
    may_be_freed = _may_be_freed()

    def kept(step: Step) -> Belief | None:
        belief = step.belief
        return belief if belief is not None and may_use(step.belief_in, step, now) else None

    def apply_rule(step: Step) -> Belief:
        with in_grad_mode(step.grad):  # and not that of who asks: what is kept here is asked for again
            belief = _by_rule(step, kept, may_be_freed)
        if isinstance(belief, Gaussian):
            belief = belief.of(step.shape)
            if may_be_freed and isinstance(belief, Linked):
                belief.evaluate()  # while its filter is there
            if not step.grad:
                belief = belief.detach()
        step.belief, step.belief_in, step.depth = belief, computed_in(step.belief, now), 0
        return belief

    belief: Belief = _evaluate(step, kept, apply_rule)
    return belief


def defer(step: Step) -> None:
    """Give a step that is recorded now the belief that its rule only notes, without computing anything."""
    rule = RULES.get(step.function)  # type: ignore[arg-type]
    only_notes = DEFERRING.get(rule)  # type: ignore[arg-type]
    if only_notes is None:
        return
    (parent,) = step.parents
    below, args = parent.belief, step.args
    if not isinstance(below, Packed | Deferred) or parent.belief_in != step.hooks or parent.grad != step.grad:
        return
    if not args or args[0] is not parent or step.kwargs.keys() - {"inplace"} or _may_be_freed() or is_transformed():
        return
    if only_notes(below, *args[1:]):
        step.belief = rule(below, *args[1:]).of(step.shape)  # type: ignore[misc]


def _evaluate(step: Step, kept: Callable[[Step], Any], compute: Callable[[Step], Any]) -> Any:
    """Compute and keep the value of a step, after those of all that lead to it.

    Not by recursion: a vision transformer makes a thousand calls between two batch normalizations.
    """
    waiting = [step]
    value = None
    while waiting:
        current = waiting[-1]
        value = kept(current)
        if value is None:
            first = [parent for parent in current.parents if kept(parent) is None]
            if first:
                waiting += first
                continue
            value = compute(current)
        waiting.pop()
    return value


def _operands(step: Step, evaluate: Callable[[Step], Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | Unknown:
    """What the function was called with, each step replaced by its value; or one that is unknown."""
    for parent in step.parents:
        if isinstance(value := evaluate(parent), Unknown):
            return value
    args = tuple([evaluate(a) if type(a) is Step else a for a in step.args])
    if sum([type(a) is Step for a in step.args]) == len(step.parents):  # none in a list, say
        return args, step.kwargs
    return (
        tuple([replace(a, Step, evaluate) for a in args]),
        {k: replace(v, Step, evaluate) for k, v in step.kwargs.items()},
    )


def _may_be_freed() -> bool:
    """Whether parameters may be without their elements: FSDP, which nobody has here who has not imported it."""
    if "torch.distributed.fsdp" not in sys.modules or is_transformed():
        return False
    return torch.distributed.is_initialized()


def _frees(values: Any) -> bool:
    """Whether elements of a parameter, or of a belief that is a parameter, are gone: to read them would end the
    process.
    """
    return any(_frees(v) if isinstance(v, tuple | list) else _is_freed(v) for v in values)


def _is_freed(value: Any) -> bool:
    while isinstance(value, Deferred):
        value = value.below
    tensor = value.mean if isinstance(value, Gaussian) else value
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    return bool(tensor.numel() > 0 and tensor.untyped_storage().size() == 0)


_FREED = Unknown("it depends on parameters that FSDP has freed")


def _by_rule(step: Step, kept: Callable[[Step], Any], may_be_freed: bool) -> Belief:
    rule = RULES.get(step.function)  # type: ignore[arg-type]
    operands = _operands(step, kept)
    if isinstance(operands, Unknown):
        return operands
    args, kwargs = operands
    if may_be_freed and _frees((*args, *kwargs.values())):
        return _FREED
    if rule is None:
        return Unknown(f"no rule for {function_name(step.function)}")
    known = as_rule_is_called(rule, args, kwargs)
    if known is None:
        return Unknown(f"{function_name(step.function)} was called with arguments that its rule does not take")
    args, kwargs = known
    if args and isinstance(args[0], Tensor) and rule in BELIEF_FIRST:
        return Unknown(f"{function_name(step.function)} of a known tensor, by an activation")
    belief = _asked(rule, step, args, kwargs)
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


def _asked(rule: Rule, step: Step, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a rule answers. One that fails knows nothing: the network itself has got over this function."""
    if torch.compiler.is_compiling():
        return rule(*args, **kwargs)
    try:
        return rule(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        name = function_name(step.function)
        warnings.warn(
            f"the rule for {name} failed ({said}): what comes of it counts as unknown, and the next Kalman layer acts "
            "without a prior",
            stacklevel=2,
        )
        return Unknown(f"the rule for {name} failed ({said})")


def drawn(step: Step, groups: int) -> Tensor | Unknown:
    """Evaluate a step by draws of one feature map a group, ``(S, C, *)``; of one for each sample where
    there are no pixels to take moments over.
    """
    now = saved_tensor_hooks()

    def kept(step: Step) -> Tensor | Unknown | None:
        draws = step.draws
        if draws is None or not may_use(step.draws_in, step, now):
            return None
        enough = isinstance(draws, Unknown) or step.groups_drawn == groups
        return draws if enough else None

    def draw(step: Step) -> Tensor | Unknown:
        draws = _draw(step, groups) if step.function is None else _by_call(step, kept)
        step.draws, step.draws_in, step.depth = draws, computed_in(step.draws, now), 0
        step.groups_drawn = groups
        return draws

    draws: Tensor | Unknown = _evaluate(step, kept, draw)
    return draws


def _draw(step: Step, groups: int) -> Tensor | Unknown:
    belief = exact(step)
    if isinstance(belief, Unknown):
        return belief
    maps = groups if len(step.shape) > 2 else step.shape[0]
    with in_grad_mode(step.grad):
        return belief.draw((maps, *step.shape[1:]))


def _by_call(step: Step, kept: Callable[[Step], Any]) -> Tensor | Unknown:
    operands = _operands(step, kept)
    if isinstance(operands, Unknown):
        return operands
    args, kwargs = operands
    if _may_be_freed() and _frees((*args, *kwargs.values())):
        return _FREED
    name = step.function.__name__  # type: ignore[union-attr]
    if kwargs.get("training") and "norm" in name:
        return Unknown(f"{function_name(step.function)} changes buffers, so it is not put to draws")
    # The function may work in place, and other steps still need these draws. (A compiler drops copies that nobody
    # needs, and torch 2.14's does not know the names of functions.)
    if torch.compiler.is_compiling() or name.endswith("_") or kwargs.get("inplace"):
        args = replace(args, Tensor, Tensor.clone)
    try:
        with in_grad_mode(step.grad):
            output = step.function(*args, **kwargs)  # type: ignore[misc]
        output = output if step.index is None else output[step.index]
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:  # torch's own functions assert shapes, too
        return Unknown(f"{function_name(step.function)} fails on draws: {_first_line(error)}")
    if not output.is_floating_point():
        return Unknown(f"{function_name(step.function)} is not continuous")
    if output.ndim != len(step.shape):  # `squeeze` of one map, say, where there are several samples
        return Unknown(f"{function_name(step.function)} gives draws of another rank than the activation's")
    return output  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error) or "no message").splitlines()[0]


def function_name(function: Any) -> str:
    """``torch.nn.functional.relu`` and the like."""
    name = None if torch.compiler.is_compiling() else resolve_name(function)
    return name or str(getattr(function, "__name__", function))
