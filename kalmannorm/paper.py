"""The paper's and its released code's choices: presets, and Monte-Carlo draws. `docs/evidence.md` compares them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.autograd import in_grad_mode, saved_tensor_hooks
from kalmannorm.propagation import (
    FAILURES,
    NO_INPUT,
    evaluate,
    exact,
    first_line,
    function_name,
    is_of_device,
    operands,
)
from kalmannorm.rules import RULES, Belief
from kalmannorm.rules.shape import reshape
from kalmannorm.rules.table import PLACES
from kalmannorm.steps import Step, computed_in, may_use, replace, step_of

# How many values a channel give a variance.
_FEWEST = 16

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"gain": "learned", "process_noise": True, "spread": False, "carry": "posterior",
              "estimator": "monte_carlo", "guard": None},
    "released": {"gain": 0.1, "process_noise": False, "spread": True, "carry": "posterior",
                 "estimator": "monte_carlo", "guard": 100.0},
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """Keyword options that reproduce a published variant.

    You need it to compare with the paper; the default scored better in our runs (docs/evidence.md).

    ``"paper"`` is Eq. 7: gain and process noise learned, the posterior passed on, Monte-Carlo draws.
    ``"released"`` is the authors' TensorFlow code: gain fixed at its value for 2 samples a group (it
    has 0.95 for 128: ``{**kn.preset("released"), "gain": 0.95}``), no process noise, the mixture's
    variance, a guard at 100.

    Raises:
        ValueError: for another name.

    Example:
        >>> import kalmannorm as kn
        >>> kn.KalmanNorm2d(8, **kn.preset("paper")).carry
        'posterior'
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}, expected one of {sorted(_PRESETS)}")
    return dict(_PRESETS[name])


def drawn_belief(tensor: Tensor, groups: int) -> Belief:
    """The moments ``(S, C)`` of draws, as :func:`kalmannorm.propagation.belief_for` gives those of the rules."""
    step = step_of(tensor)
    if step is None:
        return NO_INPUT
    draws = drawn(step, maps_for(step.shape, groups))
    if isinstance(draws, Unknown):
        return draws
    if draws.shape[1:] != tensor.shape[1:] or draws.shape[0] % groups:
        return Unknown("its draws have another shape than the activation")
    return Gaussian.of_draws(draws, groups)


def maps_for(shape: Sequence[int], groups: int) -> int:
    """How many feature maps to draw for a layer: one a group (section 3.2), or where that is one value a channel, as
    many as samples, or as give a variance.
    """
    if math.prod(shape[2:]) > 1:
        return groups
    return shape[0] if shape[0] > groups else _FEWEST * groups


def drawn(step: Step, maps: int) -> Tensor | Unknown:
    """Draw feature maps and put them through the same functions as the activation, ``(maps, C, *)``."""
    now = saved_tensor_hooks()

    def kept(step: Step) -> Tensor | Unknown | None:
        draws = step.draws
        if draws is None or not may_use(step.draws_in, step, now):
            return None
        return draws if isinstance(draws, Unknown) or step.maps_drawn == maps else None

    def draw(step: Step) -> Tensor | Unknown:
        draws = _draw(step, maps) if step.function is None else _by_call(step, kept)
        step.draws, step.draws_in, step.depth = draws, computed_in(step.draws, now), 0
        step.maps_drawn = maps
        return draws

    return evaluate(step, kept, draw)


def _draw(step: Step, maps: int) -> Tensor | Unknown:
    belief = exact(step)
    if isinstance(belief, Unknown):
        return belief
    maps = maps if len(step.shape) > 2 else max(maps, step.shape[0])  # a vector of each sample
    with in_grad_mode(step.grad):
        return belief.draw((maps, *step.shape[1:]))


def _by_call(step: Step, kept: Callable[[Step], Any]) -> Tensor | Unknown:
    called = operands(step, kept)
    if isinstance(called, Unknown):
        return called
    args, kwargs = called
    name = step.function.__name__  # type: ignore[union-attr]
    if kwargs.get("training") and "norm" in name:
        return Unknown(f"{function_name(step.function)} changes buffers, so it is not put to draws")
    if step.function in PLACES or step.function is Tensor.__setitem__:
        return Unknown(f"{function_name(step.function)} is told places in these samples, so it is not put to draws")
    # The function may work in place, and other steps still need these draws. (A compiler drops unused copies, and
    # torch 2.14's does not know the names of functions.)
    if torch.compiler.is_compiling() or name.endswith("_") or kwargs.get("inplace"):
        args = replace(args, Tensor, Tensor.clone)
    try:
        with in_grad_mode(step.grad):
            output = _call(step, args, kwargs)
        output = output if step.index is None else output[step.index]
    except FAILURES as error:  # torch's own functions assert shapes, too
        if is_of_device(error):
            raise
        return Unknown(f"{function_name(step.function)} fails on draws: {first_line(error)}")
    if not output.is_floating_point():
        return Unknown(f"{function_name(step.function)} is not continuous")
    if output.ndim != len(step.shape):  # `squeeze` of one map, say, where there are several samples
        return Unknown(f"{function_name(step.function)} gives draws of another rank than the activation's")
    return output  # type: ignore[no-any-return]


def _call(step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a step's function with draws. A network may write its number of samples down, `x.view(8, -1)`, so that a
    reshape of samples is told what becomes of each.
    """
    before = step.parents[0].shape
    of_samples = args and RULES.get(step.function) is reshape and args[0].shape[1:] == before[1:]  # type: ignore[arg-type]
    if not of_samples or torch.dtype in map(type, (*args, *kwargs.values())):
        return step.function(*args, **kwargs)  # type: ignore[misc]
    maps, rest = divmod(len(args[0]) * step.shape[0], before[0])
    if rest:
        raise ValueError("it puts several samples into one")
    return args[0].reshape(maps, *step.shape[1:])
