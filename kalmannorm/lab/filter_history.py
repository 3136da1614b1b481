"""Gains, process noise and the priors' errors while a network trains."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from kalmannorm.integrations.lightning import network_of
from kalmannorm.lab.analysis import errors_of
from kalmannorm.lab.results import csv_text, write_atomically
from kalmannorm.lab.seen import calls_of, is_watched
from kalmannorm.modules import KalmanNorm
from kalmannorm.priors import noise_ratio


class FilterHistory(Callback):
    """Records the gain and process noise of each Kalman layer, and its prior's errors, every few steps.

    The errors are those of `prior_errors` on the last training batch, with the weights after that step. Each record
    costs a forward pass and does not change the training. ``rows`` is in checkpoints. A batch is an input, or begins
    with one, of the module's one attribute that has Kalman layers, or else of the module.

    Args:
        every: Steps between two records; the first is after that many.
        path: A CSV file for the rows, written when training ends; None writes none.
    """

    def __init__(self, every: int = 100, path: Path | None = None) -> None:
        if every < 1:
            raise ValueError(f"FilterHistory got every={every}, expected a number above 0")
        self.every, self.path = every, path
        self.rows: list[dict[str, Any]] = []
        """One for each record and layer: ``step``, ``layer``, ``gain`` for its samples a group, the mean over channels
        of ``process_noise`` (None if it has none), and ``ESTIMATE_REFERENCE_MEASURE`` of `PriorError`."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is not None and 0 < trainer.max_steps < self.every:
            raise ValueError(f"FilterHistory looks every {self.every} steps, and max_steps is {trainer.max_steps}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With accumulated gradients, several batches have the same step.
        if step % self.every or (self.rows and self.rows[-1]["step"] == step) or not step:
            return
        with trainer.precision_plugin.forward_context():
            network = network_of(pl_module, is_watched)
            self.rows += [{"step": step, **row} for row in _rows(network, batch)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is not None and trainer.is_global_zero:
            self.write(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]

    def write(self, path: Path) -> None:
        if not self.rows:
            raise ValueError(f"FilterHistory has no rows to write to {path}: no training reached step {self.every}")
        write_atomically(path, csv_text(self.rows))


def _rows(network: nn.Module, batch: Any) -> list[dict[str, Any]]:
    layers = calls_of(network, [batch])
    errors = errors_of(network, layers)
    rows = []
    for name, calls in layers.items():
        layer = network.get_submodule(name)
        if not isinstance(layer, KalmanNorm):
            continue
        with torch.no_grad():
            noise = None if layer.process_noise is None else float(noise_ratio(layer.process_noise).mean())
            row = {"layer": name, "gain": float(layer.kalman_gain(calls[0].samples)), "process_noise": noise}
        for error in errors:
            if error.layer == name:
                prefix = f"{error.estimate}_{error.reference}_"
                row |= {prefix + measure: getattr(error, measure) for measure in ("mean", "log_ratio", "log_ratio_rms")}
        rows.append(row)
    return rows
