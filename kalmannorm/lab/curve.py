"""Callbacks that store a run's curve and its random state in the checkpoint."""

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


class Curve(Callback):
    """Records the loss and the duration of each gradient step, and each validation.

    Losses stay on their device and are copied in blocks of ``every`` steps, so that steps do not
    wait for the GPU; then ``on_progress`` is called with the number of steps done. A step's duration
    is the mean over its block, without validation. Its loss is the mean over accumulated batches and
    processes. Put it before callbacks that save checkpoints.
    """

    def __init__(self, on_progress: Callable[[int], None] = lambda step: None, every: int = 25) -> None:
        self.on_progress, self.every = on_progress, every
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validations: list[dict[str, float]] = []
        self.elapsed = 0.0
        self._parts: list[Tensor] = []
        self._waiting: list[Tensor] = []
        self._since = self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided this loss by the number of accumulated batches.
        self._parts.append(outputs["loss"].detach())
        if trainer.global_step > len(self.losses) + len(self._waiting):
            self._waiting.append(torch.stack(self._parts).sum())
            self._parts = []
        if len(self._waiting) >= self.every:
            self._copy_losses(trainer)

    def _copy_losses(self, trainer: Trainer) -> None:
        if self._waiting:
            block = torch.stack(self._waiting)
            self.losses += trainer.strategy.reduce(block, reduce_op="mean").tolist()
            duration = time.perf_counter() - self._since
            self.seconds += [duration / len(self._waiting)] * len(self._waiting)
            self._waiting = []
            self.on_progress(len(self.losses))
        self._since = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.elapsed, self._last = self.elapsed + now - self._last, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a block, so that validation time is left out."""
        if trainer.state.fn == "fit":
            self._copy_losses(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "loss"}
            self.validations.append({"step": trainer.global_step, **metrics})
            self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._copy_losses(trainer)
        self._count_time()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._copy_losses(trainer)
        self._count_time()
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("losses", "seconds")}
        checkpoint["curve"] = {**numbers, "validations": [*self.validations], "elapsed": self.elapsed}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "curve" in checkpoint:
            kept = checkpoint["curve"]
            self.losses, self.seconds = kept["losses"].tolist(), kept["seconds"].tolist()
            self.validations, self.elapsed = kept["validations"], kept["elapsed"]


class RandomState(Callback):
    """Restores the random states of torch, numpy and Python in a resumed run.

    All processes get the first one's states.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (the global state that libraries use)
        checkpoint["random"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            # Plain types, for torch.load with weights_only.
            "numpy": [kind, np.asarray(keys).tolist(), *rest],
            "python": random.getstate(),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the states until training starts, since setup may draw."""
        self._kept = checkpoint.get("random")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._kept is None:
            return
        torch.set_rng_state(self._kept["torch"].cpu())
        if len(self._kept["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._kept["cuda"]])
        np.random.set_state(tuple(self._kept["numpy"]))  # noqa: NPY002
        version, state, gauss = self._kept["python"]
        random.setstate((version, tuple(state), gauss))
        self._kept = None
