"""Priors corrected by known statistics: a pretrained network's running ones, or those of data.

The rules assume that the terms of a sum are independent. In a trained network, activations behind a ReLU
rise and fall together, and a prior's variance comes out several times too small. The error changes slowly
while weights move, so a constant corrects it (:mod:`kalmannorm.correction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kalmannorm.describe import geometric_mean, in_columns, mean_distance, or_dash
from kalmannorm.functional import observe
from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.modules import KalmanLayer
from kalmannorm.passes import Population, call_with, merge_over_processes, run_batches
from kalmannorm.priors import with_noise
from kalmannorm.propagation import without_autocast
from kalmannorm.traversal import attributes_kept, in_eval, inputs_seen, kalman_layers


@dataclass(frozen=True)
class CalibrationRow:
    """One Kalman layer."""

    name: str
    """Its qualified name in the model."""
    source: str
    """The statistics that its prior was corrected by: "running statistics" or "data"; empty without a correction."""
    variance: float = math.nan
    """The prior's variance, process noise included, over the true one, before the correction: the geometric mean over
    channels that are not constant. NaN if it is not known yet."""
    mean: float = math.nan
    """The root mean square distance of the two means over these channels, in true standard deviations."""
    reason: str = ""
    """Why it was not corrected, or not yet."""


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`calibrate`. ``str()`` gives a table."""

    rows: list[CalibrationRow]

    def __str__(self) -> str:
        lines = [("layer", "variance, prior / true", "mean, off by", "corrected by")]
        for row in self.rows:
            numbers = or_dash("{:.3g}", row.variance), or_dash("{:.3g} std", row.mean)
            said = f"{row.source}, {row.reason}" if row.source and row.reason else row.source or f"no: {row.reason}"
            lines.append((row.name, *numbers, said))
        corrected = sum(bool(row.source) for row in self.rows)
        return "\n".join([*in_columns(lines), f"{corrected} of {len(self.rows)} priors corrected"])


def calibrate(model: nn.Module, inputs_or_loader: Any = None, *, source: Literal["running", "data"] = "running",
              forward: Callable[[nn.Module, Any], object] | None = None, max_batches: int | None = None,
              progress: bool = True, process_group: dist.ProcessGroup | None = None) -> Calibration:  # fmt: skip
    """Correct each layer's prior, channel by channel, by known statistics.

    :func:`kalmannorm.convert` asks for it in pretrained networks. Call this to see how far priors are
    off; for layers without running statistics, which need data; again later in a training; and before
    the first step of a network with stochastic depth, as that step keeps only some blocks.

    The correction is constant from then on and part of the state dict (``prior_shift``,
    ``prior_scale``). A layer that is called several times has one, for the mean of its priors. If
    nothing is known about a layer's input, its running statistics are its prior.

    Args:
        model: a converted network, changed in place.
        inputs_or_loader: an input (a tensor, or a mapping that is called as ``model(**inputs)``), or batches as
            :func:`kalmannorm.recalibrate` takes them: a tuple of two tensors is two batches. The network runs in
            ``eval()``. None: nothing runs, and each layer with running statistics corrects its prior at the next call
            that computes one.
        source: ``"running"``: by running statistics, or by the data in layers without trained ones.
            ``"data"``: by the data in all layers, as after training with this library, whose running statistics
            are posteriors. Each batch is normalized by its own statistics then: take batches of 32 and more.
        forward: ``forward(model, batch)`` calls the model on other batches.
        max_batches: stop after so many; None for all.
        progress: show a progress bar of rich or tqdm, if one of them is installed.
        process_group: merge the data of its processes, all of which must call this; all get the same corrections.

    Returns:
        A row for each Kalman layer.

    Raises:
        ValueError: without a Kalman layer that uses its prior; for another ``source`` or an empty loader; without data,
            if no layer has running statistics of a training.
        TypeError: for a batch that is none of these, without ``forward``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
        >>> _ = torch.nn.init.constant_(model[0].weight, 2.0)
        >>> for _ in range(30):  # running statistics move away from 0 and 1
        ...     _ = model(torch.randn(64, 1))
        >>> model = kn.convert(model, input_stats=([0.0], [0.5]))
        >>> kn.calibrate(model, torch.randn(8, 1)).rows[0].source
        'running statistics'
        >>> bool(model[1].prior_scale > 1)  # the input is wider than the model was told
        True
    """
    layers = {name: layer for name, layer in kalman_layers(model) if not layer.frozen and not layer.ignores_prior}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Kalman layer whose prior could be corrected, expected one")
    if source not in ("running", "data"):
        raise ValueError(f"kalmannorm.calibrate got source={source!r}, expected 'running' or 'data'")
    if inputs_or_loader is None:
        return _at_next_call(model, layers)
    observed = {name: _Observed(layer, source) for name, layer in layers.items()}
    single = isinstance(inputs_or_loader, Tensor | Mapping)
    with _observing(model, observed.values()):
        run_batches(
            model, [inputs_or_loader] if single else inputs_or_loader, partial(forward or call_with, model),
            caller="calibrate", max_batches=max_batches, progress=progress and not single, process_group=process_group,
        )  # fmt: skip
    merge_over_processes(observed.values(), process_group)
    _share_priors(list(observed.values()), process_group)
    return Calibration([each.correct(name) for name, each in observed.items()])


def _at_next_call(model: nn.Module, layers: Mapping[str, KalmanLayer]) -> Calibration:
    """Ask layers with running statistics for a correction."""
    known = {name: layer for name, layer in layers.items() if layer.has_known_statistics}
    if not known:
        raise ValueError(
            f"{type(model).__name__} has no Kalman layer with running statistics of a training, expected one, or data: "
            "kalmannorm.calibrate(model, loader)"
        )
    for layer in known.values():
        layer.await_correction()
    found = CalibrationRow("", "running statistics", reason="at the next call")
    missing = CalibrationRow("", "", reason="it has no running statistics of a training")
    return Calibration([replace(found if name in known else missing, name=name) for name in layers])


class _Observed(Population):
    """A layer's inputs in the pass, and the priors of them."""

    def __init__(self, layer: KalmanLayer, source: str) -> None:
        super().__init__(layer)
        known = layer.has_known_statistics and source == "running"
        self.target = layer.correction_target().map(Tensor.double) if known else None  # None: the data's
        self.priors: list[Gaussian] = []
        self.reason = "it was not called, and stays as it was"

    def look(self, x: Tensor) -> None:
        """Add an input, ``(N, C, *)``, and its prior."""
        if not x.numel():
            return
        observation = observe(x)
        with without_autocast(x.device):
            belief = self.layer.belief(x, 1)
            prior = belief if isinstance(belief, Unknown) else belief.per_channel(1)
        self.add(observation, x.shape[0])
        if isinstance(prior, Unknown):
            self.reason = prior.reason
            return
        self.priors.append(prior.map(Tensor.double))
        if self.target is None:
            # Normalized by the batch, so that the layers above see a network that works.
            self._set(*self.layer.correction_to(prior, observation))

    def _set(self, shift: Tensor, scale: Tensor) -> None:
        layer = self.layer
        with torch.inference_mode(False):  # a later pass may need gradients
            layer.prior_shift, layer.prior_scale = shift.float().clone(), scale.float().clone()
        layer.dropped_statistics = None
        layer._read_correction()

    def mean_prior(self) -> Packed:
        """The mean of the priors that the layer has had, ``(1, C)``."""
        return Packed(torch.stack([prior.packed().moments for prior in self.priors]).mean(0))

    def correct(self, name: str) -> CalibrationRow:
        """Set the layer's correction; return how far its prior was off."""
        layer, source = self.layer, "data" if self.target is None else "running statistics"
        if not self.samples:
            return CalibrationRow(name, "", reason=self.reason)
        if not self.priors and self.target is not None and getattr(layer, "running_mean", None) is not None:
            layer.await_correction()
            return CalibrationRow(name, source, reason=f"which are its prior: {self.reason}")
        if not self.priors:
            layer.drop_correction()
            return CalibrationRow(name, "", reason=self.reason)
        target = self.statistics if self.target is None else self.target
        prior = self.mean_prior()
        self._set(*layer.correction_to(prior, target))
        var = with_noise(prior, layer.process_noise).var.detach()
        alive = target.var > 0
        if not bool(alive.any()):
            return CalibrationRow(name, source, reason="all of its channels are constant")
        ratio = geometric_mean(var / target.var, alive)
        return CalibrationRow(name, source, ratio, mean_distance(prior.mean, target, alive))


@contextmanager
def _observing(model: nn.Module, observed: Collection[_Observed]) -> Iterator[None]:
    """Run a model in ``eval()`` with beliefs, and observe its layers; their corrections are restored."""
    layers = [each.layer for each in observed]
    looks = [(each.layer, each.look) for each in observed]
    with attributes_kept(layers, "is_observed", "online"), in_eval(model), inputs_seen(looks):
        for each in observed:
            each.layer.is_observed = True
            if each.target is None:
                each.layer.drop_correction()
                each.layer.online = True
        yield


def _share_priors(observed: Sequence[_Observed], group: dist.ProcessGroup | None) -> None:
    """Give all processes the priors of the first that has some; shapes of batches may have made others a little."""
    if group is None:
        return
    own = torch.tensor([len(each.priors) for each in observed], device=observed[0].samples.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    for each, has in zip(observed, zip(*[row.tolist() for row in counts], strict=True), strict=True):
        if any(has):
            prior = each.mean_prior() if each.priors else each.statistics.packed()
            first = next(rank for rank, number in enumerate(has) if number)
            dist.broadcast(prior.moments, dist.get_global_rank(group, first), group=group)
            each.priors = [prior]
