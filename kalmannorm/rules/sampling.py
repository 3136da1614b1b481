"""Values read in between pixels: resized maps, sampled grids, regions of interest, deformed convolutions.

Where a map is read counts as known, though a network may compute it: a flow, a box, an offset.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.rules.linear import conv
from kalmannorm.rules.shape import per_axis
from kalmannorm.rules.table import PLACES, RULES, Belief, belief_rule, rule

# The mean of `w^2 + (1 - w)^2` over all `w`: what a blend of two neighbours keeps of their variance.
_BLEND = 2 / 3


@belief_rule("interpolate", "upsample")
def interpolate(x: Gaussian, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
                align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
                antialias: bool = False) -> Gaussian:  # fmt: skip
    """Resizing: nearest neighbours keep the belief; weights ``w`` scale ``v`` by ``sum w^2``.

    That sum is taken axis by axis and averaged over output positions. Pixels are independent, so a
    blend of two varies less than either.
    """
    inputs = x.shape[2:]
    x = x.pool(range(2, x.ndim))
    if mode in ("nearest", "nearest-exact"):
        return Gaussian(x.mean, x.var)
    var = x.var
    sizes, scales = (per_axis(value, len(inputs)) for value in (size, scale_factor))
    for length, out, scale in zip(inputs, sizes, scales, strict=True):
        # Rows, not columns: at width 1, torch's antialiased kernel forgets the height.
        each_pixel = torch.eye(length, dtype=var.dtype, device=var.device).view(length, 1, 1, length)
        weights = F.interpolate(
            each_pixel,
            size=None if out is None else (1, out),
            scale_factor=None if scale is None else (1.0, float(scale)),
            mode={"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode),
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
            antialias=antialias,
        )
        var = var * weights.square().sum(0).mean()
    return Gaussian(x.mean, var)


def blended(x: Gaussian) -> Gaussian:
    """A blend of neighbouring pixels along each spatial axis."""
    x = x.pool(range(2, x.ndim))
    return Gaussian(x.mean, x.var * _BLEND ** (x.ndim - 2))


@belief_rule("grid_sample", "grid_sampler")
def grid_sample(x: Gaussian, grid: object, mode: str | int = "bilinear", *args: object, **kwargs: object) -> Belief:
    """Warping, by a flow or a spatial transformer: a blend of neighbours that are independent, as for `interpolate`.

    Places are as often near to a pixel as far from it. What lies outside of the map is ignored.
    """
    if mode in ("nearest", 1):
        return Gaussian(x.mean, x.var).pool(range(2, x.ndim))
    return blended(x) if mode in ("bilinear", 0) else Unknown(f"grid_sample with mode={mode!r}")


def roi_align(x: Gaussian, *args: object, **kwargs: object) -> Gaussian:
    """Regions of interest, as torchvision pools them: of all regions of all images one belief, see :func:`grid_sample`.

    A bin is the mean of several such samples, which lie so near to each other that they are taken as one.
    """
    return blended(x.pool([0]))


def deform_conv2d(x: Gaussian, weight: Tensor, offset: object, mask: Gaussian | Tensor, bias: Tensor, stride_h: int,
                  stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, groups: int,
                  offset_groups: int, use_mask: bool) -> Belief:  # fmt: skip
    """A convolution, whose offsets are ignored and whose taps a mask may weigh, for all channels of a group alike.

    With ``a`` and ``b`` the mean and the mean square of a tap's weight: ``m' = sum_taps a sum_channels W m``, and
    ``v' = sum_taps b sum_channels W^2 v + (b - a^2) (sum_channels W m)^2``.
    """
    if isinstance(weight, Gaussian) or isinstance(bias, Gaussian):
        return Unknown("torchvision.deform_conv2d with an argument that is computed from the input")
    if not use_mask:
        return conv(x, weight, bias, groups=groups)
    if not isinstance(mask, Gaussian):
        mask = Gaussian(mask, torch.zeros_like(mask)).pool([0, 2, 3])
    several = max(x.groups, mask.groups)
    first, second = (
        each.per_channel(several).map(lambda t: t.unflatten(1, (offset_groups, -1))) for each in (x, mask)
    )
    matrix = torch.block_diag(*weight.to(x.mean.dtype).flatten(1).chunk(groups))
    taps = matrix.view(len(matrix), *first.mean.shape[1:], -1)  # (C_out, G, C / G, taps)
    of_tap = torch.einsum("sgc,ogct->sogt", first.mean, taps)
    mean = torch.einsum("sogt,sgt->so", of_tap, second.mean) + bias
    var = torch.einsum("sgc,ogct,sgt->so", first.var, taps.square(), second.mean.square() + second.var)
    var = var + torch.einsum("sogt,sgt->so", of_tap.square(), second.var)
    return Gaussian(mean, var).map(lambda t: t[..., None, None])


PLACES[F.grid_sample] = PLACES[torch.grid_sampler] = 1


def know_torchvision() -> None:
    """Register the rules for torchvision's operators, which exist once it is imported."""
    if "torchvision" not in sys.modules:
        return
    for name, its, place in (("roi_align", roi_align, 1), ("deform_conv2d", deform_conv2d, 2)):
        operator = getattr(torch.ops.torchvision, name, None)
        if operator is not None and operator not in RULES:
            rule(operator, belief_first=True)(its)
            PLACES[operator] = place
