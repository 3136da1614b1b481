"""The mode that records torch calls while a network runs.

A torch function that gets a tensor with a step is *recorded* on its output as a :class:`~kalmannorm.steps.Step`.
Nothing is computed before a layer asks for the belief about its input (:func:`kalmannorm.propagation.belief_for`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from kalmannorm.checkpoints import enter_again
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import alias, traced_with_its_caller
from kalmannorm.kernels.layer import rectify_output
from kalmannorm.priors import KeptPriors
from kalmannorm.propagation import let_go_of_graph, settle, true_depth, without_autocast
from kalmannorm.rules import RULES, Belief
from kalmannorm.rules.sampling import know_torchvision
from kalmannorm.rules.table import BLANK, FACTORIES, LIKE, OVERWRITING, PICKING, PLACES, SOURCES, aliases
from kalmannorm.steps import SCALARS, Step, ancestors, detached, found_in, put, state_of, step_of

_BASE = Tensor._base.__get__  # type: ignore[union-attr]

# The longest chain: a state that a network passes to itself must not grow one without end. A vision transformer makes
# some 1,000 calls between the BatchNorm of its stem and that at its end.
_LONGEST = 2000
# The attribute of a tensor of zeros: its state then, None where torch does not count changes.
_BLANK_AT = "_kalmannorm_blank"
_IS_LEARNED = "_kalmannorm_learned"  # the attribute of what parameters alone have made
_WITHOUT_GRAPH = frozenset((*aliases("detach"), Tensor.__setitem__))
_ASSIGNING = frozenset((Tensor.__setitem__, Tensor.index_put_))
_LAZY = frozenset((UninitializedBuffer, UninitializedParameter))  # which have no state yet
_IN_PLACE_RELUS = frozenset((F.relu, F.relu_, torch.relu_, Tensor.relu_))
# Functions of an activation and weights.
_OF_WEIGHTS = frozenset(
    function for function, its in RULES.items() if its.__module__.endswith((".linear", ".normalization"))
)
# Methods that are written in Python, by name.
_IN_PYTHON = {"__rsub__": torch.rsub, "pow": torch.pow, "__pow__": torch.pow, "norm": torch.norm,
              "unflatten": torch.unflatten}  # fmt: skip
# Functions whose methods a compiler cannot call, by the names that `operator` gives them; and what they are with their
# arguments exchanged.
_OF_MASKS = {
    "ge": (torch.ge, torch.le), "gt": (torch.gt, torch.lt), "le": (torch.le, torch.ge), "lt": (torch.lt, torch.gt),
    "eq": (torch.eq, torch.eq), "ne": (torch.ne, torch.ne), "and_": (torch.bitwise_and, torch.bitwise_and),
    "or_": (torch.bitwise_or, torch.bitwise_or), "invert": (torch.bitwise_not, torch.bitwise_not),
}  # fmt: skip
# The methods of tensors that have rules, under the names that `operator` gives them.
_OPERATORS = frozenset(
    name for name in dir(Tensor) if name.startswith("__") and getattr(Tensor, name) in (Tensor.__setitem__, *RULES)
)
# Inside of a normalization layer nothing is recorded.
paused = torch._C.DisableTorchFunction


class Recorder(TorchFunctionMode):
    """Records what happens to tensors that carry a step.

    Args:
        layers: the normalization layers that may ask for beliefs.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        super().__init__()
        know_torchvision()
        self.layers = layers
        self.waiting: dict[int, Gaussian] = {}  # of each thread, `input_stats` whose tensor has not been found yet
        self.opener: Any = None  # the module that was entered
        # Of each thread, another list in each forward pass: of its steps of `detach`.
        self.passes: dict[int, list[weakref.ref[Step]]] = {}
        self.without_prior: dict[str, str] = {}  # layers of this pass, and why
        self.of_threads: dict[int, KeptPriors] = {}

    @property
    def priors(self) -> KeptPriors:
        """The kept priors of this thread, as several threads may call one model in ``eval()``."""
        thread = threading.get_ident()
        if thread not in self.of_threads:
            self.of_threads[thread] = KeptPriors()
        return self.of_threads[thread]

    def await_input(self, given: Gaussian | None) -> Gaussian | None:
        """Set the `input_stats` whose tensor this thread still looks for, or None; return those before."""
        compiling = torch.compiler.is_dynamo_compiling()
        thread = 0 if compiling else threading.get_ident()
        before = None
        # A compiler knows no thread: a compiled part takes what it finds. Behind a graph break, what it waits for is
        # looked for here.
        for place in list(self.waiting) if compiling else (thread, 0):
            before = self.waiting.pop(place, None) or before
        if given is not None:
            self.waiting[thread] = given
        return before

    def _meet_input(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Give the waiting belief to the tensor that meets weights, if it fits; whether there are any weights."""
        tensors = list(found_in((*args, *kwargs.values()), Tensor))
        others = [each for each in tensors if not isinstance(each, nn.Parameter) and not is_made(each)]
        if len(others) == len(tensors):
            return False
        if func in _OF_WEIGHTS and (given := self.await_input(None)) is not None:
            self.await_input(started_on_first(given, others))
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]

    @traced_with_its_caller
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_resting(self):
            return func(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            func, args = _as_in_eager_mode(func, args)
        learns = bool(self.waiting) and self._meet_input(func, args, kwargs)
        # Before the call, as a function that works in place would hide an earlier change that was not recorded.
        of_tensor = args and isinstance(args[0], Tensor) and type(args[0]) not in _LAZY
        before = state_of(args[0]) if of_tensor else None
        first = step_of(args[0], now=before) if of_tensor else None
        if first is not None and func in _IN_PLACE_RELUS and _is_rectified_by_its_layer(func, args, kwargs, first):
            output = args[0]
        else:
            output = func(*args, **kwargs)
        if learns and self.waiting:
            _mark_as_learned(output)
        is_same = of_tensor and output is args[0] and before is not None and before == state_of(output)
        if func in FACTORIES or func == _BASE:  # `Tensor._base` computes nothing
            if func in BLANK and not torch.compiler.is_dynamo_compiling():
                setattr(output, _BLANK_AT, state_of(output))
        elif func in _ASSIGNING and len(args) == 3 and not kwargs.get("accumulate"):
            self._record_assignment(args, before)
        elif isinstance(output, Tensor) and not is_same:  # as `float` of what is float already is
            self._record(func, args, kwargs, output, None)
        elif isinstance(output, tuple | list) and not isinstance(output, torch.Size):
            return self._record_each(func, args, kwargs, output)
        return output

    def _record_each(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        """Record several outputs; return them, or the tensors that stand for them in a compiled graph."""
        if torch.compiler.is_dynamo_compiling():
            outputs = type(outputs)([alias(each) if isinstance(each, Tensor) else each for each in outputs])
        for i, each in enumerate(outputs):
            if isinstance(each, Tensor):
                self._record(func, args, kwargs, each, i)
        return outputs

    def _record(self, func: Any, args: Any, kwargs: Any, output: Tensor, index: int | None) -> None:
        _forget_zeros(output, *args[:1])
        parents: list[Step] = []
        picks, place = func in PICKING, PLACES.get(func)
        recorded, keywords = _with_steps(args, kwargs, parents, output, picks, place)
        if not parents and (picks or place) and func not in SOURCES:
            # A known tensor, perhaps by an index computed from the input.
            recorded, keywords = _with_steps(args, kwargs, parents, output, False)
        if (not parents and func not in SOURCES) or (func in LIKE and not isinstance(recorded[0], Step)):
            return
        if func is Tensor.view_as and len(args) == 2 and args[0] is args[1]:
            # How autograd copies the input that an autograd function returns. The functions of FSDP and DDP pass
            # gradients on as they are; what one of a user's makes of them (reversed, say) is not known.
            step = parents[0]
            put(output, step if torch.compiler.is_dynamo_compiling() or _is_called_by_torch() else detached(step))
            return
        if args and output is args[0] and not torch.compiler.is_compiling() and output._base is not None:
            attach(output._base, Unknown("a view of it was changed in place"), "")
        mark = self.this_pass()
        for parent in parents:
            if parent.recorded_in is not mark and parent.recorded_in is not None:
                with without_autocast(output.device):
                    settle(parent)
        unknown = _why_unknown(func, args, recorded, output, parents)
        if unknown is not None:
            attach(output, unknown, "")
            return
        step = Step(func, recorded, keywords, tuple(output.shape), index, parents=parents, recorded_in=mark)
        # A belief may have gradients that its tensor lacks: behind `detach`, of a mask, assigned under `no_grad`.
        if mark is not None and (not output.requires_grad if step.grad else func in _WITHOUT_GRAPH):
            mark.append(weakref.ref(step))
        put(output, step)

    def _record_assignment(self, args: Any, before: Any) -> None:
        """``target[index] = value``, of a tensor with a belief or of zeros, whose state was ``before``.

        The belief about a tensor of which the target is a view is lost.
        """
        target, index, value = args
        index = tuple(index) if isinstance(index, list) else index
        has_step = step_of(target, as_it_was=True) is not None
        if not has_step and not any([step_of(each) is not None for each in found_in((index, value), Tensor)]):
            _forget_zeros(target)
            return
        whole = None if torch.compiler.is_compiling() else target._base
        blank = getattr(target, _BLANK_AT, ()) == before
        itself = isinstance(value, Tensor) and value._base is target and step_of(value) is None
        if whole is None and has_step and _is_mask_of(index, target) and not isinstance(value, Tensor):
            self._record(torch.where, (index, value, target), {}, target, None)
            return
        if whole is None and not itself and (has_step or blank):
            into = target if has_step else target.new_zeros(()).expand(target.shape)  # it must not hold itself
            self._record(Tensor.__setitem__, (into, index, value), {}, target, None)
            return
        lost = Unknown("assigned in place, to a view or to what held no zeros")
        for each in (target, whole):
            if each is not None:
                attach(each, lost, "")

    def end_pass(self) -> None:
        """Free the graph behind what this thread's pass detached, where that is kept."""
        copies: dict[Step, Step] = {}
        for noted in self.this_pass() or ():
            if (step := noted()) is not None:
                let_go_of_graph(step, copies)

    def this_pass(self) -> list[weakref.ref[Step]] | None:
        """The mark of the pass that this thread is in; None to a compiler."""
        return None if torch.compiler.is_dynamo_compiling() else self.passes.get(threading.get_ident())


def _forget_zeros(*tensors: Any) -> None:
    """A function may have changed them, or made a view that will be: where torch does not count, zeros until then."""
    for each in tensors:
        if getattr(each, _BLANK_AT, ()) is None:
            setattr(each, _BLANK_AT, ())


def _why_unknown(func: Any, args: Any, recorded: Any, output: Tensor, parents: Sequence[Step]) -> Unknown | None:
    """Why nothing will be believed of an output, if that is known when it is recorded."""
    for parent in parents:
        if type(parent.belief) is Unknown and parent.function is None and not isinstance(parent.draws, Tensor):
            return parent.belief
        if parent.depth >= _LONGEST and true_depth(parent) >= _LONGEST:
            return Unknown(f"more than {_LONGEST} calls since the last normalization layer")
    if args and output is args[0] and not isinstance(recorded[0], Step) and func not in OVERWRITING:
        # The tensor now depends on the batch in a way that no rule describes.
        return Unknown("a known tensor was changed in place by an activation")
    if torch.compiler.is_dynamo_compiling() and getattr(func, "__module__", "") == "_operator":
        # A strict export cannot write such a function down, should the step leave the graph with its tensor.
        return Unknown(f"no rule for operator.{func.__name__}")
    return None


def _as_in_eager_mode(func: Any, args: Any) -> tuple[Any, Any]:
    """A compiler's call as in eager mode: ``operator.add`` as ``a + b``, and methods written in Python as functions."""
    name = getattr(func, "__name__", "")
    if name in _IN_PYTHON:
        return _IN_PYTHON[name], args
    if getattr(func, "__module__", "") != "_operator":
        return func, args
    reflected = not isinstance(args[0], Tensor)
    if name in _OF_MASKS and all([isinstance(each, Tensor | int | float) for each in args]):
        same, mirrored = _OF_MASKS[name]
        return (mirrored, args[::-1]) if reflected else (same, args)
    # What is left has no rule and needs none: torch's own methods for it take other arguments.
    method = f"__r{name}__" if reflected else f"__{name}__"
    if method not in _OPERATORS:
        return func, args
    return getattr(Tensor, method), args[::-1] if reflected else args


def _is_rectified_by_its_layer(func: Any, args: Any, kwargs: Any, step: Step) -> bool:
    """Rectify a layer's output in place, as a part of the layer, if nothing was computed from the output before."""
    if step.function is not None or step.is_used or torch.compiler.is_dynamo_compiling():
        return False
    if func is F.relu and kwargs.get("inplace") is not True:
        return False
    return rectify_output(args[0])


def _is_mask_of(index: Any, target: Tensor) -> bool:
    """Whether ``target[index] = value`` is ``torch.where(index, value, target)``: ``h[h < 0] = 0``."""
    return isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == target.shape


def _with_steps(args: Any, kwargs: Any, parents: list[Step], output: Tensor, picks: bool,
                place: int | None = None) -> tuple[Any, Any]:  # fmt: skip
    """Replace tensors by their steps, added to ``parents``. With ``picks``, whole numbers are indices, and stay; and so
    does the argument at ``place``.
    """
    recorded = tuple(
        [a if type(a) in SCALARS or i == place else _recorded(a, parents, output, picks) for i, a in enumerate(args)]
    )
    return recorded, {k: _recorded(v, parents, output, picks) for k, v in kwargs.items()} if kwargs else kwargs


def _recorded(value: Any, parents: list[Step], output: Tensor, picks: bool) -> Any:
    """One argument of :func:`_with_steps`."""
    kind = type(value)
    if kind is tuple or kind is list:
        if SCALARS.issuperset(map(type, value)):
            return value
        return kind([_recorded(v, parents, output, picks) for v in value])
    if not isinstance(value, Tensor) or (picks and not value.is_floating_point()):
        return value
    if (step := step_of(value, as_it_was=value is output)) is not None:
        step.is_used = True
        parents.append(step)
        return step
    return value


def _is_called_by_torch() -> bool:
    """Whether the recorded function was called by torch itself, and not by a user's code."""
    frame = sys._getframe(3)
    while frame.f_globals.get("__name__") == "torch.autograd.function" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("torch.")


def is_resting(mode: Recorder) -> bool:
    """Whether all priors of this pass are kept ones, so that nothing is recorded."""
    if torch.compiler.is_dynamo_compiling() or not mode.of_threads:
        return False
    return mode.priors.are_complete


def is_open() -> bool:
    """Whether a mode is recording in this thread."""
    return current() is not None


def current() -> Recorder | None:
    """The mode that is recording in this thread, if any."""
    for mode in torch.overrides._get_current_function_mode_stack():
        if isinstance(mode, Recorder):
            return mode
    return None


def attach(tensor: Tensor, belief: Belief, source: str) -> None:
    """Attach a belief to a tensor: a step where a chain starts. Its source is a layer's name, or "input"."""
    shape = tuple(tensor.shape)
    if isinstance(belief, Gaussian):
        belief = belief.of(shape)
    step = Step(None, (), {}, shape, source=source, belief=belief, parents=())
    put(tensor, step)
    if step.hooks is not None and (mode := current()) is not None:
        # A checkpointed region runs again with an open mode, too: it may be a function, which opens none itself.
        enter_again(step.hooks, lambda: Recorder(mode.layers))
        if (mark := mode.this_pass()) is not None:
            mark.clear()  # the second run computes beliefs from the steps before it as the first one did


def started_on_first(given: Gaussian, values: Any, *, inside: bool = False) -> Gaussian | None:
    """Attach a belief about the network's input to the first tensor that fits, unless that has one; return it if none
    fits. Single numbers go to an argument itself. ``inside`` of a network, what parameters have made is no input.
    """
    anywhere = given.mean.ndim == 0
    for tensor in values if anywhere else found_in(values, Tensor):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or (inside and is_made(tensor)):
            continue
        if tensor.ndim < 2 or not fits(given, tensor):
            return given
        step = step_of(tensor)
        if step is None or step.belief is None or isinstance(step.belief, Unknown):
            attach(tensor, laid_out(given, tensor), "input")
        return None
    return given


def _mark_as_learned(values: Any) -> None:
    for each in found_in((values,), Tensor):
        setattr(each, _IS_LEARNED, True)


def is_made(tensor: Tensor) -> bool:
    """Whether a tensor was made by parameters alone, or comes from a normalization layer."""
    if getattr(tensor, _IS_LEARNED, False):
        return True
    below = () if (step := step_of(tensor)) is None else ancestors(step)
    return any(each.function is None and each.source not in ("", "input") for each in below)


def fits(given: Gaussian, tensor: Tensor) -> bool:
    """Whether a belief about channels, ``(C,)``, or about all of them, suits an input ``(N, C, *)``."""
    return given.mean.ndim == 0 or (tensor.ndim >= 2 and tensor.shape[1] == len(given.mean))


def laid_out(given: Gaussian, tensor: Tensor) -> Gaussian:
    """``(C,)`` as ``(1, C, 1, ...)``, of the tensor's rank; one number as size 1 along each axis."""
    dtype, shape = torch.promote_types(tensor.dtype, torch.float32), [1] * tensor.ndim
    if given.mean.ndim:
        shape[1] = -1
    return given.map(lambda t: t.to(tensor.device, dtype).view(shape))
