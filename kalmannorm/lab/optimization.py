"""SGD, who is decayed by it, and the course of its rate."""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

Schedule = Literal["cosine", "warmup", "milestones"]

# What torch calls the `g` of ``w = g v / |v|``.
_SCALE = "parametrizations.weight.original0"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay the weights of convolutions and linear layers and nothing else.

    Scales, shifts, biases, gains and process noise all have fewer than two dimensions, but for the scales of
    weight normalization; a decay would pull a gain or a noise towards a value that nobody chose, and pull
    differently in each method.
    """
    is_decayed = {p: p.ndim > 1 and not name.endswith(_SCALE) for name, p in model.named_parameters()}
    weights = [p for p, decayed in is_decayed.items() if decayed]
    others = [p for p, decayed in is_decayed.items() if not decayed]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def sgd(
    model: nn.Module,
    rate: float,
    steps: int,
    schedule: Schedule = "cosine",
    milestones: dict[float, float] | None = None,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: bool = False,
) -> dict[str, Any]:
    """SGD with a rate that moves every step, as ``configure_optimizers`` returns it.

    The schedule is laid out for so many steps: ``"cosine"`` falls to 0; ``"warmup"`` too, but rises
    over the first tenth of the steps, which any schedule does with ``warmup``. The ``"milestones"``
    are from a share of the training, 0 to 1, to the factor on the rate from there on. Weights alone
    are decayed, see `parameter_groups`.
    """
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay), lr=rate, momentum=momentum)
    factor = partial(share_of_rate, steps=steps, schedule=schedule, milestones=milestones, warmup=warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def check_schedule(rate: float, steps: int, schedule: Schedule, milestones: dict[float, float] | None) -> None:
    """Refuse what `sgd` cannot do, when a module is made."""
    if schedule not in ("cosine", "warmup", "milestones"):
        raise ValueError(f"schedule must be 'cosine', 'warmup' or 'milestones'; got {schedule!r}")
    if (milestones is not None) != (schedule == "milestones"):
        raise ValueError(f"milestones go with schedule='milestones'; got {milestones} with {schedule!r}")
    for share in milestones or {}:
        if not 0 <= share <= 1:
            raise ValueError(f"milestones must be at shares of the training, 0 to 1; got {share}")
    if steps < 1 or not 0 < rate < math.inf:
        raise ValueError(f"steps must be at least 1 and the rate above 0; got steps={steps}, rate={rate}")


def share_of_rate(
    step: int, steps: int, schedule: Schedule, milestones: dict[float, float] | None = None, warmup: bool = False
) -> float:
    """The factor on the rate at a step, counted from 0; see `sgd`."""
    done = step / steps
    rise = min(1.0, 10 * done + 1 / steps) if warmup or schedule == "warmup" else 1.0
    if schedule == "milestones":
        passed = [milestone for milestone in (milestones or {}).items() if milestone[0] <= done]
        return rise * max(passed, default=(0.0, 1.0))[1]
    return rise * (1 + math.cos(math.pi * done)) / 2
