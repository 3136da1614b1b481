"""A table of a network's Kalman layers: which have a prior, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.modules import KalmanLayer
from kalmannorm.propagation import function_name, without_autocast
from kalmannorm.recording import is_open
from kalmannorm.steps import ancestors, step_of
from kalmannorm.traversal import inputs_seen, kalman_layers, random_state_kept, state_kept


@dataclass(frozen=True)
class Row:
    """One Kalman layer."""

    name: str
    """Its qualified name in the model."""
    kind: str
    """Its class."""
    gain: float
    """Its gain, the weight of the batch in (0, 1]; NaN on the meta device."""
    prior_from: tuple[str, ...]
    """The layers below (or ``"input"``) that its prior comes from; empty without a prior."""
    through: tuple[str, ...]
    """The functions that the prior crossed, in the order they were called."""
    reason: str
    """Why there is no prior; empty with one."""
    correction: float | None = None
    """The factor that corrects the prior's variance (:func:`kalmannorm.calibrate`): its geometric mean over channels;
    None without a correction."""


@dataclass(frozen=True)
class Description:
    """The result of :func:`describe`. ``str()`` gives a table."""

    rows: list[Row]

    @property
    def with_prior(self) -> int:
        """How many layers have a prior."""
        return sum(not row.reason for row in self.rows)

    def __str__(self) -> str:
        lines = [["layer", "kind", "gain", "prior from", "through"]]
        for row in self.rows:
            if row.reason:
                lines.append([row.name, row.kind, "1", "-", f"no prior: {row.reason}"])
            else:
                short = [name.removeprefix("torch.").removeprefix("nn.functional.") for name in row.through]
                below = row.prior_from if len(row.prior_from) <= 3 else row.prior_from[:2]
                more = "" if below is row.prior_from else f" and {len(row.prior_from) - 2} more"
                lines.append([row.name, row.kind, f"{row.gain:.3g}", ", ".join(below) + more, " > ".join(short)])
        if any(row.correction is not None for row in self.rows):
            corrections = ["-" if row.correction is None else f"x {row.correction:.3g}" for row in self.rows]
            for line, cell in zip(lines, ["corrected", *corrections], strict=True):
                line.insert(3, cell)
        return "\n".join([*in_columns(lines), f"{self.with_prior} of {len(self.rows)} layers have a prior"])


def in_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns, but for the last, have one width each."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return ["  ".join([*map(str.ljust, line[:-1], widths), line[-1]]) for line in lines]


def or_dash(form: str, value: float) -> str:
    """A number in a cell of a table; a dash for NaN."""
    return "-" if math.isnan(value) else form.format(value)


def geometric_mean(values: Tensor, among: Tensor) -> float:
    """The geometric mean of those values where a mask holds; NaN if it holds nowhere."""
    return float(values[among].log().mean().exp()) if bool(among.any()) else math.nan


def mean_distance(mean: Tensor, true: Gaussian, among: Tensor) -> float:
    """The root mean square, over channels where a mask holds, of a mean's distance in standard deviations."""
    return float(((mean - true.mean) / true.std)[among].square().mean().sqrt())


def describe(model: nn.Module, *inputs: Any, **kwargs: Any) -> Description:
    """Run a network once, in training mode, and report which layers have a prior, and why others have none.

    Parameters, buffers, training flags and the random state are restored.

    Args:
        model: a converted or connected network.
        inputs: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        A row for each Kalman layer in the order of their first calls; a layer that is not called comes last.

    Raises:
        ValueError: for a model without a Kalman layer.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...     torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8))
        >>> description = kn.describe(kn.convert(model), torch.randn(2, 3, 8, 8))
        >>> [(row.name, row.prior_from) for row in description.rows]
        [('1', ()), ('4', ('1',))]
    """
    layers = dict(kalman_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Kalman layer to describe: kalmannorm.convert(model) first")
    rows: dict[str, Row] = {}

    def look(name: str, x: Tensor) -> None:
        if name not in rows:
            rows[name] = _row(name, layers[name], x)

    looks = [(layer, partial(look, name)) for name, layer in layers.items()]
    with random_state_kept(model), state_kept(model), torch.no_grad(), inputs_seen(looks):
        model.train()
        model(*inputs, **kwargs)
        rows = {name: replace(row, correction=_mean_scale(layers[name])) for name, row in rows.items()}
    for name, layer in layers.items():
        if name not in rows:
            rows[name] = Row(name, type(layer).__name__, 1.0, (), (), "the layer was not called")
    return Description(list(rows.values()))


def _row(name: str, layer: KalmanLayer, x: Tensor) -> Row:
    """The row of a layer that is about to normalize ``x``, ``(N, C, *)``."""
    kind, step, reason = type(layer).__name__, step_of(x), ""
    if layer.ignores_prior:
        reason = "its gain is 1"
    elif layer.frozen and not layer.is_fusing:
        reason = "it is frozen"
    elif not layer.is_fusing:
        reason = "it stays in eval()"
    elif not is_open():
        reason = "no module above it is connected"
    else:
        with without_autocast(x.device):
            value = layer.belief(x, layer.statistic_groups(x.shape[0]))
        reason = value.reason if isinstance(value, Unknown) else ""
        if reason and layer.is_corrected and getattr(layer, "running_mean", None) is not None:
            return Row(name, kind, _gain(layer, x), ("its running statistics",), (), "")
    if reason or step is None:
        return Row(name, kind, 1.0, (), (), reason)
    steps = ancestors(step)
    sources = dict.fromkeys(each.source for each in steps if each.function is None)
    through = [function_name(each.function) for each in steps if each.function is not None]
    return Row(name, kind, _gain(layer, x), tuple(sources), tuple(through), "")


def _mean_scale(layer: KalmanLayer) -> float | None:
    scale = layer.prior_scale
    found = math.nan if not layer.is_corrected or scale.is_meta else geometric_mean(scale.double(), scale > 0)
    return None if math.isnan(found) else found


def _gain(layer: KalmanLayer, x: Tensor) -> float:
    gain = layer.kalman_gain(layer.observed_maps(x.shape[0]))
    return math.nan if isinstance(gain, Tensor) and gain.is_meta else float(gain)


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first Kalman layer that saw a NaN or an infinity in training; None if none did.

    You need it when a loss has become NaN. Each layer counts its calls with statistics that were not
    finite; its running statistics keep their last value. This names the first layer, in the order of
    the model's modules, with the largest count: once weights are NaN, all layers count alike.

    Args:
        model: a network with :class:`KalmanNorm` layers that track running statistics.

    Raises:
        ValueError: for a network without such layers.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = kn.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
        >>> _ = model(torch.full((1, 3, 8, 8), float("inf")))
        >>> kn.first_nonfinite(model)
        '1'
    """
    counters = {name: getattr(layer, "nonfinite_batches", None) for name, layer in kalman_layers(model)}
    counts = {name: int(counter) for name, counter in counters.items() if counter is not None}
    if not counts:
        raise ValueError(f"{type(model).__name__} has no KalmanNorm layer that tracks running statistics")
    first = max(counts, key=counts.__getitem__)  # of equal ones, the first
    return first if counts[first] else None
