"""A wider BatchNorm network with as many parameters as another one (arXiv:1802.03133v1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["matching_width", "parameter_count"]


def parameter_count(model: nn.Module) -> int:
    """Numbers that training changes or could change; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def matching_width(build: Callable[[float], nn.Module], parameters: int, precision: float = 1e-4) -> float:
    """The width multiplier at which a network has nearly as many parameters as another one.

    Channels are whole numbers, so the count grows in jumps; of the widths around the jump that passes
    `parameters`, this is the one whose count is nearest. Networks are built on torch's meta device, where they
    cost no memory.

    Args:
        build: From a width multiplier to a network. The count must not fall where the width grows.
        parameters: The count to reach, `parameter_count` of the other network.
        precision: How exactly the jump is located.

    Returns:
        The width, above 0.

    Raises:
        ValueError: Where no width from 1/1024 to 1024 reaches the count.

    Example:
        >>> width = matching_width(lambda width: nn.Linear(round(10 * width), 1, bias=False), 20)
        >>> round(10 * width)
        20
    """

    def count(width: float) -> int:
        with torch.device("meta"):
            return parameter_count(build(width))

    low = high = 1.0
    while count(low) > parameters and low > 2**-10:
        low /= 2
    while count(high) < parameters and high < 2**10:
        high *= 2
    if not count(low) <= parameters <= count(high):
        raise ValueError(
            f"matching_width got {parameters} parameters to match, expected a count from {count(low)}, at width {low}, "
            f"to {count(high)}, at width {high}"
        )
    # From here on: count(low) <= parameters <= count(high).
    while high - low > precision * low:
        middle = (low + high) / 2
        if count(middle) <= parameters:
            low = middle
        else:
            high = middle
    return min(low, high, key=lambda width: abs(count(width) - parameters))
