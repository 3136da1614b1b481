"""What Kalman Normalization is compared with, each as a replacement of BatchNorm layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kalmannorm.lab.baselines.cross_iteration import to_cross_iteration
from kalmannorm.lab.baselines.evonorm import to_evonorm
from kalmannorm.lab.baselines.frn import to_frn
from kalmannorm.lab.baselines.frozen import to_frozen
from kalmannorm.lab.baselines.ghost import to_ghost
from kalmannorm.lab.baselines.group import to_groupnorm
from kalmannorm.lab.baselines.layer_instance import to_instancenorm, to_layernorm
from kalmannorm.lab.baselines.moving_average import to_moving_average
from kalmannorm.lab.baselines.renorm import to_batch_renorm
from kalmannorm.lab.baselines.synchronized import to_sync
from kalmannorm.lab.baselines.weight_norm import to_weight_norm

__all__ = ["BASELINES"]


def _keep(model: nn.Module) -> nn.Module:
    return model


# From a network built with BatchNorm to the same one with another method. Options are each method's defaults, so
# steps are counted in the papers' units: "brn", "mabn" and "cbn" want shorter schedules in a short training.
# "evonorm" and "frn" trace the network (see `activated`), and "ghost" wants batches of an even size.
BASELINES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bn": _keep,
    "brn": to_batch_renorm,
    "gn": to_groupnorm,
    "ln": to_layernorm,
    "in": to_instancenorm,
    "wn": to_weight_norm,
    "frozen": to_frozen,
    "ghost": to_ghost,
    "sync": to_sync,
    "mabn": to_moving_average,
    "cbn": to_cross_iteration,
    "evonorm": to_evonorm,
    "frn": to_frn,
}
