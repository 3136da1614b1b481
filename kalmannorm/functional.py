"""The mathematics of the filter, as pure functions.

Notation of the paper (Wang et al., *Kalman Normalization*, NeurIPS 2018): ``q`` is the gain, ``S``
the number of statistic groups, ``C`` of channels. A group's samples are normalized together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Packed
from kalmannorm.kernels import Filter, Given, all_reduce, layer, moments, standardize

__all__ = [
    "KalmanNormOutput", "group_kalman_norm", "kalman_norm", "kalman_update", "observe", "trusted_gain",
]  # fmt: skip


class KalmanNormOutput(NamedTuple):
    """What :func:`kalman_norm` returns."""

    output: Tensor
    """The normalized activation, shaped and typed as the input; with a ReLU, rectified."""
    posterior: Gaussian
    """The statistics it was normalized by, ``(S, C)``."""
    observation: Gaussian
    """The batch's own statistics, ``(S, C)``."""
    gain: Tensor | float
    """The gain that fused them: 1 where there was no prior, or none to be trusted."""


def observe(x: Tensor, groups: int = 1) -> Gaussian:
    """Mean and biased variance of each group and channel (Eq. 1 and 8).

    You need it, as the other functions here, to build a normalization of your own.

    Args:
        x: ``(N, C, *)``; ``N`` is a multiple of ``groups``.
        groups: ``S``, consecutive blocks of ``N / S`` samples.

    Returns:
        Moments ``(S, C)``, float32 for inputs of lower precision.

    Example:
        >>> import torch
        >>> from kalmannorm.functional import observe
        >>> found = observe(torch.tensor([[0.9], [2.1]]))
        >>> print(f"{found.mean.item():.2f} {found.var.item():.2f}")
        1.50 0.36
    """
    x = x.to(_wide(x.dtype))
    if groups == 1:
        mean, var = moments(x)
        return Gaussian(mean[None], var[None])
    # Each sample as channels of its own, then a group's samples together.
    samples, channels = x.shape[:2]
    mean, var = moments(x.reshape(1, samples * channels, -1))
    each = Gaussian(mean, var).map(lambda t: t.view(groups, samples // groups, channels))
    return each.pool([1]).map(lambda t: t.squeeze(1))


def kalman_update(prior: Gaussian | None, observation: Gaussian, gain: Tensor | float, *,
                  process_noise: Tensor | None = None, spread: bool = True,
                  guard: float | None = None) -> Gaussian:  # fmt: skip
    """Fuse what the layers below predict with what the batch shows (Eq. 6 and 7).

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
    if prior is None:
        return observation
    prior = add_process_noise(prior, process_noise)
    gain = trusted_gain(prior, observation, gain, guard)
    innovation = observation.mean - prior.mean
    mean = torch.lerp(prior.mean, observation.mean, gain)
    var = torch.lerp(prior.var, observation.var, gain)
    if spread:
        var = torch.addcmul(var, gain * (1 - gain) * innovation, innovation)
    return Gaussian(mean, var)


def add_process_noise(prior: Gaussian, process_noise: Tensor | None) -> Gaussian:
    """``v_prior + R``: what the path from the layer below adds to the uncertainty (Eq. 4)."""
    return prior if process_noise is None else Gaussian(prior.mean, prior.var + process_noise)


def trusted_gain(prior: Gaussian, observation: Gaussian, gain: Tensor | float, guard: float | None) -> Tensor | float:
    """The gain, or 1 (the prior ignored) where the prior is implausibly wide.

    Args:
        prior: predicted moments, ``(S, C)``.
        observation: the batch's moments, ``(S, C)``.
        gain: ``q``.
        guard: a prior is ignored whose variance is, in the mean over channels, at least this many
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
    smallest = torch.finfo(observation.var.dtype).tiny
    ratio = (prior.var / observation.var.clamp_min(smallest)).mean(-1, keepdim=True)
    return torch.where(ratio < guard, gain, torch.ones_like(ratio))


def normalize(x: Tensor, statistics: Gaussian, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``y = gamma (x - m) / sqrt(v + eps) + beta``, in one pass over ``x``.

    Args:
        x: ``(N, C, *)``.
        statistics: ``(S, C)``.
        weight: ``gamma``, ``(C,)``, or None for ones.
        bias: ``beta``, ``(C,)``, or None for zeros.
        eps: added to the variance.
    """
    mean, var = statistics.mean, statistics.var
    weight, bias = _affine(weight, bias, mean[0])
    if mean.shape[0] == 1:
        return standardize(x, mean.view(-1), var.view(-1), weight, bias, eps)
    if not x.is_contiguous():  # whose memory format the output is to keep
        scale = weight * torch.rsqrt(var + eps)
        blocks = x.unflatten(0, (mean.shape[0], -1))
        scale, shift = (t.view(t.shape[0], 1, -1, *[1] * (x.ndim - 2)) for t in (scale, bias - mean * scale))
        return torch.addcmul(shift, blocks, scale).flatten(0, 1)
    # Each sample as channels of its own, with its group's statistics.
    samples, channels = x.shape[:2]
    each = samples // mean.shape[0]
    mean, var = (t.repeat_interleave(each, 0).view(-1) for t in (mean, var))
    y = standardize(x.reshape(1, samples * channels, -1), mean, var, weight.repeat(samples), bias.repeat(samples), eps)
    return y.view(x.shape)


def _affine(weight: Tensor | None, bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """``gamma`` and ``beta``, ones and zeros where there are none."""
    return (
        torch.ones_like(like) if weight is None else weight.to(like.dtype),
        torch.zeros_like(like) if bias is None else bias.to(like.dtype),
    )


def kalman_norm(x: Tensor, prior: Gaussian | None, weight: Tensor | None = None, bias: Tensor | None = None, *,
                gain: Tensor | float = 1.0, process_noise: Tensor | None = None, spread: bool = True,
                guard: float | None = None, groups: int = 1, eps: float = 1e-5, observation: Gaussian | None = None,
                relu: bool = False) -> KalmanNormOutput:  # fmt: skip
    """Normalize by batch statistics fused with a prior (batch Kalman normalization), and perhaps rectify in the same
    pass.

    Args:
        x: ``(N, C, *)``.
        prior: predicted moments ``(S, C)``, or None: then this is batch normalization.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        gain: see :func:`kalman_update`, as are ``process_noise``, ``spread`` and ``guard``.
        process_noise: ``(C,)`` or None.
        spread: see :func:`kalman_update`.
        guard: see :func:`kalman_update`.
        groups: ``S``; ``N`` is a multiple of it.
        eps: added to the variance.
        observation: the moments to fuse with the prior, where they are not just those of ``x``:
            see :func:`synchronize`.
        relu: rectify the result.

    Example:
        >>> import torch, kalmannorm as kn
        >>> from kalmannorm.functional import kalman_norm
        >>> prior = kn.Gaussian(torch.zeros(1, 1), torch.ones(1, 1))
        >>> output = kalman_norm(torch.tensor([[0.9], [2.1]]), prior, gain=0.1).output
        >>> [round(value, 2) for value in output.flatten().tolist()]  # batch normalization: -1 and 1
        [0.7, 1.83]
    """
    if observation is None and guard is None:
        return _in_one_step(x, prior, weight, bias, gain, process_noise, spread, groups, eps, relu)
    wide = x.to(_wide(x.dtype))
    if observation is None:
        observation = observe(wide, groups)
    gain, posterior = _fuse(prior, observation, gain, process_noise, spread, guard)
    y = normalize(wide, posterior, weight, bias, eps).to(x.dtype)
    return KalmanNormOutput(y.relu() if relu else y, posterior, observation, gain)


def _fuse(prior: Gaussian | None, observation: Gaussian, gain: Tensor | float, process_noise: Tensor | None,
          spread: bool, guard: float | None) -> tuple[Tensor | float, Gaussian]:  # fmt: skip
    if prior is None:
        return 1.0, observation
    prior = add_process_noise(prior, process_noise)
    gain = trusted_gain(prior, observation, gain, guard)
    return gain, kalman_update(prior, observation, gain, spread=spread)


def _in_one_step(x: Tensor, prior: Gaussian | None, weight: Tensor | None, bias: Tensor | None, gain: Tensor | float,
                 process_noise: Tensor | None, spread: bool, groups: int, eps: float,
                 relu: bool) -> KalmanNormOutput:  # fmt: skip
    """The common case by its kernel; the rest of :func:`kalman_norm` says what it computes."""
    given_gain, offset = (gain, 0.0) if isinstance(gain, Tensor) else (None, gain)
    moments = None if prior is None else prior.packed().moments
    given = Given(moments, None, None, given_gain, process_noise, weight, bias)
    options = Filter(groups=groups, gain_offset=offset, spread=spread, eps=eps, relu=relu)
    out = layer(x, given, options, posterior=True)
    posterior = Packed(out.belief.view(2, groups, x.shape[1]))
    used = 1.0 if prior is None else gain
    return KalmanNormOutput(out.output, posterior, Gaussian(out.statistics[4], out.statistics[5]), used)


class SharedObservation(NamedTuple):
    """What :func:`synchronize` returns."""

    observation: Gaussian
    """The moments of all processes' elements, ``(1, C)``."""
    samples: Tensor
    """How many samples these are, a scalar."""
    elements: Tensor
    """How many elements a channel, a scalar."""


def synchronize(x: Tensor, process_group: dist.ProcessGroup) -> SharedObservation:
    """The moments of all processes' elements together, by the law of total variance.

    Every process of the group must call it; their batches may differ in size, and be empty. Gradients
    flow between processes.

    Args:
        x: this process's ``(N, C, *)``.
        process_group: who takes part.
    """
    channels = x.shape[1]
    if x.numel() == 0:
        # Zero, but a function of x: the backward pass too must call the others.
        nothing = x.to(_wide(x.dtype)).sum().expand(1, channels)
        observation = Gaussian(nothing, nothing)
    else:
        observation = observe(x)
    sizes = observation.mean.new_tensor([[float(x.shape[0]), float(x.numel() // channels)]])
    mine = torch.cat([sizes, observation.mean, observation.var], 1)
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    rows = F.pad(mine, (0, 0, rank, world_size - rank - 1))
    rows = all_reduce(rows, process_group)
    samples, counts, means, variances = rows.split([1, 1, channels, channels], 1)
    share = counts / counts.sum().clamp_min(1)
    mean = (share * means).sum(0, keepdim=True)
    var = (share * (variances + (means - mean).square())).sum(0, keepdim=True)
    return SharedObservation(Gaussian(mean, var), samples.sum().detach(), counts.sum().detach())


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics have: at least float32."""
    return torch.promote_types(dtype, torch.float32)


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
        gain: see :func:`kalman_update`, as are ``process_noise``, ``spread`` and ``guard``.
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
    wide = x.to(_wide(x.dtype))
    mean, var = moments(wide.reshape(1, samples * num_groups, -1))
    observation = Gaussian(mean, var).map(lambda t: t.view(samples, num_groups))
    if prior is not None:
        split = add_process_noise(prior, process_noise).map(lambda t: t.unflatten(1, (num_groups, -1)))
        prior = split.pool([2]).map(lambda t: t.squeeze(2))
    gain, posterior = _fuse(prior, observation, gain, None, spread, guard)
    each_channel = channels // num_groups
    posterior, observation = (
        b.map(lambda t: t.repeat_interleave(each_channel, 1)) for b in (posterior, observation)
    )
    y = normalize(wide, posterior, weight, bias, eps).to(x.dtype)
    return KalmanNormOutput(y, posterior, observation, gain)
