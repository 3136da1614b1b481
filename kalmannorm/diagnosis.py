"""Why a network is worse in ``eval()`` than in training: its statistics by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.correction import is_trained
from kalmannorm.describe import geometric_mean, in_columns, mean_distance, or_dash
from kalmannorm.functional import observe
from kalmannorm.gaussian import Gaussian
from kalmannorm.inference import collecting, layers_to_recalibrate
from kalmannorm.modules import KalmanLayer
from kalmannorm.passes import Population, call_with, run_batches
from kalmannorm.steps import found_in
from kalmannorm.traversal import in_eval, inputs_seen, random_state_kept

# The advice begins where a variance is off by this factor, or a mean by so many standard deviations;
_FACTOR = 1.5
_DISTANCE = 0.25
# where statistics spread so much from batch to batch, or outputs differ so much.
_SPREAD = 0.5
_OUTPUTS = 0.2
# Below this share of the data's variance, a prior leaves a layer to its batch; above this one, it makes outputs small.
_NARROW, _WIDE = 0.5, 2.0
# A variance below this share of the squared mean is what rounding in single precision leaves of a constant.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class DiagnosisRow:
    """One BatchNorm or Kalman layer. Ratios are geometric means over channels that are not constant, ideally 1; NaN
    without anything to compare.
    """

    name: str
    """Its qualified name in the model."""
    running: float
    """The running variance over that which :func:`recalibrate` would give the layer."""
    mean: float
    """The RMS distance of the running mean from the one of :func:`recalibrate`, in standard deviations."""
    spread: float
    """How much the statistics that training normalizes by differ from batch to batch: the standard deviation of the
    variances over their mean or, if it is larger, of the means in the data's standard deviations."""
    prior: float
    """The variance of a Kalman layer's prior over that of its input."""
    in_eval: float
    """The mean square of the normalized input in ``eval()`` over that in training."""
    advice: str
    """What is wrong, and the remedy; empty if nothing is."""


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`. ``str()`` gives a table."""

    rows: list[DiagnosisRow]
    outputs: float
    """The distance of the network's outputs in ``eval()`` from those by each batch's statistics, over the size of the
    latter; NaN without a floating-point output."""

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "running var", "mean off by", "spread", "prior var", "in eval()", "")]
        forms = ("x {:.3g}", "{:.3g} std", "{:.3g} %", "x {:.3g}", "x {:.3g}")
        for row in self.rows:
            numbers = row.running, row.mean, 100 * row.spread, row.prior, row.in_eval
            lines.append((row.name, *map(or_dash, forms, numbers), row.advice))
        wrong = sum(bool(row.advice) for row in self.rows)
        said = f"{wrong} of {len(self.rows)} layers need attention"
        if self.outputs == self.outputs:
            said += f"; outputs in eval() and by batch statistics differ by {100 * self.outputs:.3g} % of their size"
        if not wrong and self.outputs > _OUTPUTS:
            said += ": the network uses what batches' own statistics tell: train on after kalmannorm.freeze(model)"
        return "\n".join([*(line.rstrip() for line in in_columns(lines)), said])


def diagnose(model: nn.Module, loader: Iterable[Any], validation: Iterable[Any] | None = None, *,
             forward: Callable[[nn.Module, Any], object] | None = None, max_batches: int | None = 16,
             progress: bool = True) -> Diagnosis:  # fmt: skip
    """Find out why ``eval()`` is worse than training, layer by layer, with Kalman or BatchNorm layers.

    Each batch runs twice through the network in ``eval()``: by :func:`online_statistics`, and by running
    statistics. Parameters, buffers, training flags and the random state are restored.

    Args:
        model: a network with BatchNorm or Kalman layers that track running statistics.
        loader: training batches, of the training's batch size, as :func:`recalibrate` takes them.
        validation: batches to run by running statistics instead. First layers show whether preprocessing differs.
        forward: ``forward(model, batch)`` calls the model on other batches.
        max_batches: stop after so many; None for all.
        progress: show a progress bar of rich or tqdm, if one of them is installed.

    Returns:
        A row for each layer that is not frozen, in the order of the model.

    Raises:
        ValueError: without a layer with running statistics that is not frozen, or without a batch.
        TypeError: for a batch that is none of these, without ``forward``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU())
        >>> batches = [5 + torch.randn(2, 3, 8, 8) for _ in range(4)]
        >>> print(kn.diagnose(model, batches, progress=False).rows[0].advice)
        its running statistics are the initial ones: it saw no batch in train()
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):  # its call would wait for the other processes
        model = model.module
    layers = layers_to_recalibrate(model)
    inputs, by_running = ({name: Population(layer) for name, layer in layers.items()} for _ in range(2))
    by_batch = {name: _Spread(layer) for name, layer in layers.items()}
    call = partial(forward or call_with, model)
    differences: list[tuple[float, float]] = []

    def see_inputs(batch: Any) -> object:
        with in_eval(model), inputs_seen([(each.layer, each.observe) for each in inputs.values()]):
            return call(batch)

    def run_twice(batch: Any) -> None:
        kalman = [(each.layer, each.look) for each in by_batch.values() if isinstance(each.layer, KalmanLayer)]
        with collecting(model, by_batch.values()), inputs_seen(kalman):
            expected = call(batch)
        with collecting(model, by_running.values(), by_running=True):
            output = see_inputs(batch) if validation is None else call(batch)
        if validation is None:
            differences.extend(_differences(output, expected))

    run = partial(run_batches, model, caller="diagnose", max_batches=max_batches, progress=progress)
    with random_state_kept(model):
        run(loader, run_twice)
        if validation is not None:
            run(validation, see_inputs, title="validation")
    rows = [_row(name, by_batch[name], by_running[name], inputs[name], validation is not None) for name in layers]
    off, size = (sum(each) for each in zip(*differences, strict=True)) if differences else (0.0, 0.0)
    return Diagnosis(rows, math.sqrt(off / size) if size else math.nan)


class _Spread(Population):
    """Also keeps the statistics of each batch, and the priors' variances, ``(S, C)`` each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.newest: list[Gaussian] = []
        self.observed: list[Gaussian] = []  # the input's own, of a Kalman layer, which normalizes it by others
        self.priors: list[Tensor] = []
        self.input: Tensor | None = None

    def add(self, statistics: Gaussian, samples: int | Tensor) -> None:
        """Merge those of a batch, ``(S, C)``."""
        super().add(statistics, samples)
        self.newest.append(statistics.map(Tensor.double))
        if self.input is not None:
            self.observed.append(observe(self.input, statistics.shape[0]).map(Tensor.double))
            self.input = None

    def look(self, x: Tensor) -> None:
        """Keep the input of a Kalman layer, ``(N, C, *)``, and its prior."""
        self.input = x
        if (prior := self.layer.prior(x, 1)) is not None:
            self.priors.append(prior.var.double())


def _power(given: Gaussian, statistics: Gaussian, eps: float) -> Tensor:
    """The mean square of a tensor with the moments ``given``, normalized by ``statistics``."""
    return (given.var + (given.mean - statistics.mean).square()) / (statistics.var + eps)


def _differences(output: object, expected: object) -> list[tuple[float, float]]:
    """The squared distance of two outputs, and the squared size of the second."""
    pairs = zip(found_in((output,), Tensor), found_in((expected,), Tensor), strict=False)
    return [
        (float((a.double() - b.double()).square().sum()), float(b.double().square().sum()))
        for a, b in pairs if a.is_floating_point() and a.shape == b.shape
    ]  # fmt: skip


def _row(name: str, seen: _Spread, by_running: Population, inputs: Population, validated: bool) -> DiagnosisRow:
    layer = seen.layer
    running = Gaussian(layer.running_mean, layer.running_var).map(Tensor.double)
    true, right = (each.statistics.map(lambda t: t[0]) for each in (seen, by_running))
    # The variance of a constant is what rounding leaves of its square.
    alive = (true.var > _ROUNDING * true.mean.square()) & (running.var != 0)
    if not seen.samples or not bool(alive.any()):
        nothing = "no batch came through it" if not seen.samples else "all of its channels are constant"
        return DiagnosisRow(name, math.nan, math.nan, math.nan, math.nan, math.nan, nothing)
    newest = _stacked(seen.newest)
    spreads = newest.mean.std(0, correction=0) / true.std, newest.var.std(0, correction=0) / newest.var.mean(0)
    observed = _stacked(seen.observed or seen.newest)
    power = _power(inputs.statistics, running, layer.eps)[0] / _power(observed, newest, layer.eps).mean(0)
    own = observed.pool([0]).var[0]
    numbers = (
        geometric_mean(running.var / right.var, alive),
        mean_distance(running.mean, right, alive),
        max(float(spread[alive].square().mean().sqrt()) for spread in spreads),
        geometric_mean(torch.cat(seen.priors).mean(0) / own, alive & (own > 0)) if seen.priors else math.nan,
        geometric_mean(power, alive & (power > 0)) if inputs.samples else math.nan,
    )
    if is_trained(layer.running_mean, layer.running_var):
        return DiagnosisRow(name, *numbers, _advice(*numbers, validated))
    return DiagnosisRow(name, *numbers, "its running statistics are the initial ones: it saw no batch in train()")


def _stacked(each: Sequence[Gaussian]) -> Gaussian:
    return Gaussian(torch.cat([one.mean for one in each]), torch.cat([one.var for one in each]))


def _advice(running: float, mean: float, spread: float, prior: float, in_eval: float, validated: bool) -> str:
    if not math.isfinite(running) or not math.isfinite(mean):
        return "statistics are not finite: kalmannorm.first_nonfinite(model)"
    if _is_off(running) or mean > _DISTANCE:
        return "its running statistics are not those of its input in eval(): kalmannorm.recalibrate(model, loader)"
    if _is_off(in_eval):
        if prior < _NARROW and not validated:
            return "its prior is too narrow, so it follows its batch: train on after kalmannorm.freeze(model)"
        others = "validation batches differ from training batches" if validated else "its input differs in eval()"
        return f"{others}, or a layer below is off: mend the first layer of this table"
    if prior > _WIDE:
        return "its prior is too wide, so its output is small: kalmannorm.calibrate(model, loader, source='data')"
    if spread > _SPREAD:
        return "statistics differ much from batch to batch: larger batches, or kalmannorm.convert(model)"
    return ""


def _is_off(ratio: float) -> bool:
    return ratio > _FACTOR or ratio < 1 / _FACTOR
