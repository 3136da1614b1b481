"""What was done to a tensor: a chain of steps, which ends where a belief starts.

A step is an attribute of its tensor. It lives and dies with it, ``torch.compile`` traces it, and an
in-place function overwrites it with the right meaning. Three kinds of tensor meet a function: those
with a step (they depend on the network's input; the step may lead to nothing known), and those without
(parameters, constants), which a rule takes as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Unknown
from kalmannorm.kernels.autograd import saved_tensor_hooks
from kalmannorm.rules import Belief

__all__ = ["SCALARS", "Step", "computed_in", "found_in", "may_use", "put", "replace", "step_of"]

_T = TypeVar("_T")

_STEP = "_kalmannorm_step"
_VERSION = "_kalmannorm_version"

# Arguments that hold no tensor.
SCALARS = frozenset((int, float, bool, str, type(None)))

# Beside a value that was computed before, in another place.
_AGAIN = "again"


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
        parents: the steps among the arguments; found there, where they aren't given.

    Its ``depth`` is the length of the longest chain below it that nobody has evaluated yet.
    """

    __slots__ = (
        "args", "belief", "belief_in", "depth", "draws", "draws_in", "function", "grad", "groups_drawn",
        "hooks", "index", "is_used", "kwargs", "parents", "shape", "source",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any],
                 shape: tuple[int, ...], index: int | None = None, source: str = "",
                 belief: Belief | None = None, parents: Sequence[Step] | None = None) -> None:  # fmt: skip
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.shape = shape
        self.index = index
        self.source = source
        self.belief = belief
        self.draws: Tensor | Unknown | None = None
        self.groups_drawn = 0
        self.is_used = False  # by a function that was called with its tensor
        self.grad = torch.is_grad_enabled()
        self.hooks = self.belief_in = self.draws_in = saved_tensor_hooks()
        self.parents = list(found_in((*args, *kwargs.values()), Step)) if parents is None else parents
        self.depth = 0
        for parent in self.parents:
            self.depth = max(self.depth, parent.depth + 1)

    # A tensor may be saved or copied. What is believed of it is of this run alone, and stays behind.
    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load(weights_only=True) knows

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self


def may_use(where: Any, step: Step, now: Any) -> bool:
    """Whether a value that a step keeps may be used where it is asked for.

    Not where a checkpointed region asks for the belief of something outside it, unless the region
    itself computed it, or it was there before any region asked: the region will run again, and must
    then compute the same things again.

    Args:
        where: what :func:`computed_in` noted.
        step: whose value it is.
        now: the region that asks, of :func:`~kalmannorm.kernels.autograd.saved_tensor_hooks`.
    """
    return bool(where == now or where == step.hooks or where == (_AGAIN, now))


def computed_in(kept: Any, now: Any) -> Any:
    """What to note beside a value that is computed now, in the place of what a step kept, if anything."""
    return now if kept is None else (_AGAIN, now)


def replace(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """Replace what is of one kind, in lists and tuples too."""
    if isinstance(value, kind):
        return by(value)
    its = type(value)
    if its is list or its is tuple:
        return its([replace(v, kind, by) for v in value])
    return value


def step_of(tensor: Tensor, as_it_was: bool = False) -> Step | None:
    """The step recorded on a tensor, or on the one that it is an alias of.

    Args:
        tensor: any.
        as_it_was: ask for what was recorded before a change in place that is being recorded now. Any other change since
            then makes it unknown.
    """
    step = getattr(tensor, _STEP, None)
    if step is None and type(tensor) is nn.Parameter:
        return None
    if step is None and not torch.compiler.is_compiling() and (base := tensor._base) is not None:
        # Where nothing is watched, FSDP and DDP pass a tensor through an autograd function that returns it.
        step = getattr(base, _STEP, None) if _place(tensor) == _place(base) else None
        tensor = base
    if not isinstance(step, Step):
        return None
    if as_it_was:
        return step
    noted, now = getattr(tensor, _VERSION, None), _version(tensor)
    if noted is not None and now is not None and noted != now:
        step = Step(None, (), {}, tuple(tensor.shape), belief=Unknown("it was changed in place where nothing watched"))
        put(tensor, step)
    return step


def _version(tensor: Tensor) -> int | None:
    """How often a tensor, or what it shares memory with, was changed in place; None where torch does not count."""
    if torch.compiler.is_dynamo_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which elements of its storage a tensor shows."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def put(tensor: Tensor, step: Step | None) -> None:
    """Record a step on a tensor, as it is now."""
    setattr(tensor, _STEP, step)
    setattr(tensor, _VERSION, _version(tensor))


def found_in(values: Any, kind: type[_T] | UnionType) -> Iterator[_T]:
    """What is of one kind, in lists, tuples, mappings and dataclasses too."""
    for value in values:
        if isinstance(value, kind):
            yield value
        elif isinstance(value, list | tuple):
            yield from found_in(value, kind)
        elif isinstance(value, Mapping):
            yield from found_in(value.values(), kind)
        elif is_dataclass(value) and not isinstance(value, type):
            yield from found_in([getattr(value, field.name, None) for field in fields(value)], kind)
