"""The arguments of `layer` and of its backends."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


class Given(NamedTuple):
    """The prior and a layer's vectors, each None where there is none."""

    # Mean and variance, without process noise: `(2, S, C)` or `(2, 1, C)`, perhaps with axes of size 1 behind. Without
    # a prior the gain is 1.
    prior: Tensor | None = None
    shift: Tensor | None = None  # (C,), added to the prior's mean
    scale: Tensor | None = None  # (C,), by which its variance, with process noise, is multiplied
    gain: Tensor | None = None  # (1,), see `Options`
    noise: Tensor | None = None  # (C,), see `Options`
    weight: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)


class Options(NamedTuple):
    """How to fuse an observation with a prior, and whether to rectify the output."""

    groups: int = 1  # `S`: statistic groups, consecutive blocks of `N / S` samples
    gain_samples: int = 1  # `n`, whose logarithm is added to the offset: see `for_kernels`
    gain_slope: float = 0.0  # 0: the gain is given as it is; else it is `sigmoid(slope * gain + offset + log n)`
    gain_offset: float = 0.0  # without a gain, the gain itself
    noise_scale: float = 1.0  # the process noise is `scale * exp(noise)` of the variance without it
    spread: bool = True
    eps: float = 1e-5
    relu: bool = False

    @lru_cache(maxsize=4096)  # noqa: B019 - of tuples of numbers
    def for_kernels(self) -> Options:
        """With ``n`` in the offset. Before that a compiler may vary it with the batch."""
        return self._replace(gain_samples=1, gain_offset=self.gain_offset + math.log(self.gain_samples))

    @lru_cache(maxsize=4096)  # noqa: B019
    def with_relu(self) -> Options:
        """The same, and rectify."""
        return self._replace(relu=True)


class Running(NamedTuple):
    """Running statistics, updated in place."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,), averages of the unbiased variance
    batches: Tensor  # how many there were, a scalar
    nonfinite: Tensor  # how many of them had a channel that was not finite, which kept its last value
    momentum: float | Tensor  # weight of the newest batch; a tensor under torch.func alone
