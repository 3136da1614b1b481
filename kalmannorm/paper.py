"""The paper's and its released code's choices: presets, and Monte-Carlo draws. `docs/evidence.md` compares them."""

from __future__ import annotations

from collections.abc import Callable
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
from kalmannorm.rules import Belief
from kalmannorm.rules.table import PLACES
from kalmannorm.steps import Step, computed_in, may_use, replace, step_of

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
    draws = drawn(step, groups)
    return draws if isinstance(draws, Unknown) else Gaussian.of_draws(draws, groups)


def drawn(step: Step, groups: int) -> Tensor | Unknown:
    """Draw one feature map a group and put it through the same functions as the activation (section 3.2).

    Returns:
        ``(S, C, *)``; for activations without pixels, a draw of each sample, ``(N, C)``.
    """
    now = saved_tensor_hooks()

    def kept(step: Step) -> Tensor | Unknown | None:
        draws = step.draws
        if draws is None or not may_use(step.draws_in, step, now):
            return None
        return draws if isinstance(draws, Unknown) or step.groups_drawn == groups else None

    def draw(step: Step) -> Tensor | Unknown:
        draws = _draw(step, groups) if step.function is None else _by_call(step, kept)
        step.draws, step.draws_in, step.depth = draws, computed_in(step.draws, now), 0
        step.groups_drawn = groups
        return draws

    return evaluate(step, kept, draw)


def _draw(step: Step, groups: int) -> Tensor | Unknown:
    belief = exact(step)
    if isinstance(belief, Unknown):
        return belief
    maps = groups if len(step.shape) > 2 else step.shape[0]
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
            output = step.function(*args, **kwargs)  # type: ignore[misc]
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
