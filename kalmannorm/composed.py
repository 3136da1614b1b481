"""Functions of one activation that a network writes as several calls: ``x * torch.sigmoid(x)``, ``relu(x) ** 2``.

Call by call, a rule would take the factors as independent, and what a ReLU returns as Gaussian. Together, such calls
are one function, element by element, and its moments are integrated over the activation that it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules.arithmetic import CURVED, ELEMENTWISE, JOINT
from kalmannorm.rules.pointwise import GUARDED, quadrature
from kalmannorm.steps import SCALARS, Step, replace

# How many sums and products of two a chain passes through: more would cost time at each residual sum.
_NESTED = 2


def as_one_function(step: Step, kept: Callable[[Step], Any]) -> Gaussian | None:
    """The belief about a step that is a function of one activation by way of other such functions; None of another.

    Args:
        step: its parents' beliefs are kept.
        kept: returns a step's belief.
    """
    if not any([parent.function in ELEMENTWISE or parent.function in JOINT for parent in step.parents]):
        return None  # mostly
    *own, source = _chain(step, _NESTED)
    below = (each.function in CURVED or len(each.parents) > 1 for each in own[1:])
    if len({*step.parents}) == 1 and (step.function not in CURVED or not any(below)):
        return None  # lines leave their input Gaussian
    belief = None if source is step else kept(source)
    if not isinstance(belief, Gaussian):
        return None
    values_of = _function(step, source, belief)
    return None if values_of is None else quadrature(belief, values_of)


def _chain(step: Step, nested: int) -> list[Step]:
    """A step and those below it, as long as each is an element-by-element function of the next one alone."""
    chain = [step]
    while (below := _below(chain[-1], nested)) is not None:
        chain.append(below)
    return chain


def _below(step: Step, nested: int) -> Step | None:
    """The activation of which alone a step is a function, element by element; None if there is none."""
    if not all(_is_plain(each) for each in (*step.args, *step.kwargs.values())):
        return None
    if step.function in ELEMENTWISE and len({*step.parents}) == 1:
        return step.parents[0]
    if step.function not in JOINT or len(step.parents) != 2 or nested == 0:
        return None
    first, second = (_chain(parent, nested - 1) for parent in step.parents)
    return next((each for each in first if each in second), None)


def _is_plain(value: Any) -> bool:
    return type(value) in SCALARS or isinstance(value, Step | Tensor)


def _function(step: Step, source: Step, belief: Gaussian) -> Callable[[Tensor], Tensor] | None:
    """What a step computes from values of its source, which have one axis more than the belief about it; None if a
    known tensor in between has other elements than the belief.
    """
    order: list[Step] = []
    waiting = [step]
    while waiting:
        current = waiting.pop()
        if current is not source:
            order.append(current)
            waiting.extend(current.parents)
    upwards = list(dict.fromkeys(reversed(order)))  # each after its parents, as these come again behind it
    known = [each for step in upwards for each in (*step.args, *step.kwargs.values()) if isinstance(each, Tensor)]
    sizes = belief.mean.shape
    for each in known:
        if each.ndim > len(sizes) or any(n not in (1, m) for n, m in zip(each.shape[::-1], sizes[::-1], strict=False)):
            return None

    def values_of(t: Tensor) -> Tensor:
        values = {source: t}

        def of(value: Step | Tensor) -> Tensor:
            if isinstance(value, Step):
                return values[value].clone()  # which the function may change in place
            return value.to(t.dtype).unsqueeze(-1)

        for each in upwards:
            args, kwargs = replace((each.args, each.kwargs), Step | Tensor, of)
            function: Any = GUARDED.get(each.function, each.function)  # type: ignore[arg-type]
            output: Tensor = function(*args, **kwargs)
            values[each] = output if each.grad else output.detach()
        return values[step]

    return values_of
