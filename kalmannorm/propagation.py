"""How beliefs travel: a mode that watches torch calls.

While a network runs, every torch function that meets a tensor with a belief is *recorded* on its
output as a :class:`~kalmannorm.steps.Step`. Nothing is computed then. The next normalization layer asks
for the belief of its input (:func:`kalmannorm.evaluation.prior_of`), and only then the chain below is
evaluated. So what no layer asks for, a classifier's head for one, costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kalmannorm.checkpoints import enter_again
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.rules import FACTORIES, LIKE, Belief
from kalmannorm.steps import Step, put, replace, saved_tensor_hooks, step_of

__all__ = ["Propagation", "attach", "current", "is_open", "paused"]

_BASE = Tensor._base.__get__  # type: ignore[union-attr]

# A state that a network hands to itself from call to call must not grow a chain without end. A vision
# transformer with BatchNorm in its stem and at its end makes some 1,000 calls in between.
_LONGEST = 2000

# Inside a normalization layer the mode has nothing to watch.
paused = torch._C.DisableTorchFunction


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
        if func in LIKE and step_of(args[0]) is None:
            return
        if func is Tensor.view_as and len(args) == 2 and args[0] is args[1]:
            # How autograd copies the input that an autograd function returns: without grad, but the
            # function's own gradient follows.
            put(output, step_of(args[0]))
            return
        if args and output is args[0] and not torch.compiler.is_compiling() and output._base is not None:
            attach(output._base, Unknown("a view of it was changed in place"), "")
        recorded = tuple([replace(a, Tensor, _step_or_tensor) for a in args])
        keywords = {k: replace(v, Tensor, _step_or_tensor) for k, v in kwargs.items()}
        step = Step(func, recorded, keywords, tuple(output.shape), index)
        if step.depth > _LONGEST:
            attach(output, Unknown(f"more than {_LONGEST} calls since the last normalization layer"), "")
        else:
            put(output, step)


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
    return current() is not None


def current() -> Propagation | None:
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
    if (mode := current()) is not None:
        _stay_open(mode.layers)
    if isinstance(belief, Gaussian):
        belief = Gaussian(belief.mean, belief.var, shape)
    put(tensor, Step(None, (), {}, shape, source=source, belief=belief))


def _stay_open(layers: Sequence[Any]) -> None:
    """A checkpointed region that finds the mode open must find it open when it runs again.

    Watched modules inside open it themselves, but a region may be any function.
    """
    if (hooks := saved_tensor_hooks()) is not None:
        enter_again(hooks, lambda: Propagation(layers))


def _step_or_tensor(tensor: Tensor) -> Step | Tensor:
    return step_of(tensor) or tensor
