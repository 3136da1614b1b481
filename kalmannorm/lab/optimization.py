"""SGD: its parameter groups for weight decay, and the schedule of its rate."""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

Schedule = Literal["cosine", "warmup", "milestones"]

# torch's name for the `g` of ``w = g v / |v|``.
_SCALE = "parametrizations.weight.original0"


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups that decay only the weights of convolutions and linear layers.

    Scales, shifts, biases, gains and process noise have fewer than two dimensions, except for the scales of weight
    normalization. Decay would pull gains and noise towards arbitrary values, differently in each method.
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
    """SGD and a schedule of its rate, updated every step, as ``configure_optimizers`` returns them.

    ``"cosine"`` falls to 0 over ``steps``; ``"warmup"`` also rises over the first tenth of them, as any
    schedule does with ``warmup=True``. ``"milestones"`` maps shares of the training, 0 to 1, to the
    factor on the rate from there on. Only weights are decayed, see `parameter_groups`.
    """
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay), lr=rate, momentum=momentum)
    factor = partial(share_of_rate, steps=steps, schedule=schedule, milestones=milestones, warmup=warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def check_schedule(rate: float, steps: int, schedule: Schedule, milestones: dict[float, float] | None) -> None:
    """Raise a ValueError for arguments that `sgd` does not support."""
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
