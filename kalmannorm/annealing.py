"""A gain that falls while a network trains."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from kalmannorm.traversal import kalman_layers

_M = TypeVar("_M", bound=nn.Module)


@torch.no_grad()
def anneal(model: _M, factor: float) -> _M:
    """Make each prior worth ``factor`` times as many samples: divide the odds ``q / (1 - q)`` of every learned gain.

    Early in training a batch's own statistics stabilize a layer; in ``eval()`` they are not used. Called after each
    optimizer step, with a root of the final factor, this leads from one to the other (docs/evidence.md, "How far to
    trust a batch"). Gains are still learned; fixed gains and those of frozen layers stay.

    Args:
        model: the network, changed in place.
        factor: above 0; above 1 for smaller gains.

    Returns:
        The model.

    Raises:
        ValueError: for another factor; for one so near 1 that the type of a gain cannot hold the change (bfloat16:
            below 1.07); for a model without a Kalman layer that learns its gain.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model, steps = torch.nn.Sequential(kn.KalmanNorm2d(8)), 100
        >>> print(f"{model[0].kalman_gain(2).item():.3f}")
        0.100
        >>> for _ in range(steps):  # after optimizer.step()
        ...     _ = kn.anneal(model, 10 ** (1 / steps))
        >>> print(f"{model[0].kalman_gain(2).item():.3f}")  # 2 / (2 + 10 * 18)
        0.011
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"kalmannorm.anneal got factor={factor!r}, expected a number above 0")
    learned = [(layer, layer.gain) for _, layer in kalman_layers(model) if isinstance(layer.gain, Tensor)]
    if not learned:
        raise ValueError(f"{type(model).__name__} has no Kalman layer that learns its gain, expected at least one")
    step = math.log(factor)
    for dtype in {gain.dtype for _, gain in learned}:
        if 0 < abs(step) < 8 * torch.finfo(dtype).eps:
            raise ValueError(
                f"kalmannorm.anneal got factor={factor!r}, which gains of type {dtype} cannot hold: expected Kalman "
                "layers in torch.float32, or a larger factor now and then"
            )
    for rule, sign in (("prior-strength", 1.0), ("learned", -1.0)):
        gains = [gain for layer, gain in learned if layer.gain_rule == rule and not layer.frozen]
        if gains:
            torch._foreach_add_(gains, sign * step)
    return model
