"""The kernels of `on_gpu` beside plain float64 expressions, case by case.

As a script, ``TRITON_INTERPRET=1 python interpreted.py [case ...]``: on the CPU, by Triton's interpreter; prints a JSON
object, by case what is wrong.
"""

import contextlib
import json
import math
import sys
import traceback
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kalmannorm.kernels import on_gpu
from kalmannorm.kernels.arguments import Given, Options, Running


@dataclass(frozen=True)
class LayerCase:
    shape: tuple[int, ...]
    options: Options = field(default_factory=Options)
    dtype: torch.dtype = torch.float32
    last: bool = False
    prior_groups: int | None = 1  # None: no prior
    learned: bool = True  # the gain is a tensor
    noise: bool = False
    affine: str = "weight bias"
    corrected: bool = False  # the prior
    sent: str = "output"  # gradients from above: of the output's belief, of the "posterior", or none
    running: bool = True
    mean: float = 0.3
    std: float = 1.2
    constant: int | None = None  # a channel
    nan: int | None = None  # a channel
    strided: bool = False  # the upstream gradient
    tiny: bool = False  # tiles of a few elements: many tiles, many chunks
    twice: bool = False  # the same bits each time
    tolerance: float = 1e-5


_SIGMOID = {"gain_slope": 3.0, "gain_offset": -0.4}

LAYERS = {
    "plain": LayerCase((2, 5, 3, 7)),
    "sigmoid_relu": LayerCase((2, 5, 8, 8), Options(**_SIGMOID, relu=True)),
    "odd_relu": LayerCase((2, 5, 3, 7), Options(**_SIGMOID, relu=True)),
    "no_prior": LayerCase((3, 4, 5), Options(relu=True), prior_groups=None),
    "fixed_gain": LayerCase((3, 4, 5), Options(gain_offset=0.25), learned=False),
    "no_spread": LayerCase((3, 4, 5), Options(spread=False), sent="posterior"),
    "corrected": LayerCase((3, 4, 5), Options(**_SIGMOID, noise_scale=0.01), noise=True, corrected=True),
    "corrected_groups": LayerCase(
        (6, 5, 3, 3), Options(groups=3), prior_groups=3, noise=True, corrected=True, sent="posterior"
    ),
    "noise": LayerCase((3, 4, 5), Options(**_SIGMOID, noise_scale=0.01), noise=True),
    "noise_groups": LayerCase((3, 4, 5), Options(groups=3), noise=True),
    "no_affine": LayerCase((3, 4, 5), Options(relu=True), affine=""),
    "no_bias": LayerCase((3, 4, 5), affine="weight"),
    "nothing_sent": LayerCase((3, 4, 5), sent="", running=False),
    "groups_shared_prior": LayerCase((6, 5, 3, 3), Options(groups=3, **_SIGMOID, relu=True)),
    "groups_own_priors": LayerCase((6, 5, 3, 3), Options(groups=3), prior_groups=3, noise=True),
    "vectors": LayerCase((7, 70), Options(relu=True)),
    "vectors_groups": LayerCase((8, 6), Options(groups=2)),
    "one_element": LayerCase((1, 3, 1, 1)),
    "channels_last": LayerCase((2, 20, 3, 7), Options(**_SIGMOID, relu=True), last=True),
    "channels_last_3d": LayerCase((4, 5, 2, 3, 3), Options(groups=2), last=True, prior_groups=2),
    "strided_gradient": LayerCase((2, 6, 4, 4), strided=True),
    "bfloat16": LayerCase((2, 8, 4, 4), Options(relu=True), dtype=torch.bfloat16, tolerance=1e-2),
    "float16_channels_last": LayerCase((2, 8, 4, 4), dtype=torch.float16, last=True, tolerance=2e-3),
    "constant_channel": LayerCase((2, 3, 4, 4), constant=1, sent="posterior"),
    "nan_channel": LayerCase((2, 5, 4, 4), nan=1),
    "far_mean": LayerCase((2, 3, 9, 9), mean=1000.0, std=0.5, tolerance=2e-4),
    "large": LayerCase((1, 1, 130, 129), Options(**_SIGMOID, relu=True)),
    "tiled": LayerCase((2, 2, 7, 9), Options(**_SIGMOID, relu=True), noise=True, tiny=True, twice=True),
    "tiled_aligned": LayerCase((1, 2, 12, 16), tiny=True, sent=""),
    "tiled_rows": LayerCase((40, 2, 3, 3), Options(groups=2, relu=True), prior_groups=2, corrected=True, tiny=True),
    "tiled_no_prior": LayerCase((2, 2, 8, 8), Options(relu=True), prior_groups=None, affine="", tiny=True),
    "tiled_channels_last": LayerCase((2, 34, 2, 3), Options(relu=True), last=True, tiny=True),
    "tiled_channels_last_groups": LayerCase((4, 3, 7, 7), Options(groups=2), last=True, noise=True, tiny=True),
    "tiled_float16": LayerCase((2, 2, 16, 8), dtype=torch.float16, tiny=True, tolerance=2e-3),
    "tiled_far_mean": LayerCase((1, 2, 16, 16), mean=1000.0, std=0.5, tiny=True, tolerance=2e-4),
    "tiled_nan": LayerCase((2, 3, 8, 8), nan=2, tiny=True),
}  # fmt: skip


@dataclass(frozen=True)
class LinkCase:
    weight: tuple[int, ...]
    groups: int = 1
    relu: bool = True
    bias: bool = True
    last: bool = False
    sent: bool = True  # gradients of the rectified moments
    dtype: torch.dtype = torch.float32
    far: bool = False  # means many deviations from zero
    tolerance: float = 1e-5


LINKS = {
    "linear": LinkCase((9, 5)),
    "linear_wide": LinkCase((3, 300), bias=False),
    "convolution": LinkCase((7, 6, 3, 3)),
    "many_rows": LinkCase((70, 4, 3), relu=False),
    "channels_last": LinkCase((7, 6, 3, 3), last=True),
    "channels_last_3d": LinkCase((5, 4, 2, 2, 2), last=True, relu=False, sent=False),
    "groups": LinkCase((9, 6, 3, 3), groups=3),
    "groups_channels_last": LinkCase((9, 6, 3, 3), groups=2, last=True, sent=False),
    "pointwise": LinkCase((8, 16, 1, 1)),
    "far": LinkCase((5, 64), far=True),
    "bfloat16": LinkCase((8, 16, 3, 3), dtype=torch.bfloat16, tolerance=1e-2),
}

CASES: dict[str, Any] = {f"layer_{name}": case for name, case in LAYERS.items()}
CASES |= {f"link_{name}": case for name, case in LINKS.items()}

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@contextlib.contextmanager
def _tiny_tiles(wanted: bool):
    """Many tiles and chunks of an activation that an interpreter gets through."""
    before = on_gpu._HELD, on_gpu._TILE, on_gpu._PROGRAMS
    if wanted:
        on_gpu._HELD, on_gpu._TILE, on_gpu._PROGRAMS = 16, 256, 6
        on_gpu._walk.cache_clear()
    yield
    on_gpu._HELD, on_gpu._TILE, on_gpu._PROGRAMS = before
    on_gpu._walk.cache_clear()


def _differ(name: str, found: Tensor | None, wanted: Tensor | None, tolerance: float) -> list[str]:
    if found is None or wanted is None:
        return [] if found is wanted else [f"{name}: {found} where {wanted} was expected"]
    if found.shape != wanted.shape:
        return [f"{name}: shape {tuple(found.shape)} where {tuple(wanted.shape)} was expected"]
    found, wanted = found.detach().double(), wanted.detach().double()
    if not torch.equal(found.isnan(), wanted.isnan()):
        return [f"{name}: {int(found.isnan().sum())} NaN where {int(wanted.isnan().sum())} were expected"]
    found, wanted = found.nan_to_num(), wanted.nan_to_num()
    error = (found - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-6)
    return [] if error <= tolerance else [f"{name}: off by {error:.1e} of the largest, more than {tolerance:.0e}"]


def _as(case: LayerCase | LinkCase, t: Tensor) -> Tensor:
    t = t.to(case.dtype)
    return t.contiguous(memory_format=_LAST[t.ndim]) if case.last else t.contiguous()


def _layer_reference(x, prior, shift, scale, gain, noise, weight, bias, o: Options) -> tuple[Tensor, ...]:
    """In words of torch, for autograd."""
    blocks = x.unflatten(0, (o.groups, -1)).transpose(1, 2).flatten(2)  # (S, C, n)
    mean, var = blocks.mean(-1), blocks.var(-1, correction=0)
    q = torch.ones((), dtype=x.dtype, device=x.device)
    m, v = mean, var
    if prior is not None:
        prior_mean, prior_var = prior.view(2, -1, x.shape[1])
        if gain is None:
            q = q * o.gain_offset
        else:
            q = torch.sigmoid(o.gain_slope * gain + o.gain_offset) if o.gain_slope else gain
        if noise is not None:
            prior_var = prior_var * (1 + o.noise_scale * noise.exp())
        if shift is not None:
            prior_mean, prior_var = prior_mean + shift, scale * prior_var
        m = (1 - q) * prior_mean + q * mean
        v = (1 - q) * prior_var + q * var + (q * (1 - q) * (mean - prior_mean).square() if o.spread else 0)
    gamma = torch.ones_like(mean) if weight is None else weight.expand_as(mean)
    beta = torch.zeros_like(mean) if bias is None else bias.expand_as(mean)
    y = (blocks - m[..., None]) * (gamma / (v + o.eps).sqrt())[..., None] + beta[..., None]
    y = y.unflatten(2, (-1, x[0, 0].numel())).transpose(1, 2).reshape(x.shape)
    y = y.relu() if o.relu else y
    n = blocks.shape[-1]
    newest = m.mean(0), (v + q * var / max(n - 1, 1)).mean(0)
    return y, m, v, beta, gamma.square() * v / (v + o.eps), mean, var, *newest


def _draw_layer(case: LayerCase, device: str) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """Inputs, and the gradients from above: of the output, of the belief."""
    o, channels = case.options, case.shape[1]
    x = case.mean + case.std * torch.randn(case.shape)
    if case.constant is not None:
        x[:, case.constant] = 3.7
    if case.nan is not None:
        x[0, case.nan] = math.nan
    prior = shift = scale = gain = None
    if case.prior_groups is not None:
        mean, var = case.mean + torch.randn(case.prior_groups, channels), torch.rand(case.prior_groups, channels) + 0.2
        prior = torch.stack([mean, var]).view(2, -1, channels, *[1] * (len(case.shape) - 2))  # as it is handed on
        if case.corrected:
            shift, scale = torch.randn(channels), torch.rand(channels) + 0.5
        gain = torch.tensor([0.7]) if case.learned else None
    noise = torch.rand(channels) if case.noise else None
    weight = torch.randn(channels) if "weight" in case.affine else None
    bias = torch.randn(channels) if "bias" in case.affine else None
    dy = _as(case, torch.randn(case.shape))
    if case.strided:
        dy = dy.mT.contiguous().mT
    sent = torch.randn(2, o.groups, channels) if case.sent else None
    inputs = (_as(case, x), prior, shift, scale, gain, noise, weight, bias)
    *moved, dy, sent = [None if t is None else t.to(device) for t in (*inputs, dy, sent)]
    return moved, dy, sent


def _differ_running(case: LayerCase, running: Running, mean: Tensor, var: Tensor) -> list[str]:
    finite = (mean + var).isfinite()
    wrong = []
    for name, found, wanted, last in (
        ("running mean", running.mean, mean, 1.0), ("running variance", running.var, var, 2.0)
    ):  # fmt: skip
        moved = torch.where(finite, 0.75 * last + 0.25 * wanted, last)
        wrong += _differ(name, found, moved, min(case.tolerance, 2e-4))
    counts = running.batches.item(), running.nonfinite.item()
    wanted_counts = 8, 3 + int(not finite.all())
    if counts != wanted_counts:
        wrong.append(f"batches and nonfinite: {counts} where {wanted_counts} was expected")
    return wrong


def run_layer(case: LayerCase, device: str, backend: ModuleType) -> list[str]:
    torch.manual_seed(0)
    o, channels = case.options, case.shape[1]
    inputs, dy, sent = _draw_layer(case, device)
    x = inputs[0]

    exact = [None if t is None else t.double().requires_grad_() for t in inputs]
    y, *rows, newest_mean, newest_var = _layer_reference(*exact, o)
    scalar = (y * dy.double()).sum()
    posterior = case.sent == "posterior"
    if sent is not None:
        scalar = scalar + (torch.stack(rows[:2] if posterior else rows[2:4]) * sent.double()).sum()
    given = [t for t in exact if t is not None]
    gradients = iter(torch.autograd.grad(scalar, given, allow_unused=True, materialize_grads=True))
    expected = [None if t is None else next(gradients) for t in exact]

    def both_ways() -> tuple[Running, list[Tensor | None]]:
        buffers = torch.ones(channels, device=device), torch.full((channels,), 2.0, device=device)
        running = Running(*buffers, torch.tensor(7, device=device), torch.tensor(3, device=device), 0.25)
        vectors = Given(*inputs[1:])
        y, statistics = backend.layer_forward(x, vectors, running if case.running else None, o)
        gradients = backend.layer_backward(dy, x, vectors, statistics, sent, posterior, o)
        return running, [y, statistics, *gradients]

    with _tiny_tiles(case.tiny):
        running, results = both_ways()
        again = both_ways()[1] if case.twice else results
    found_y, statistics, *found = results
    wrong = _differ("y", found_y, y, case.tolerance)
    if found_y.stride() != x.stride() or found_y.dtype != x.dtype:
        wrong.append("y: another memory format or type than x")
    names = ("posterior mean", "posterior variance", "output mean", "output variance", "mean", "variance")
    for name, row, wanted in zip(names, statistics, rows, strict=True):
        wrong += _differ(name, row, wanted, min(case.tolerance, 2e-4))
    del expected[2:4]  # the correction is constant
    names = ("dx", "d_prior", "d_gain", "d_noise", "d_weight", "d_bias")
    for name, gradient, wanted in zip(names, found, expected, strict=True):
        wrong += _differ(name, gradient, wanted, 10 * case.tolerance)
    if case.running:
        wrong += _differ_running(case, running, newest_mean, newest_var)
    if not all(a is b or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, again, strict=True)):
        wrong.append("another result the second time")
    return wrong


def _link_reference(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> tuple[Tensor, ...]:
    if relu:
        a = mean / var.sqrt()
        density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
        above = torch.special.ndtr(a)
        positive = a * above + density
        mean, var = var.sqrt() * positive, var * (above - positive * (density - a * torch.special.ndtr(-a)))
    taps = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    out_mean, out_var = mean @ taps.sum(-1).mT, var @ taps.square().sum(-1).mT
    return out_mean if bias is None else out_mean + bias, out_var, mean, var


def run_link(case: LinkCase, device: str, backend: ModuleType) -> list[str]:
    torch.manual_seed(0)
    rows, channels = case.weight[:2]
    mean = torch.randn(case.groups, channels) * (4 if case.far else 1)
    moments = torch.stack([mean, torch.rand(case.groups, channels) + 0.1])
    weight = _as(case, torch.randn(case.weight)).to(device)
    bias = torch.randn(rows).to(device) if case.bias else None
    d_out = torch.randn(2, case.groups, rows).to(device)
    moments = moments.to(device).view(2, case.groups, channels, *[1] * (len(case.weight) - 2))
    sent = torch.randn(moments.shape).to(device) if case.sent and case.relu else None

    exact = [t.double().requires_grad_() for t in (moments, weight)]
    wanted_bias = None if bias is None else bias.double()
    out_mean, out_var, *after = _link_reference(*exact[0].flatten(2), exact[1], wanted_bias, case.relu)
    scalar = (torch.stack([out_mean, out_var]) * d_out.double()).sum()
    if sent is not None:
        scalar = scalar + (torch.stack(after) * sent.flatten(2).double()).sum()
    expected = torch.autograd.grad(scalar, exact)

    out, found_after = backend.link_forward(moments, weight, bias, case.relu)
    below, d_weight = backend.link_backward(moments, weight, found_after, d_out, sent, case.relu)
    wrong = _differ("mean", out[0].flatten(1), out_mean, 1e-5) + _differ("variance", out[1].flatten(1), out_var, 1e-5)
    if case.relu:
        wrong += _differ("rectified mean", found_after[0].flatten(1), after[0], 1e-5)
        wrong += _differ("rectified variance", found_after[1].flatten(1), after[1], 1e-5)
    wrong += _differ("d_mean", below[0], expected[0][0], 1e-4) + _differ("d_var", below[1], expected[0][1], 1e-4)
    wrong += _differ("d_weight", d_weight, expected[1], 10 * case.tolerance)
    if d_weight.stride() != weight.stride():
        wrong.append("d_weight: another memory format than the weight")
    return wrong


def run(name: str, device: str, backend: ModuleType = on_gpu) -> list[str]:
    """What is wrong with a case. Memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # else there is no filling
    torch.utils.deterministic.fill_uninitialized_memory = True
    case = CASES[name]
    try:
        return run_layer(case, device, backend) if isinstance(case, LayerCase) else run_link(case, device, backend)
    except Exception:
        return [traceback.format_exc()]
    finally:
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: run(name, "cpu") for name in sys.argv[1:] or CASES}, sys.stdout)
