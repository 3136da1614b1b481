"""The mathematics of the filter, as pure functions.

Notation of the paper (Wang et al., *Kalman Normalization*, NeurIPS 2018): ``q`` is the gain, ``S``
the number of statistic groups, ``C`` of channels. A group's samples are normalized together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels.arguments import Given, Options
from kalmannorm.kernels.formulas import at_least_float32, fuse, normalize, observe
from kalmannorm.kernels.layer import layer
from kalmannorm.kernels.moments import moments

__all__ = ["KalmanNormOutput", "group_kalman_norm", "kalman_norm", "kalman_update", "observe", "trusted_gain"]


class KalmanNormOutput(NamedTuple):
    """The results of :func:`kalman_norm`."""

    output: Tensor
    """The normalized activation, shaped and typed as the input; with a ReLU, rectified."""
    posterior: Gaussian
    """The statistics it was normalized by, ``(S, C)``."""
    observation: Gaussian
    """The batch's own statistics, ``(S, C)``."""
    gain: Tensor | float
    """The gain that fused them: 1 where there was no prior, or none to be trusted."""


def kalman_update(prior: Gaussian | None, observation: Gaussian, gain: Tensor | float, *,
                  process_noise: Tensor | None = None, spread: bool = True,
                  guard: float | None = None) -> Gaussian:  # fmt: skip
    """Fuse the moments that the layers below predict with those of the batch (Eq. 6 and 7).

    ``m = (1 - q) m_prior + q x_bar`` and
    ``v = (1 - q) (v_prior + R) + q S + spread q (1 - q) (x_bar - m_prior)^2``.

    Args:
        prior: the predicted moments, ``(S, C)``, or None: the observation is then returned as it is.
        observation: the batch's moments, ``(S, C)``.
        gain: ``q`` in (0, 1], a number or a tensor of one element.
        process_noise: ``R``, ``(C,)``, not negative.
        spread: add the variance between the two means, which makes ``v`` the variance of the mixture
            of prior and observation (the authors' code); without it, Eq. 7 as printed.
        guard: see :func:`trusted_gain`.

    Returns:
        The posterior moments, ``(S, C)``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> from kalmannorm.functional import kalman_update
        >>> prior = kn.Gaussian(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
        >>> seen = kn.Gaussian(torch.tensor([[1.5]]), torch.tensor([[0.36]]))
        >>> posterior = kalman_update(prior, seen, gain=0.1)
        >>> print(f"{posterior.mean.item():.2f} {posterior.var.item():.4f}")
        0.15 1.1385
    """
    return _fuse(prior, observation, gain, process_noise, spread, guard)[1]


def add_process_noise(prior: Gaussian, process_noise: Tensor | None) -> Gaussian:
    """``v_prior + R``: the path from the layer below adds ``R`` to the uncertainty (Eq. 4)."""
    if process_noise is None:
        return prior
    channels = prior.mean.shape[-1]
    if process_noise.shape != (channels,):
        raise ValueError(
            f"got process_noise of shape {tuple(process_noise.shape)}, expected ({channels},), one a channel"
        )
    return Gaussian(prior.mean, prior.var + process_noise)


def trusted_gain(prior: Gaussian, observation: Gaussian, gain: Tensor | float, guard: float | None) -> Tensor | float:
    """The gain, or 1 (the prior ignored) where the prior is implausibly wide.

    Args:
        prior: predicted moments, ``(S, C)``.
        observation: the batch's moments, ``(S, C)``.
        gain: ``q``.
        guard: ignore a prior whose variance is, averaged over channels that are not constant, at least this many
            times the observed one (the authors' code: 100); None trusts every prior.

    Returns:
        ``q`` as given, or ``(S, 1)``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> from kalmannorm.functional import trusted_gain
        >>> wide, seen = (kn.Gaussian(torch.zeros(1, 1), torch.full((1, 1), var)) for var in (500.0, 1.0))
        >>> trusted_gain(wide, seen, 0.1, guard=100).item()
        1.0
    """
    if guard is None:
        return gain
    varies = observation.var > 0
    ratios = torch.where(varies, prior.var / torch.where(varies, observation.var, 1.0), 0.0)
    ratio = ratios.sum(-1, keepdim=True) / varies.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(ratio < guard, gain, torch.ones_like(ratio))


def _fuse(prior: Gaussian | None, observation: Gaussian, gain: Tensor | float, process_noise: Tensor | None,
          spread: bool, guard: float | None) -> tuple[Tensor | float, Gaussian]:  # fmt: skip
    """The gain that was used, and the posterior."""
    if prior is None:
        return 1.0, observation
    prior = add_process_noise(prior, process_noise)
    if guard is not None:
        gain = trusted_gain(prior, observation, gain, guard)
        # Where the gain is 1, the difference from a prior that is far away would leave its rounding in the posterior.
        assert isinstance(gain, Tensor)
        mean = torch.where(gain < 1, prior.mean, observation.mean)
        prior = Gaussian(mean, torch.where(gain < 1, prior.var, observation.var))
    return gain, fuse(prior, observation, gain, spread)


def kalman_norm(x: Tensor, prior: Gaussian | None, weight: Tensor | None = None, bias: Tensor | None = None, *,
                gain: Tensor | float = 1.0, process_noise: Tensor | None = None, spread: bool = True,
                guard: float | None = None, groups: int = 1, eps: float = 1e-5, observation: Gaussian | None = None,
                relu: bool = False) -> KalmanNormOutput:  # fmt: skip
    """Normalize by batch statistics fused with a prior (batch Kalman normalization).

    Args:
        x: ``(N, C, *)``.
        prior: predicted moments ``(S, C)``, or None: then this is batch normalization.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        gain: see :func:`kalman_update`.
        process_noise: ``(C,)`` or None.
        spread: see :func:`kalman_update`.
        guard: see :func:`kalman_update`.
        groups: ``S``; ``N`` is a multiple of it.
        eps: added to the variance.
        observation: moments to fuse with the prior in place of those of ``x``: :func:`synchronize`.
        relu: rectify the result in the same pass.

    Example:
        >>> import torch, kalmannorm as kn
        >>> from kalmannorm.functional import kalman_norm
        >>> prior = kn.Gaussian(torch.zeros(1, 1), torch.ones(1, 1))
        >>> output = kalman_norm(torch.tensor([[0.9], [2.1]]), prior, gain=0.1).output
        >>> [round(value, 2) for value in output.flatten().tolist()]  # batch normalization: -1 and 1
        [0.7, 1.83]
    """
    if observation is None and guard is None:  # the same by one kernel
        stacked = None if prior is None else add_process_noise(prior, process_noise).packed().moments
        learned, fixed = (gain, 0.0) if isinstance(gain, Tensor) else (None, gain)
        given = Given(prior=stacked, gain=learned, weight=weight, bias=bias)
        options = Options(groups=groups, gain_offset=fixed, spread=spread, eps=eps, relu=relu)
        out = layer(x, given, options, posterior=True)
        posterior: Gaussian = Packed(out.belief.view(2, groups, x.shape[1]))
        observation = Gaussian(out.statistics[4], out.statistics[5])
        return KalmanNormOutput(out.output, posterior, observation, 1.0 if prior is None else gain)
    wide = at_least_float32(x)
    observation = observe(wide, groups) if observation is None else observation
    gain, posterior = _fuse(prior, observation, gain, process_noise, spread, guard)
    y = normalize(wide, posterior, weight, bias, eps).to(x.dtype)
    return KalmanNormOutput(y.relu() if relu else y, posterior, observation, gain)


class SharedObservation(NamedTuple):
    """The results of :func:`synchronize`."""

    observation: Gaussian
    """The moments of all processes' elements, ``(1, C)``."""
    samples: Tensor
    """The number of samples, a scalar."""
    elements: Tensor
    """How many elements a channel, a scalar."""


class _AllReduce(torch.autograd.Function):
    """A sum over processes, each of which must run the backward too: the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _AllReduce.apply(d_total, ctx.process_group), None  # type: ignore[no-untyped-call]


def synchronize(x: Tensor, process_group: dist.ProcessGroup) -> SharedObservation:
    """The moments of all processes' elements together, by the law of total variance.

    Every process of the group must call it. Their batches ``(N, C, *)`` may differ in size, and be empty. Gradients
    flow between processes.
    """
    channels = x.shape[1]
    if x.numel() == 0:
        # Zero, but a function of x: the backward pass too must call the others.
        nothing = at_least_float32(x).sum().expand(1, channels)
        observation = Gaussian(nothing, nothing)
    else:
        observation = observe(x)
    sizes = [observation.mean.new_full((1, 1), size) for size in (x.shape[0], x.numel() // channels)]
    mine = torch.cat([*sizes, observation.mean, observation.var], 1)
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    mine = F.pad(mine, (0, 0, rank, world_size - rank - 1))
    rows: Tensor = _AllReduce.apply(mine, process_group)  # type: ignore[no-untyped-call]
    samples, counts, means, variances = rows.split([1, 1, channels, channels], 1)
    share = counts / counts.sum().clamp_min(1)
    mean = (share * means).sum(0, keepdim=True)
    var = (share * (variances + (means - mean).square())).sum(0, keepdim=True)
    return SharedObservation(Gaussian(mean, var), samples.sum().detach(), counts.sum().detach())


def group_kalman_norm(x: Tensor, prior: Gaussian | None, num_groups: int, weight: Tensor | None = None,
                      bias: Tensor | None = None, *, gain: Tensor | float = 1.0,
                      process_noise: Tensor | None = None, spread: bool = True, guard: float | None = None,
                      eps: float = 1e-5) -> KalmanNormOutput:  # fmt: skip
    """Normalize each sample's channel groups by their statistics fused with a prior (GKN, section 3.3).

    A channel group's prior is the mixture of its channels' priors.

    Args:
        x: ``(N, C, *)``.
        prior: predicted moments ``(N, C)``, or None: then this is group normalization.
        num_groups: ``G``, divides ``C``.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        gain: see :func:`kalman_update`.
        process_noise: ``(C,)`` or None.
        spread: see :func:`kalman_update`.
        guard: see :func:`kalman_update`.
        eps: added to the variance.

    Returns:
        The output, and statistics of shape ``(N, C)``: each channel has its group's.

    Example:
        >>> import torch
        >>> from kalmannorm.functional import group_kalman_norm
        >>> x = torch.randn(2, 8, 4, 4)
        >>> expected = torch.nn.functional.group_norm(x, 4)
        >>> torch.allclose(group_kalman_norm(x, None, 4).output, expected, atol=1e-5)  # without a prior
        True
    """
    samples, channels = x.shape[:2]
    wide = at_least_float32(x)
    mean, var = moments(wide.reshape(1, samples * num_groups, -1))
    observation = Gaussian(mean, var).map(lambda t: t.view(samples, num_groups))
    if prior is not None:
        split = add_process_noise(prior, process_noise).map(lambda t: t.unflatten(1, (num_groups, -1)))
        prior = split.pool([2]).map(lambda t: t.squeeze(2))
    gain, posterior = _fuse(prior, observation, gain, None, spread, guard)
    posterior, observation = (
        b.map(lambda t: t.repeat_interleave(channels // num_groups, 1)) for b in (posterior, observation)
    )
    y = normalize(wide, posterior, weight, bias, eps).to(x.dtype)
    return KalmanNormOutput(y, posterior, observation, gain)
