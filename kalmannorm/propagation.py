"""How beliefs travel: a mode that watches torch calls.

While a network runs, every torch function that meets a tensor with a belief is *recorded* on its
output as a :class:`~kalmannorm.steps.Step`. Nothing is computed then. The next normalization layer asks
for the belief of its input (:func:`kalmannorm.evaluation.belief_for`), and only then the chain below is
evaluated. So what no layer asks for, a classifier's head for one, costs nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kalmannorm.checkpoints import enter_again
from kalmannorm.evaluation import defer
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import alias
from kalmannorm.kernels.layer import rectify_output
from kalmannorm.rules import RULES, Belief
from kalmannorm.rules.pointwise import Deferred
from kalmannorm.rules.table import FACTORIES, LIKE, OVERWRITING, SOURCES
from kalmannorm.steps import SCALARS, Step, put, step_of

__all__ = ["Prior", "Propagation", "attach", "attach_step", "current", "is_open", "is_resting", "paused"]

_BASE = Tensor._base.__get__  # type: ignore[union-attr]

# A state that a network hands to itself from call to call must not grow a chain without end. A vision
# transformer with BatchNorm in its stem and at its end makes some 1,000 calls in between.
_LONGEST = 2000


class Prior(NamedTuple):
    """What a layer's kernel is given."""

    belief: Gaussian | None
    """In a shape of :func:`~kalmannorm.evaluation.belief_for`; None where there is none."""
    noise: Tensor | None
    """The logarithm of its process noise, ``(C,)``."""
    shift: Tensor | None = None
    """How it is corrected, ``(C,)``: see :func:`kalmannorm.kernels.layer`."""
    scale: Tensor | None = None

    def copied(self) -> Prior:
        """Without gradients, in memory of its own."""
        belief = None if self.belief is None else self.belief.detach().map(Tensor.clone).packed()
        return Prior(belief, *(None if t is None else t.detach().clone() for t in self[1:]))


_IN_PLACE_RELUS = frozenset((F.relu, F.relu_, torch.relu_, Tensor.relu_))
# By the names of methods that are written in Python.
_IN_PYTHON = {"__rsub__": torch.rsub, "pow": torch.pow, "__pow__": torch.pow}
# What rules know of `operator`'s functions.
_OPERATORS = frozenset(
    name for name in dir(Tensor) if name.startswith("__") and getattr(Tensor, name) in (Tensor.__setitem__, *RULES)
)
# Inside a normalization layer the mode has nothing to watch.
paused = torch._C.DisableTorchFunction


class KeptPriors:
    """Priors that depend on parameters alone, for passes to come."""

    def __init__(self) -> None:
        # By layer and number of its call in a pass.
        self.kept: dict[tuple[Any, int], Prior] = {}
        self.key: Any = None
        self.tensors: list[weakref.ref[Tensor]] = []
        self.calls: dict[Any, int] = {}
        self.are_used = False
        self.are_complete = False

    def begin(self, key: Any, tensors: Sequence[Tensor], layers: Sequence[Any]) -> None:
        """Begin a pass.

        Args:
            key: what its priors depend on; None where none are to be kept.
            tensors: the parameters and buffers among it.
            layers: those that may be called. If the last pass called each that fuses once, it was not ended by an
                error, and took no course of its own.
        """
        self.are_complete = self.are_used and key is not None and key == self.key and self.calls == {
            layer: 1 for layer in layers if layer.is_fusing and not layer.ignores_prior
        }
        self.calls, self.are_used = {}, key is not None
        if self.are_used and key != self.key:
            self.kept, self.key, self.tensors = {}, key, [weakref.ref(t) for t in tensors]

    def of(self, layer: Any, compute: Callable[[], Prior]) -> Prior:
        """The prior of a layer's next call in this pass."""
        place = layer, self.calls.get(layer, 0)
        self.calls[layer] = place[1] + 1
        if self.are_complete and place not in self.kept:
            # Called once in the pass that was recorded, and more often in this one: nothing is known of this input.
            self.key = None
            return self.kept[layer, 0]
        if place not in self.kept:
            prior = compute()
            if torch.compiler.is_compiling():  # an exporter's stand-ins
                return prior
            with torch.inference_mode(False):
                self.kept[place] = prior.copied()
        return self.kept[place]


class Propagation(TorchFunctionMode):
    """Records what happens to tensors that carry a step.

    Args:
        layers: who may ask for what is recorded.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.input_belief: Gaussian | None = None  # one that no tensor has been found for yet
        self.opener: Any = None  # the module that was entered
        # Beliefs that layers have computed along with their own: for this pass, as each leads to the layer, which keeps
        # its input, which leads back to the belief.
        self.lent: list[Deferred] = []
        self.of_threads: dict[int, KeptPriors] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        lent, self.lent = self.lent, []
        for belief in lent:
            belief.forget()

    @property
    def priors(self) -> KeptPriors:
        """Those that this thread keeps: several may call one model in ``eval()``."""
        thread = threading.get_ident()
        if thread not in self.of_threads:
            self.of_threads[thread] = KeptPriors()
        return self.of_threads[thread]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "of_threads": {}, "lent": []}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_resting(self):
            return func(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            func, args = _as_in_eager_mode(func, args)
        # Notes if it was changed unseen: after a function that works in place, nobody could tell.
        first = step_of(args[0]) if args and isinstance(args[0], Tensor) else None
        if first is not None and func in _IN_PLACE_RELUS and _is_rectified_by_its_layer(func, args, kwargs, first):
            output = args[0]
        else:
            output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            if func not in FACTORIES and func != _BASE:  # who looks at what a view is a view of computes nothing
                self._record(func, args, kwargs, output, None)
        elif func is torch.Tensor.__setitem__:
            _record_assignment(args)
        elif isinstance(output, tuple | list) and not isinstance(output, torch.Size) and func not in FACTORIES:
            if torch.compiler.is_dynamo_compiling():
                output = type(output)([alias(each) if isinstance(each, Tensor) else each for each in output])
            for i, each in enumerate(output):
                if isinstance(each, Tensor):
                    self._record(func, args, kwargs, each, i)
        return output

    def _record(self, func: Any, args: Any, kwargs: Any, output: Tensor, index: int | None) -> None:
        parents: list[Step] = []
        recorded = tuple([a if type(a) in SCALARS else _recorded(a, parents, output) for a in args])
        keywords = {k: _recorded(v, parents, output) for k, v in kwargs.items()} if kwargs else kwargs
        if (not parents and func not in SOURCES) or (func in LIKE and not isinstance(recorded[0], Step)):
            return
        if func is Tensor.view_as and len(args) == 2 and args[0] is args[1]:
            # How autograd copies the input that an autograd function returns: without grad, but the
            # function's own gradient follows.
            put(output, step_of(args[0]))
            return
        if args and output is args[0] and not torch.compiler.is_compiling() and output._base is not None:
            attach(output._base, Unknown("a view of it was changed in place"), "")
        if args and output is args[0] and not isinstance(recorded[0], Step) and func not in OVERWRITING:
            # What it was is gone, and what it is now depends on the batch.
            attach(output, Unknown("a known tensor was changed in place by an activation"), "")
            return
        if torch.compiler.is_dynamo_compiling() and getattr(func, "__module__", "") == "_operator":
            # A strict export cannot write such a function down, should the step leave the graph with its tensor.
            attach(output, Unknown(f"no rule for operator.{func.__name__}"), "")
            return
        step = Step(func, recorded, keywords, tuple(output.shape), index, parents=parents)
        if step.depth > _LONGEST:
            attach(output, Unknown(f"more than {_LONGEST} calls since the last normalization layer"), "")
            return
        if len(parents) == 1 and index is None:
            defer(step)
        put(output, step)


def _as_in_eager_mode(func: Any, args: Any) -> tuple[Any, Any]:
    """The function that rules know, and its arguments, of one that a compiler calls: a strict export has
    `operator.add` for ``a + b``, and methods that are written in Python are not found in a table.
    """
    name = getattr(func, "__name__", "")
    if name in _IN_PYTHON:
        return _IN_PYTHON[name], args
    if getattr(func, "__module__", "") != "_operator":
        return func, args
    # Comparisons and the like have no rule and need none: torch's own methods for them take other arguments.
    reflected = not isinstance(args[0], Tensor)
    method = f"__r{name}__" if reflected else f"__{name}__"
    if method not in _OPERATORS:
        return func, args
    return getattr(Tensor, method), args[::-1] if reflected else args


def _is_rectified_by_its_layer(func: Any, args: Any, kwargs: Any, step: Step) -> bool:
    """Rectify a layer's output in place together with the layer, if nothing was computed from it before."""
    if step.function is not None or step.is_used or len(args) != 1 or torch.compiler.is_dynamo_compiling():
        return False
    if func is F.relu and kwargs.get("inplace") is not True:
        return False
    return rectify_output(args[0])


def _recorded(value: Any, parents: list[Step], output: Tensor) -> Any:
    """An argument, each tensor in it replaced by its step, if it has one; these are collected."""
    kind = type(value)
    if kind is tuple or kind is list:
        return value if SCALARS.issuperset(map(type, value)) else kind([_recorded(v, parents, output) for v in value])
    if isinstance(value, Tensor) and (step := step_of(value, as_it_was=value is output)) is not None:
        step.is_used = True
        parents.append(step)
        return step
    return value


def _record_assignment(args: Any) -> None:
    """``x[i] = y``: what is believed of ``x``, and of the tensor it is a view of, holds no more."""
    target = args[0]
    if any(isinstance(a, Tensor) and step_of(a) is not None for a in args):
        lost = Unknown("assigned in place, element by element")
        attach(target, lost, "")
        if not torch.compiler.is_compiling() and target._base is not None:
            attach(target._base, lost, "")


def is_resting(mode: Propagation) -> bool:
    """Whether all priors of this pass are kept, so that nothing is recorded."""
    if torch.compiler.is_dynamo_compiling() or not mode.of_threads:
        return False
    return mode.priors.are_complete


def is_open() -> bool:
    """Whether a mode is watching this thread."""
    return current() is not None


def current() -> Propagation | None:
    """The mode that is watching this thread, if any."""
    for mode in torch.overrides._get_current_function_mode_stack():
        if isinstance(mode, Propagation):
            return mode
    return None


def attach(tensor: Tensor, belief: Belief, source: str) -> None:
    """Start a belief on a tensor.

    Args:
        tensor: the activation.
        belief: what is believed of it.
        source: who says so: a layer's name, or "input".
    """
    shape = tuple(tensor.shape)
    if isinstance(belief, Gaussian):
        belief = belief.of(shape)
    step = Step(None, (), {}, shape, source=source, belief=belief, parents=())
    put(tensor, step)
    if step.hooks is not None and (mode := current()) is not None:
        # A checkpointed region that finds the mode open must find it open when it runs again. Watched modules inside
        # open it themselves, but a region may be any function.
        enter_again(step.hooks, lambda: Propagation(mode.layers))


def attach_step(tensor: Tensor, func: Any) -> None:
    """Record that a function was applied to a tensor whose belief has been attached, where no mode could see it."""
    put(tensor, Step(func, (step_of(tensor),), {}, tuple(tensor.shape)))
