"""Batch Renormalization (Ioffe, 2017, arXiv:1702.03275)."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from kalmannorm.lab.baselines.replacing import AnyBatchNorm, in_groups, replace_batchnorm


@dataclass(frozen=True)
class RenormSchedule:
    """The limits of `r` and `d` over training steps, by default as in the paper's experiments.

    Until step `start` they are 1 and 0, which is BatchNorm; then they grow linearly to `r_max` at
    step `r_until` and to `d_max` at step `d_until`.
    """

    start: float = 5_000
    r_until: float = 40_000
    d_until: float = 25_000
    r_max: float = 3.0
    d_max: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= min(self.r_until, self.d_until):
            raise ValueError(
                f"RenormSchedule got start={self.start}, r_until={self.r_until} and d_until={self.d_until}, expected "
                "0 <= start <= r_until, d_until"
            )
        _check_limits("RenormSchedule", self.r_max, self.d_max)

    def scaled(self, factor: float) -> Self:
        """The same schedule over `factor` times as many steps."""
        return type(self)(self.start * factor, self.r_until * factor, self.d_until * factor, self.r_max, self.d_max)

    def delayed(self, steps: float) -> Self:
        """The same schedule, `steps` later."""
        moved = (self.start + steps, self.r_until + steps, self.d_until + steps)
        return type(self)(*moved, self.r_max, self.d_max)

    def limits(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """``r_max`` and ``d_max`` after `step` steps."""

        def share(until: float) -> Tensor:
            return ((step - self.start) / max(until - self.start, 1)).clamp(0, 1)

        return 1 + (self.r_max - 1) * share(self.r_until), self.d_max * share(self.d_until)


def _check_limits(name: str, r_max: float, d_max: float) -> None:
    if not (r_max >= 1 and d_max >= 0):
        raise ValueError(f"{name} got r_max={r_max} and d_max={d_max}, expected r_max >= 1 and d_max >= 0")


class BatchRenorm(AnyBatchNorm):
    """Batch Renormalization of 2-d to 5-d inputs: BatchNorm, corrected towards its moving averages.

    With the batch's mean ``m``, ``s = sqrt(var + eps)``, and moving averages ``mu`` and ``sigma``:

        r = clip(s / sigma, 1 / r_max, r_max)        d = clip((m - mu) / sigma, -d_max, d_max)
        y = weight * ((x - m) / s * r + d) + bias

    No gradient flows through ``r`` and ``d``. Unclipped, ``y`` is the normalization by the moving
    averages, as in ``eval()``; at ``r_max=1, d_max=0`` it is BatchNorm.

    As in Algorithm 1, ``sigma`` is averaged, not its square: ``running_var`` holds ``sigma^2 -
    eps``. The initial ``running_var`` of 1 is not an estimate, so without a schedule the first steps
    clip; the paper's schedule therefore begins as BatchNorm.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, *)``; ``eps``, ``affine``: as BatchNorm's.
        momentum: Weight of the newest batch in the averages (the paper's alpha, 0.01); None for
            their plain mean.
        schedule: The limits over training steps, counted by ``num_batches_tracked``; or one pair
            ``(r_max, d_max)`` for all steps.
        samples: In training, normalize groups of this many consecutive samples, each by its own
            ``m`` and ``s``. The averages are shared, and updated once, by the means over groups.
            None for the whole batch.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.01, affine: bool = True,
                 schedule: RenormSchedule | tuple[float, float] | None = None,
                 samples: int | None = None) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine)
        self.samples = samples
        self.schedule: Any = RenormSchedule() if schedule is None else schedule
        if isinstance(self.schedule, tuple):
            _check_limits("BatchRenorm", *self.schedule)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        x = in_groups(input.to(torch.promote_types(input.dtype, torch.float32)), self.samples)
        var, mean = torch.var_mean(x, [1, *range(3, x.ndim)], correction=0)  # (groups, C)
        std = (var + self.eps).sqrt()
        r, d = self._correct_and_update(mean.detach(), std.detach())
        scale = r / std
        y = self._scaled(x, scale, d - mean * scale, (len(x), 1, -1, *[1] * (x.ndim - 3)))
        return y.view(input.shape).to(input.dtype)

    @torch.no_grad()
    def _correct_and_update(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """``r`` and ``d``, ``(groups, C)``, by the averages before this batch updates them."""
        sigma = (self.running_var + self.eps).sqrt()
        fixed = isinstance(self.schedule, tuple)
        r_max, d_max = self.schedule if fixed else self.schedule.limits(self.num_batches_tracked)
        r = (std / sigma).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / sigma).clamp(-d_max, d_max)
        newest = self._count()
        self.running_mean += newest * (mean.mean(0) - self.running_mean)
        # If all pixels are equal, rounding could give a negative variance.
        self.running_var.copy_(((sigma + newest * (std.mean(0) - sigma)).square() - self.eps).clamp_min(0))
        return r, d


def to_batch_renorm(model: nn.Module, **options: Any) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by `BatchRenorm`.

    ``RenormSchedule().scaled(0.01)`` suits a training a hundred times shorter than the paper's.

    Example:
        >>> to_batch_renorm(nn.Sequential(nn.BatchNorm2d(8)), schedule=(3, 5))[0].schedule
        (3, 5)
    """
    return replace_batchnorm(
        model, lambda norm: BatchRenorm(norm.num_features, norm.eps, affine=norm.affine, **options)
    )
