"""The recorded calls that lead to a tensor: a chain of steps, which ends where a belief starts.

A step is an attribute of its tensor: it lives as long, ``torch.compile`` traces it, and an in-place function overwrites
it. A tensor without a step is a parameter or a constant; with one, it depends on the network's input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Unknown
from kalmannorm.kernels.autograd import saved_tensor_hooks
from kalmannorm.rules import Belief

_T = TypeVar("_T")

_STEP = "_kalmannorm_step"
_STATE = "_kalmannorm_state"
_OWNER = "_kalmannorm_owner"

# Arguments that hold no tensor.
SCALARS = frozenset((int, float, bool, str, type(None)))

# Marks a value that was computed again, in another checkpoint region.
_AGAIN = "again"


@dataclass(slots=True, weakref_slot=True, eq=False, repr=False)
class Step:
    """One recorded call, or (``function=None``) a place where a belief starts."""

    function: Callable[..., Any] | None  # the torch function that was called
    args: tuple[Any, ...]  # its positional arguments, tensors that have a step replaced by it
    kwargs: dict[str, Any]  # its keyword arguments, likewise
    shape: tuple[int, ...]  # the output's
    index: int | None = None  # which output, of a function that returns several
    source: str = ""  # where the belief starts: the layer's name, or "input"
    belief: Belief | None = None  # that starts there, or was computed
    parents: Sequence[Step] = None  # type: ignore[assignment]  # the steps among the arguments; None: look for them
    recorded_in: object = None  # the mark of the forward pass
    draws: Tensor | Unknown | None = field(default=None, init=False)
    maps_drawn: int = field(default=0, init=False)
    is_used: bool = field(default=False, init=False)  # by a function that was called with its tensor
    depth: int = field(default=0, init=False)  # of the longest chain below it that was not evaluated yet
    grad: bool = field(init=False)
    hooks: Any = field(init=False)
    belief_in: Any = field(init=False)
    draws_in: Any = field(init=False)

    def __post_init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.hooks = self.belief_in = self.draws_in = saved_tensor_hooks()
        if self.parents is None:
            self.parents = list(found_in((*self.args, *self.kwargs.values()), Step))
        for parent in self.parents:
            if parent.depth >= self.depth:
                self.depth = parent.depth + 1

    # A belief is about this run alone, and is not saved or copied with its tensor.
    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load(weights_only=True) knows

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self


def ancestors(step: Step, source: Step | None = None) -> list[Step]:
    """The steps that lead to this one, itself included, each after its own ancestors; those from ``source`` on."""
    found: dict[Step, None] = {} if source is None else {source: None}
    waiting = [step]
    while waiting:
        current = waiting[-1]
        first = [parent for parent in current.parents if parent not in found]
        if first:
            waiting.extend(reversed(first))
        else:
            found[current] = None
            waiting.pop()
    return list(found)


def may_use(where: Any, step: Step, now: Any) -> bool:
    """Whether a step's value, kept beside ``where`` by :func:`computed_in`, may be used in the region ``now``.

    A checkpoint region runs again in the backward pass and must then compute the same values again. So it uses a value
    from outside only if that was there before any region asked for it.
    """
    return bool(where == now or where == step.hooks or where == (_AGAIN, now))


def computed_in(kept: Any, now: Any) -> Any:
    """Where a value was computed, to be kept beside it; marked if it replaces an older value."""
    return now if kept is None else (_AGAIN, now)


def replace(value: Any, kind: type | UnionType, by: Callable[[Any], Any]) -> Any:
    """Replace each object of one kind, in lists, tuples and dicts too."""
    if isinstance(value, kind):
        return by(value)
    its = type(value)
    if its is list or its is tuple:
        return its([replace(v, kind, by) for v in value])
    if its is dict:
        return {key: replace(v, kind, by) for key, v in value.items()}
    return value


def step_of(tensor: Tensor, as_it_was: bool = False, now: tuple[int, bool] | None = None) -> Step | None:
    """The step recorded on a tensor, whose state is ``now`` if given, or on the tensor of which it is an alias.

    After an unrecorded change in place it is Unknown, after `detach_` a constant; ``as_it_was`` skips this check.
    """
    step = getattr(tensor, _STEP, None)
    if step is None and type(tensor) is nn.Parameter:
        return None
    # Functions of a subclass may copy attributes to what they return, as those of MONAI's MetaTensor do.
    if step is not None and type(tensor) is not Tensor and not torch.compiler.is_compiling():
        step = step if getattr(tensor, _OWNER, None) == id(tensor) else None
    if step is None and not torch.compiler.is_compiling() and (base := tensor._base) is not None:
        # Outside of the mode, FSDP and DDP pass a tensor through an autograd function that returns it.
        step = getattr(base, _STEP, None) if _place(tensor) == _place(base) else None
        tensor, now = base, None
    if not isinstance(step, Step):
        return None
    if as_it_was:
        return step
    noted, now = getattr(tensor, _STATE, None), now or state_of(tensor)
    if noted is None or now is None or noted == now:
        return step
    if noted[0] != now[0]:
        step = Step(None, (), {}, tuple(tensor.shape), belief=Unknown("it was changed in place where nothing watched"))
    elif noted[1] and step.source != "input":  # by `detach_`
        step = detached(step)
    put(tensor, step)
    return step


def detached(step: Step) -> Step:
    """The same, as a constant to autograd."""
    with torch.no_grad():
        return Step(Tensor.detach, (step,), {}, step.shape, recorded_in=step.recorded_in)


def state_of(tensor: Tensor) -> tuple[int, bool] | None:
    """torch's count of changes in place, and whether the tensor needs a gradient; None where torch does not count."""
    if torch.compiler.is_dynamo_compiling() or tensor.is_inference() or torch._C._functorch.is_batchedtensor(tensor):
        return None
    return tensor._version, tensor.requires_grad


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The elements of its storage that a tensor shows."""
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def put(tensor: Tensor, step: Step | None) -> None:
    """Record a step on a tensor, as it is now."""
    setattr(tensor, _STEP, step)
    setattr(tensor, _STATE, state_of(tensor))
    if type(tensor) is not Tensor and not torch.compiler.is_compiling():
        setattr(tensor, _OWNER, id(tensor))


def found_in(values: Any, kind: type[_T] | UnionType) -> Iterator[_T]:
    """All objects of one kind in lists, tuples, mappings and dataclasses."""
    return (value for _, value in placed_in("", values, kind))


def placed_in(place: str, value: Any, kind: type[_T] | UnionType) -> Iterator[tuple[str, _T]]:
    """As :func:`found_in`, each object with its place: ``batch['image']``."""
    if isinstance(value, kind):
        yield place, value
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from placed_in(f"{place}[{i}]", each, kind)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from placed_in(f"{place}[{key!r}]", each, kind)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from placed_in(f"{place}.{each.name}", getattr(value, each.name, None), kind)
