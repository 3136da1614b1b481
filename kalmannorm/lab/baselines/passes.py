"""Layers in networks that take the images of one optimizer step in several forward passes."""

from __future__ import annotations

from typing import Any

from torch import nn

from kalmannorm.modules import is_stock_batchnorm

__all__ = ["count_in_steps"]


def count_in_steps(model: nn.Module, passes: int) -> nn.Module:
    """Let layers that count forward passes count optimizer steps, in place: for BatchNorm and what is derived from it.

    The ``passes`` of a step move a moving average as much as a single one did before, for this momentum:

        (1 - momentum of a pass)^passes = 1 - momentum

    A plain mean (momentum None) is one already. Windows and schedules in steps read the layer's ``passes``.

    Args:
        model: Any network; again with another number, if that changes.
        passes: Forward passes an optimizer step.

    Returns:
        The same ``model``.

    Example:
        >>> count_in_steps(nn.BatchNorm2d(8, momentum=0.75), 2).momentum
        0.5
    """
    counting: list[Any] = [layer for layer in model.modules() if is_stock_batchnorm(layer)]
    for layer in counting:
        before, layer.passes = getattr(layer, "passes", 1), passes
        if layer.momentum is not None:
            layer.momentum = 1 - (1 - layer.momentum) ** (before / passes)
    return model
