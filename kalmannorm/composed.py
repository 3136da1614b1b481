"""Functions of one activation that a network writes as several calls: ``x * torch.sigmoid(x)``, ``relu(x) ** 2``.

Call by call, a rule would take the factors as independent, and what a ReLU returns as Gaussian. Together, such calls
are one function, element by element, and its moments are integrated over the activation that it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules.arithmetic import ELEMENTWISE, JOINT, LINES, PRELU
from kalmannorm.rules.pointwise import GUARDED, quadrature
from kalmannorm.rules.scatter import is_as_infinite
from kalmannorm.steps import Step, ancestors, replace

# How many sums and products of two a chain passes through: more would cost time at each residual sum.
_NESTED = 2
# How many calls are one function, at most: the time to find them grows with their square.
_LONGEST = 8


def as_one_function(step: Step, kept: Callable[[Step], Any]) -> Gaussian | None:
    """The belief about a step that is a function of one activation by way of other such functions; None of another.

    Args:
        step: its parents' beliefs are kept.
        kept: returns a step's belief.
    """
    if not any([parent.function in JOINT for parent in step.parents]):
        return None  # mostly
    chain = _chain(step, _NESTED)
    for n in range(len(chain) - 1, 0, -1):  # the furthest source that a known tensor in between allows
        if len({*step.parents}) == 1 and (_is_line(step) or all([_is_line(each) for each in chain[1:n]])):
            return None  # lines leave their input Gaussian
        belief = kept(chain[n])
        if isinstance(belief, Gaussian) and (values_of := _function(step, chain[n], belief)) is not None:
            return quadrature(belief, values_of)
    return None


def _chain(step: Step, nested: int) -> list[Step]:
    """A step and those below it, as long as each is an element-by-element function of the next one alone."""
    chain = [step]
    while len(chain) <= _LONGEST and (below := _below(chain[-1], nested)) is not None:
        chain.append(below)
    return chain


def _below(step: Step, nested: int) -> Step | None:
    """The activation of which alone a step is a function, element by element; None if there is none."""
    if "out" in step.kwargs or not all([_is_plain(each) for each in (*step.args, *step.kwargs.values())]):
        return None
    if step.function in ELEMENTWISE and len({*step.parents}) == 1:
        return step.parents[0]
    if step.function not in JOINT or len(step.parents) < 2 or nested == 0:
        return None
    first, *others = (_chain(parent, nested - 1) for parent in step.parents)
    return next((each for each in first if all([each in other for other in others])), None)


def _is_line(step: Step) -> bool:
    return step.function in LINES and len(step.parents) == 1


def _is_plain(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point
    return value is None or (isinstance(value, Step | Tensor | int | float | str) and not is_as_infinite(value))


def _function(step: Step, source: Step, belief: Gaussian) -> Callable[[Tensor], Tensor] | None:
    """What a step computes from values of its source, which have one axis more than the belief about it; None if a
    known tensor in between has other elements than the belief.
    """
    _, *upwards = ancestors(step, source)
    if not all(
        _fits(each, belief, of_channels=between.function in PRELU)
        for between in upwards for each in (*between.args, *between.kwargs.values()) if isinstance(each, Tensor)
    ):  # fmt: skip
        return None

    def values_of(t: Tensor) -> Tensor:
        values = {source: t}

        def of(value: Step | Tensor) -> Tensor:
            if isinstance(value, Step):
                return values[value].clone()  # which the function may change in place
            if value.is_floating_point():  # and no mask
                value = value.to(t.dtype).masked_fill(value.isneginf(), 0.0)  # as `summarize` does
            return value if value.ndim == 0 else value.unsqueeze(-1)

        for each in upwards:
            args, kwargs = replace((each.args, each.kwargs), Step | Tensor, of)
            function: Any = GUARDED.get(each.function, each.function)  # type: ignore[arg-type]
            output: Tensor = function(*args, **kwargs)
            values[each] = output if each.grad else output.detach()
        return values[step].to(t.dtype)

    return values_of


def _fits(known: Tensor, belief: Gaussian, of_channels: bool) -> bool:
    """Whether a known tensor has one value for each element of a belief, or for all of them.

    One ``of_channels`` lies along the second axis, and any other along the last ones.
    """
    sizes = belief.mean.shape
    if known.numel() > 1 and (known.ndim > len(sizes) or (of_channels and len(sizes) > 2)):
        return False
    return all(n in (1, m) for n, m in zip(known.shape[::-1], sizes[::-1], strict=False))
