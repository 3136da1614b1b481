"""Errors of prior, observation and posterior, layer by layer, and the variance gaps of Fig. 5."""

import statistics
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian
from kalmannorm.lab import figures
from kalmannorm.lab.fitting import load_with_data
from kalmannorm.lab.seen import Seen, calls_of, statistics_batches

# Batches in Fig. 5.
BATCHES = 1000


def variance_gaps(network: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Distance of each batch's variance from the moving variance, layer by layer (Fig. 5).

    Args:
        network: A trained network with BatchNorm or Kalman layers; it does not change.
        batches: Inputs, or tuples that begin with them. For a Kalman layer with
            ``stats_batch_size``, each group is a batch.

    Returns:
        For each layer with running statistics ``|variance - running_var|``, ``(batches, C)``.
    """
    gaps = {}
    for name, calls in calls_of(network, batches).items():
        moving = network.get_submodule(name).running_var
        if isinstance(moving, Tensor):
            gaps[name] = (torch.cat([call.posterior.var for call in calls]) - moving).abs().cpu()
    return gaps


def measured_gap(folder: Path, drawing: Path | None = None) -> float:
    """The `relative_gap` of a run's network on test images; ``drawing`` is a PNG file for its heat maps."""
    module: Any
    module, data = load_with_data(folder)
    network, size = module.network, module.statistics_batch
    gaps = variance_gaps(network, islice(statistics_batches(data.test_dataloader(), size), BATCHES))
    if drawing is not None:
        figures.variance_gaps(f"{size} images", gaps).savefig(drawing, dpi=150)
    return relative_gap(gaps, {name: network.get_submodule(name).running_var for name in gaps})


def relative_gap(gaps: Mapping[str, Tensor], running: Mapping[str, Tensor]) -> float:
    """The mean gap of a layer over its mean running variance, averaged over layers."""
    return statistics.fmean(float(gaps[name].mean() / running[name].mean()) for name in gaps)


class PriorError(NamedTuple):
    """Error of an estimate of a layer's moments, over all batches and channels.

    Variances include the layer's ``eps``.
    """

    layer: str
    estimate: str
    """``"prior"``, ``"observation"`` or ``"posterior"``."""
    reference: str
    """``"population"``: all batches together; or ``"observation"``: each batch's own moments."""
    mean: float
    """Mean of the squared difference of the means, in units of the reference's variance."""
    log_ratio: float
    """Mean of ``log(variance / reference's)``: below 0 where the estimate is too narrow."""
    log_ratio_rms: float
    """Root of the mean of its square."""
    variance_gap: float | None
    """Against the population: mean distance of the variance from the running variance, over the latter's mean."""


def prior_errors(network: nn.Module, batches: Iterable[Any]) -> list[PriorError]:
    """Errors of prior, observation and posterior, layer by layer; arguments as of `variance_gaps`.

    The population has the moments of all the layer's samples, from its observations by the law of
    total variance. All batches' moments are kept in memory; a few hundred batches are enough.

    Layers are in the order of their calls. A layer with a prior has the errors of prior, observation
    and posterior against the population, and of the prior against the observation; its batches
    without a prior are left out. Other layers have the observation's error alone.
    """
    return errors_of(network, calls_of(network, batches))


def errors_of(network: nn.Module, layers: dict[str, list[Seen]]) -> list[PriorError]:
    """`prior_errors` from recorded calls."""
    rows = []
    for name, calls in layers.items():
        layer: Any = network.get_submodule(name)
        informed = [call for call in calls if call.prior is not None]
        moments = {"population": _population(calls), "observation": _stacked(informed or calls, "observation")}
        pairs = [("observation", "population")]
        if informed:
            moments |= {estimate: _stacked(informed, estimate) for estimate in ("prior", "posterior")}
            pairs = [("prior", "population"), ("posterior", "population"), ("prior", "observation"), *pairs]
        for estimate, reference in pairs:
            known = reference == "population" and layer.running_var is not None
            gap = _gap(layer.running_var, calls, estimate) if known else None
            errors = _errors(moments[estimate], moments[reference], layer.eps)
            rows.append(PriorError(name, estimate, reference, *errors, gap))
    return rows


def _gap(running: Tensor, calls: list[Seen], estimate: str) -> float:
    moments = [getattr(call, estimate) for call in calls if getattr(call, estimate) is not None]
    return sum(float((each.var - running).abs().mean()) for each in moments) / len(moments) / float(running.mean())


def _stacked(calls: Iterable[Seen], estimate: str) -> Gaussian:
    moments = [getattr(call, estimate) for call in calls]
    return Gaussian(torch.cat([m.mean for m in moments]), torch.cat([m.var for m in moments])).map(Tensor.double)


def _population(calls: list[Seen]) -> Gaussian:
    """Moments ``(1, C)`` of all observations together."""
    observed = _stacked(calls, "observation")
    samples = torch.cat([torch.full((len(c.observation.mean), 1), float(c.samples)) for c in calls])
    share = (samples / samples.sum()).to(observed.mean)
    mean = (share * observed.mean).sum(0, keepdim=True)
    return Gaussian(mean, (share * (observed.var + (observed.mean - mean).square())).sum(0, keepdim=True))


def _errors(estimate: Gaussian, reference: Gaussian, eps: float) -> tuple[float, float, float]:
    width = reference.var + eps
    mean = ((estimate.mean - reference.mean).square() / width).mean()
    ratio = ((estimate.var + eps) / width).log()
    return float(mean), float(ratio.mean()), float(ratio.square().mean().sqrt())
