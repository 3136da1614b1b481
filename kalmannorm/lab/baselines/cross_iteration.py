"""Cross-Iteration Batch Normalization (Yao et al., 2021, arXiv:2002.05712)."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kalmannorm.lab.baselines.replacing import AnyBatchNorm, replace_batchnorm


@dataclass(frozen=True)
class _Iteration:
    """A past batch: mean and second moment ``(2, C)``, their derivatives ``(2, C, K)``, filters ``(C, K)``."""

    moments: Tensor
    slopes: Tensor
    filters: Tensor
    pixels: int

    def under(self, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance for other filters, to first order; the variance is at least 0."""
        mean, square = self.moments + (self.slopes * (filters - self.filters)).sum(2)
        return mean, (square - mean.square()).clamp_min(0)


class CrossIterationNorm(AnyBatchNorm):
    """CBN: BatchNorm over the batches of the last iterations, compensated for the change of the weights.

    With the mean ``mu`` and second moment ``nu`` of iteration ``s``, and the filters ``theta`` of
    the convolution right below, each channel's statistics are carried to iteration ``t`` to first
    order in its own filter:

        mu(s -> t) = mu(s) + dmu/dtheta (theta(t) - theta(s))       nu(s -> t) likewise
        mean = average of mu(s -> t)        var = average of max(nu(s -> t), mu(s -> t)^2) - mean^2

    over the last `window` iterations, or as many as there were. Gradients flow through the current
    iteration's statistics only. ``eval()`` is BatchNorm's, by moving averages of ``mean`` and ``var``.

    An iteration is a step of the optimizer. If it has several forward passes (`passes`), each is
    treated as a device: it uses the past batches of the same pass. All are stored, so memory grows
    with their number. See `kalmannorm.lab.baselines.replacing.count_in_steps`.

    A forward hook (`announce`) marks the output of the layer below. Without a convolution or linear
    layer directly below, or without gradients (`torch.no_grad`), the layer is BatchNorm and stores
    nothing. A changed bias below is not compensated. The past iterations are not in the
    ``state_dict``, and are dropped when the layer changes its device or dtype.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, *)``; the next three are BatchNorm's too.
        window: Iterations in the average (the paper's k): the current one and a buffer of past
            ones, 3 in the authors' released configuration,
            ``mask_rcnn_r50_fpn_cbn_buffer3_burnin8_1x.py``.
        burn_in: First training steps, which are BatchNorm's; 8 of 12 epochs in that configuration.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True, *,
                 window: int = 4, burn_in: int = 0) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine)
        if window < 1:
            raise ValueError(f"CrossIterationNorm got window={window}, expected 1 or more")
        self.window, self.burn_in = window, burn_in
        self.passes = 1
        self._past: deque[_Iteration] = deque()
        self._steps = 0

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [0, *range(2, x.ndim)]
        own_var, own_mean = torch.var_mean(x, axes, correction=0)
        mean, var, pixels = own_mean, own_var, x.numel() // x.shape[1]
        below: nn.Module | None = getattr(input, "_made_by", None)
        if below is not None and input.requires_grad:
            newest = _describe(input, below, own_mean.detach(), own_var.detach())
            if self._steps >= self.burn_in * self.passes:
                of_this_place = list(self._past)[len(self._past) % self.passes :: self.passes]
                mean, var, pixels = _over_iterations(own_mean, own_var, newest, of_this_place)
            self._past.append(newest)
            while len(self._past) > (self.window - 1) * self.passes:
                self._past.popleft()
        self._update_averages(mean.detach(), var.detach(), pixels)
        scale = (var + self.eps).rsqrt()
        return self._scaled(x, scale, -mean * scale, (-1, *[1] * (x.ndim - 2))).to(input.dtype)

    @torch.no_grad()
    def _update_averages(self, mean: Tensor, var: Tensor, pixels: int) -> None:
        """Update the moving averages, with the unbiased variance, as BatchNorm does."""
        self._steps += 1
        newest = self._count()
        self.running_mean += newest * (mean - self.running_mean)
        self.running_var += newest * (var * (pixels / max(pixels - 1, 1)) - self.running_var)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._past.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._past.clear()
        self._steps = int(self.num_batches_tracked)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        return f"{text}, window={self.window}, burn_in={self.burn_in}"


def _describe(x: Tensor, below: Any, mean: Tensor, var: Tensor) -> _Iteration:
    """A batch's statistics and their derivatives by each channel's own filter."""
    pixels = x.numel() // x.shape[1]
    weight: Tensor = below.weight
    slopes = torch.zeros(2, *weight.shape).to(weight)
    if weight.requires_grad:
        # A filter affects its own channel only, so the gradient of the sum over channels has each channel's derivative.
        of_mean, of_square = torch.full_like(x, 1 / pixels), x.detach() * (2 / pixels)
        for slope, by_pixel in zip(slopes, (of_mean, of_square), strict=True):
            slope += torch.autograd.grad(x, weight, by_pixel, retain_graph=True)[0]
    moments = torch.stack([mean, var + mean.square()])
    return _Iteration(moments, slopes.flatten(2), weight.detach().flatten(1).clone(), pixels)


def _over_iterations(
    mean: Tensor, var: Tensor, newest: _Iteration, past: Sequence[_Iteration]
) -> tuple[Tensor, Tensor, int]:
    """Mean and variance over iterations, and their number of pixels."""
    pairs = [(mean, var), *(iteration.under(newest.filters) for iteration in past)]
    means, variances = (torch.stack(each) for each in zip(*pairs, strict=True))
    pixels = newest.pixels + sum(iteration.pixels for iteration in past)
    # ``average of nu - (average of mu)^2``, in a form that rounding cannot make negative.
    return means.mean(0), variances.mean(0) + means.var(0, correction=0), pixels


def _sign(layer: nn.Module, args: Any, output: Tensor) -> None:
    """Forward hook: mark the output tensor with the layer that made it."""
    output._made_by = layer  # type: ignore[attr-defined]


def announce(model: nn.Module) -> nn.Module:
    """Mark the outputs of convolutions and linear layers inside ``model`` with their layer.

    Transposed convolutions, whose filters are not the first axis of their weight, are left out, and
    so are layers with a parametrized weight.
    """
    for layer in model.modules():
        filters_first = isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not layer.transposed)
        if filters_first and "weight" in layer._parameters and _sign not in layer._forward_hooks.values():
            layer.register_forward_hook(_sign)
    return model


def to_cross_iteration(model: nn.Module, **options: Any) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by `CrossIterationNorm`.

    Example:
        >>> to_cross_iteration(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), window=8)[1].window
        8
    """
    replace_batchnorm(
        model, lambda norm: CrossIterationNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, **options)
    )
    return announce(model)
