"""What the backends of `layer` and `link` are told."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Filter", "Running"]


class Filter(NamedTuple):
    """How an observation and a prior are fused, and what is done to the result."""

    groups: int = 1
    """``S``: statistic groups, consecutive blocks of ``N / S`` samples."""
    gain_slope: float = 0.0
    """0 where the gain is given as it is; else it is ``sigmoid(slope * gain + offset)``."""
    gain_offset: float = 0.0
    """Where no gain is given, the gain itself."""
    noise_scale: float = 0.0
    """0 where the process noise is given as it is; else it is ``scale * exp(noise)``."""
    spread: bool = True
    eps: float = 1e-5
    relu: bool = False


class Running(NamedTuple):
    """Running statistics, moved along in place."""

    mean: Tensor
    """``(C,)``."""
    var: Tensor
    """``(C,)``, averages of the unbiased variance."""
    batches: Tensor
    """How many there were, a scalar."""
    nonfinite: Tensor
    """How many of them had a channel whose statistics were not finite, which kept its last value."""
    momentum: float | Tensor
    """Weight of the newest batch; a tensor under torch.func alone."""
