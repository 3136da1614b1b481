"""BatchNorm by parts of a batch: Ghost BatchNorm (Hoffer et al., 2017, arXiv:1705.08741)."""

from __future__ import annotations

from torch import nn

import kalmannorm


def to_ghost(model: nn.Module, samples: int = 2) -> nn.Module:
    """Make every BatchNorm inside ``model``, in place, normalize groups of `samples` samples by themselves.

    The layers are `kalmannorm.KalmanNorm2d` and the like with ``gain=1.0``, which is BatchNorm, by groups. The
    running statistics move once a step towards the mean over groups; Hoffer et al. move them once a group.

    Args:
        model: Any network with BatchNorm layers.
        samples: Samples a group; must divide every batch. The paper has 128; 2 is the KN paper's smallest.

    Returns:
        The same ``model``.

    Example:
        >>> to_ghost(nn.Sequential(nn.BatchNorm2d(8)), 4)[0].stats_batch_size
        4
    """
    return kalmannorm.convert(model, gain=1.0, process_noise=False, stats_batch_size=samples)
