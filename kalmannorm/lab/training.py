"""Training and scoring an image classifier with Lightning, in a way that is fair between normalizations."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from kalmannorm import KalmanNorm, online_statistics
from kalmannorm.freezing import is_frozen

Batch = tuple[Tensor, Tensor]

# Warnings that a run is not the place for.
UNWANTED = (
    ".*does not have many workers.*",  # the data are tensors in memory: workers would only cost
    ".*have no `val_dataloader`.*",  # scored once, after training
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 calling torch's old name
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay the weights of convolutions and linear layers and nothing else.

    Scales, shifts, biases, gains and process noise all have fewer than two dimensions; a decay would pull a
    gain or a noise towards a value that nobody chose, and pull differently in each method.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _own_statistics(model: nn.Module) -> AbstractContextManager[None]:
    # Where there are no running statistics, as with GroupNorm, or only frozen ones, there is nothing to switch.
    switches = any(isinstance(m, KalmanNorm | _BatchNorm) and not is_frozen(m) for m in model.modules())
    return online_statistics(model) if switches else nullcontext()


class Classifier(lightning.LightningModule):
    """Trains a network on cross entropy by SGD with momentum, its rate falling along a cosine.

    Scoring gives both of the paper's options in one pass: ``accuracy_running`` (A: plain ``eval``) and
    ``accuracy_online`` (B: ``eval``, but each ``statistics_batch`` images normalize themselves).

    Args:
        model: Images ``(N, C, H, W)`` to logits ``(N, num_classes)``.
        num_classes: Number of classes.
        rate: Learning rate of the first step.
        steps: Optimizer steps the schedule is laid out for.
        schedule: ``"cosine"``, to 0, or ``"warmup"``, the same but rising to it over the first tenth of the
            steps.
        momentum: SGD's.
        weight_decay: On weights alone, see `parameter_groups`.
        statistics_batch: Images a group in option B.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        rate: float,
        steps: int,
        schedule: str = "cosine",
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        statistics_batch: int = 2,
    ) -> None:
        super().__init__()
        self.model = model
        self.rate, self.steps, self.schedule = rate, steps, schedule
        self.momentum, self.weight_decay = momentum, weight_decay
        self.statistics_batch = statistics_batch
        if schedule not in ("cosine", "warmup"):
            raise ValueError(f"schedule must be 'cosine' or 'warmup'; got {schedule!r}")
        self.running_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.online_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def configure_optimizers(self) -> Any:
        """SGD, with a schedule that moves every step."""
        groups = parameter_groups(self.model, self.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=self.rate, momentum=self.momentum)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _share_of_rate(self, step: int) -> float:
        done = step / self.steps
        rise = min(1.0, 10 * done + 1 / self.steps) if self.schedule == "warmup" else 1.0
        return rise * (1 + math.cos(math.pi * done)) / 2

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean cross entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch both ways."""
        images, labels = batch
        self.running_accuracy.update(self.model(images), labels)
        with _own_statistics(self.model):
            parts = [self.model(part) for part in torch.split(images, self.statistics_batch)]
        self.online_accuracy.update(torch.cat(parts), labels)

    def on_validation_epoch_end(self) -> None:
        """Publish both accuracies, 0 to 1."""
        for name, metric in (("running", self.running_accuracy), ("online", self.online_accuracy)):
            self.log(f"accuracy_{name}", metric.compute())
            metric.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end()


class Recorder(lightning.Callback):
    """Keeps each step's loss and duration, and now and then tells somebody how far the training is.

    Args:
        tell: Called with the number of steps done.
        every: Steps between two calls.
    """

    def __init__(self, tell: Callable[[int], None] = lambda step: None, every: int = 25) -> None:
        self.tell, self.every = tell, every
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._before = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._before = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the step that has just ended, from the end of the one before it."""
        assert isinstance(outputs, Mapping)
        self.losses.append(outputs["loss"].item())
        now = time.perf_counter()
        self.seconds.append(now - self._before)
        self._before = now
        if len(self.losses) % self.every == 0:
            self.tell(len(self.losses))


def loader(images: Tensor, labels: Tensor, batch_size: int, seed: int | None = None) -> DataLoader[Batch]:
    """Batches of tensors in memory: shuffled by ``seed`` and of equal size, or in order if that is None."""
    data = TensorDataset(images, labels)
    if seed is None:
        return DataLoader(data, batch_size)  # type: ignore[arg-type]
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    # A sampler of whole batches: one indexing a batch instead of one an image and a stack of them.
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=True), batch_size=None)  # type: ignore[arg-type]


def quiet_trainer(steps: int, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    """A Trainer for many short runs: it stops after ``steps``, saves nothing and prints nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return lightning.Trainer(**(settings | options))
