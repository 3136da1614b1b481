"""The layer and the link in torch functions that autograd, torch.func and a compiler can differentiate.

`kalmannorm.functional` offers them to users, `on_torch` runs them where there is no compiled kernel, and the gradient
of a gradient is taken through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.memory_format import dense, in_type
from kalmannorm.kernels.moments import moments
from kalmannorm.kernels.rectify import rectified
from kalmannorm.kernels.standardize import standardize


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in the type that statistics have: float32, or float64."""
    return in_type(x, torch.promote_types(x.dtype, torch.float32))


def by_sample(x: Tensor, groups: int) -> Tensor:
    """``(1, N C, P)``, each sample's channels as channels of their own; with one group, the tensor itself.

    torch's kernels of BatchNorm then serve several groups too.
    """
    return x if groups == 1 else x.reshape(1, x.shape[0] * x.shape[1], -1)


def for_samples(t: Tensor, x: Tensor) -> Tensor:
    """``(S, C)`` for each channel of :func:`by_sample`, ``(N C,)``; with one group, ``(C,)``."""
    return t.view(-1) if t.shape[0] == 1 else t.repeat_interleave(x.shape[0] // t.shape[0], 0).view(-1)


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
    mean, var = moments(by_sample(at_least_float32(x), groups))
    if groups == 1:
        return Gaussian(mean[None], var[None])
    # The law of total variance, over a group's samples.
    between, mean = torch.var_mean(mean.view(groups, -1, x.shape[1]), 1, correction=0)
    return Gaussian(mean, var.view(groups, -1, x.shape[1]).mean(1) + between)


def gain_of(given: Given, options: Options) -> Tensor | float:
    """``q`` in (0, 1], a number or ``(1,)``; 1 without a prior."""
    if given.prior is None:
        return 1.0
    return gain_by(given.gain, options.gain_samples, options.gain_slope, options.gain_offset)


def gain_by(parameter: Tensor | None, samples: int | Tensor, slope: float, offset: float) -> Tensor | float:
    """``q`` by its parameter, see :class:`~kalmannorm.kernels.arguments.Options`."""
    if parameter is None or not slope:
        return offset if parameter is None else parameter
    others = torch.exp((-slope * parameter - offset).clamp_max(80))  # no infinity
    return samples / (samples + others)


def noise_share(noise: Tensor, scale: float) -> Tensor:
    """The process noise over the variance without it, ``(C,)``, from the parameter ``process_noise``."""
    return scale * noise.exp()


def predicted(given: Given, options: Options) -> Gaussian:
    """The prior, corrected and with process noise: ``(1 or S, C)``."""
    assert given.prior is not None
    mean, var = given.prior.reshape(given.prior.shape[:3]).unbind()
    var = var if given.noise is None else var * (1 + noise_share(given.noise, options.noise_scale))
    mean = mean if given.shift is None else mean + given.shift
    return Gaussian(mean, var if given.scale is None else var * given.scale)


def fuse(prior: Gaussian, observation: Gaussian, gain: Tensor | float, spread: bool) -> Gaussian:
    """The posterior: see :func:`kalmannorm.functional.kalman_update`."""
    innovation = observation.mean - prior.mean
    mean = prior.mean + gain * innovation
    var = prior.var + gain * (observation.var - prior.var)
    if spread:
        var = var + gain * (1 - gain) * innovation.square()
    return Gaussian(mean, var)


def normalize(x: Tensor, statistics: Gaussian, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``y = gamma (x - m) / sqrt(v + eps) + beta``, in one pass over ``x``, ``(N, C, *)``, and like it.

    The statistics are ``(S, C)``; ``weight`` and ``bias``, ``(C,)`` each, are ``gamma`` and ``beta``, or None.
    """
    mean, var = statistics.mean, statistics.var
    weight = torch.ones_like(mean[0]) if weight is None else weight.to(mean.dtype)
    bias = torch.zeros_like(mean[0]) if bias is None else bias.to(mean.dtype)
    groups = mean.shape[0]
    if groups == 1:
        return standardize(x, mean.view(-1), var.view(-1), weight, bias, eps)
    vectors = (mean, var, weight.expand_as(mean), bias.expand_as(mean))
    mean, var, weight, bias = (for_samples(t, x) for t in vectors)
    y = standardize(by_sample(x, groups), mean, var, weight, bias, eps)
    # For autograd no view, which, as the output of an autograd function, could not be changed in place.
    y = dense(y.view(x.shape), x)
    return torch.ops.aten._unsafe_view.default(y, y.shape)  # type: ignore[no-any-return]


@torch.no_grad()
def move_running(running: Running, posterior: Gaussian, gain: Tensor | float, observed_var: Tensor,
                 count: int | Tensor, least: int = 0) -> None:  # fmt: skip
    """Move running statistics in place towards the posterior's, ``(S, C)``, averaged over groups.

    The observed share of the variance is made unbiased, as BatchNorm's is: a group's channel has ``count`` elements. If
    these are no more than ``least``, nothing moves, and nothing does in channels that are not finite.
    """
    dtype, counts = running.mean.dtype, count > least
    others = (count - 1).clamp_min(1) if isinstance(count, Tensor) else max(count - 1, 1)
    newest = posterior.mean, posterior.var + gain * observed_var / others
    # Detached, as an exported graph forgets that gradients were switched off here.
    mean, var = ((t[0] if t.shape[0] == 1 else t.mean(0)).detach().to(dtype) for t in newest)
    finite = (mean + var).isfinite()
    running.batches.add_(counts)
    running.nonfinite.add_(finite.all().logical_not())
    momentum, share = ((t.to(dtype) if isinstance(t, Tensor) else t) for t in (running.momentum, counts))
    for average, new in ((running.mean, mean), (running.var, var)):
        average.lerp_(torch.where(finite, new, average), momentum * share)


def layer_forward(x: Tensor, given: Given, running: Running | None, options: Options) -> tuple[Tensor, Tensor]:
    """Observe, fuse, normalize, perhaps rectify ``(N, C, *)``, which is not empty; move running statistics in place.

    Returns the output, like ``x``; and ``(6, S, C)``: mean and (biased) variance of posterior, output and observation.
    """
    weight, bias, eps = given.weight, given.bias, options.eps
    observed, q = observe(x, options.groups), gain_of(given, options)
    posterior = observed if given.prior is None else fuse(predicted(given, options), observed, q, options.spread)
    mean, var = posterior.mean, posterior.var
    if running is not None:
        move_running(running, posterior, q, observed.var, x.numel() // mean.numel())
    y = normalize(x, posterior, weight, bias, eps)
    y = y.relu_() if options.relu else y
    shrinkage = var / (var + eps)
    output_var = shrinkage if weight is None else shrinkage * weight.square()
    output_mean = torch.zeros_like(mean) if bias is None else bias.expand_as(mean)
    return y, torch.stack([mean, var, output_mean, output_var, observed.mean, observed.var])


def carried(statistics: Tensor, x: Tensor, posterior: bool) -> Tensor:
    """The belief among the statistics of :func:`layer_forward`: mean and variance with the rank of ``x`` behind.

    The posterior's is ``(2, S, C, 1, ...)``. The output's, ``(2, 1, C, 1, ...)``, is averaged over groups, which differ
    by the factor ``v / (v + eps)`` alone; so functions between two layers are evaluated once, not once a group.
    """
    rows = statistics[:2] if posterior else statistics[2:4]
    _, groups, channels = rows.shape
    if groups > 1 and not posterior:
        rows, groups = rows.mean(1, keepdim=True), 1
    return rows.view(2, groups, channels, *[1] * (x.ndim - 2))


def to_groups(d_belief: Tensor, groups: int, posterior: bool) -> Tensor:
    """The gradient of each group's belief, ``(2, S, C, ...)``, from that of :func:`carried`."""
    if groups == 1 or posterior:
        return d_belief
    return (d_belief / groups).expand(-1, groups, *d_belief.shape[2:])


def fold_taps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A filter ``(C_out, C_in, *taps)`` and its square, each summed over its taps: ``(C_out, C_in)``."""
    if weight.ndim == 2:
        return weight, weight.square()
    taps = weight.flatten(2)
    return taps.sum(-1), taps.square().sum(-1)


def link_forward(moments: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, Tensor | None]:
    """The moments of a Gaussian, rectified or not, behind a convolution or linear map.

    From mean and variance, ``(2, S, C_in, ...)`` with axes of size 1 behind, and a weight ``(C_out, C_in, *taps)``:
    mean and variance, ``(2, S, C_out, ...)``; and the rectified moments, like those given, or None.
    """
    after = torch.stack(rectified(*moments.unbind())) if relu else None
    mean, var = (moments if after is None else after).flatten(2).unbind()
    sums, squares = fold_taps(weight)
    out = torch.stack([F.linear(mean, sums, bias), F.linear(var, squares)])
    return out.view(*out.shape, *moments.shape[3:]), after
