"""Kalman layers for any LightningModule, by one entry in `Trainer(callbacks=[...])`."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kalmannorm import anneal, convert, first_nonfinite, freeze, online_statistics, recalibrate
from kalmannorm.inference import tracking_layers
from kalmannorm.modules import KalmanNorm, is_stock_batchnorm
from kalmannorm.passes import call_with
from kalmannorm.stand_ins import stand_in
from kalmannorm.traversal import in_eval, kalman_layers, random_state_kept

Forward = Callable[[nn.Module, Any], object]
# Callbacks that copy the module in `setup`.
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}


class _SyncOfStockLayers(TorchSyncBatchNorm):
    """Makes BatchNorm layers SyncBatchNorm, and leaves Kalman layers, which are subclasses of BatchNorm."""

    def apply(self, model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if is_stock_batchnorm(child):
                    setattr(parent, name, super().apply(child))
        return model


class KalmanNormCallback(lightning.Callback):
    """Converts a LightningModule's network when a trainer sets it up, and checks losses for NaN.

    It converts in `setup`: before `configure_optimizers`, so the optimizer gets gains and process noises, and
    before a checkpoint is loaded, so `ckpt_path=` works. It does not convert a network that has Kalman layers
    already, or one that is built later, in `LightningModule.setup` or `configure_model`: call
    `kalmannorm.convert` there. Callbacks that average weights come after it. With `Trainer(sync_batchnorm=True)`,
    Kalman layers without `stats_batch_size` share statistics between processes.

    Without a trainer, `load_from_checkpoint(path, strict=False)` gives the BatchNorm network to deploy, which
    the main process has after a strategy that spawns.

    Args:
        online: Validate, test and predict by the statistics of each batch, see `kalmannorm.online_statistics`.
        recalibrate: Replace running statistics by those of so many training batches, see `kalmannorm.recalibrate`: at
            the end of training, where earlier checkpoints keep running averages and `trainer.save_checkpoint` saves the
            new statistics; or before layers are frozen, by the last batches up to then, which are kept in memory. A
            training that is resumed among these batches uses those since.
        forward: ``forward(network, batch)`` calls the network to recalibrate it; by default it is called with the
            batch, or with its first element. The first training batch tries it.
        anneal: The factor of `kalmannorm.anneal` over the whole training; each optimizer step takes its share. 1
            leaves gains to the optimizer. With manual optimization, each optimizer must make one step a batch.
        anneal_from: The share of the steps before annealing starts: until the learning rate is low.
        freeze_from: The share of the steps after which all normalization layers are frozen, see `kalmannorm.freeze`:
            the network then trains as `eval()` uses it. They stay frozen after training. 1 never freezes. With
            ``recalibrate`` they are frozen at the statistics of their inputs in `eval()`.
        log_gains: Log the layers' mean gain for a single feature map after each epoch, as `kalman_gain`.
        stop_at_nonfinite: End training at a loss that is not finite; checked as often as the trainer logs.
        convert_options: Options of `kalmannorm.convert`. `input_stats` describe the input of the one attribute with
            normalization layers, or of the module itself if several attributes have them.

    Raises:
        ValueError: In `setup`, from `kalmannorm.convert`, for example without a layer to convert; for a callback before
            it that averages weights; for `StochasticWeightAveraging` with ``freeze_from``, and `WeightAveraging` with
            ``recalibrate`` at the end. For an ``anneal`` not above 0, an ``anneal_from`` outside [0, 1), a
            ``freeze_from`` outside (0, 1], or a ``recalibrate`` below 1. In training, if the number of steps is
            unknown; if the network cannot be called with a batch, to recalibrate; and with ``freeze_from`` for a DDP
            strategy that expects a gradient for each parameter.
        FloatingPointError: In training, for a loss that is not finite; it names the layer where it began.

    Example:
        >>> callback = KalmanNormCallback(input_stats=([0.0] * 3, [1.0] * 3), recalibrate=200)
        >>> trainer = lightning.Trainer(max_epochs=10, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(self, *, online: bool = False, recalibrate: int | None = None, forward: Forward | None = None,
                 anneal: float = 1.0, anneal_from: float = 0.0, freeze_from: float = 1.0, log_gains: bool = False,
                 stop_at_nonfinite: bool = True, **convert_options: Any) -> None:  # fmt: skip
        check_shares("KalmanNormCallback: ", anneal, anneal_from, freeze_from)
        if recalibrate is not None and recalibrate < 1:
            raise ValueError(f"KalmanNormCallback got recalibrate={recalibrate}, expected None or a number above 0")
        self.online, self.recalibrate, self.forward = online, recalibrate, forward
        self.anneal, self.anneal_from, self.freeze_from = anneal, anneal_from, freeze_from
        self.log_gains, self.stop_at_nonfinite = log_gains, stop_at_nonfinite
        self.convert_options = convert_options
        self._counts_steps, self._froze = anneal != 1 or freeze_from < 1, False
        self._latest: deque[Any] = deque(maxlen=recalibrate)  # batches before the layers are frozen
        self._annealed = 0
        self._annealed_at: int | None = None  # the trainer's step
        self._switched = ExitStack()
        self._synchronized: list[KalmanNorm] = []

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Convert; share statistics between processes if the trainer synchronizes BatchNorm."""
        if stage == "fit":
            self._check_averaging(trainer)
        if next(kalman_layers(pl_module), None) is None:
            self._check_order(trainer, stage)
            layers = self.convert_options.get("layers", ("batch",))
            kinds = (layers,) if isinstance(layers, str) else tuple(layers)
            network = network_of(pl_module, lambda layer: stand_in(layer)[0] in kinds)
            is_called = network is not pl_module or type(pl_module).forward is not lightning.LightningModule.forward
            if not is_called and self.convert_options.get("input_stats") is not None:
                warnings.warn(
                    f"KalmanNormCallback got input_stats for {type(pl_module).__name__}, which has normalization "
                    "layers in several attributes and no forward: nobody calls it, so the first layers have no prior. "
                    "Call kalmannorm.convert(part, input_stats=...) for each part in the module's __init__",
                    stacklevel=2,
                )
            convert(network, **self.convert_options)
        strategy: Any = trainer.strategy
        if getattr(strategy, "_layer_sync", None) is None:
            return
        strategy._layer_sync = _SyncOfStockLayers()  # the trainer's would replace Kalman layers too
        if dist.is_initialized():
            self._synchronized = [
                layer for layer in pl_module.modules()
                if isinstance(layer, KalmanNorm) and layer.process_group is None and layer.stats_batch_size is None
            ]  # fmt: skip
            for layer in self._synchronized:
                layer.process_group = dist.group.WORLD

    def _check_averaging(self, trainer: lightning.Trainer) -> None:
        if self.freeze_from < 1 and any(_is_a("StochasticWeightAveraging", each) for each in _callbacks(trainer)):
            raise ValueError(
                f"KalmanNormCallback got freeze_from={self.freeze_from} with StochasticWeightAveraging, which resets "
                "the statistics that frozen layers keep, expected one of them, or WeightAveraging"
            )
        at_end = self.recalibrate is not None and self.freeze_from == 1
        if at_end and any(_is_a("WeightAveraging", each) for each in _callbacks(trainer)):
            raise ValueError(
                f"KalmanNormCallback got recalibrate={self.recalibrate} with WeightAveraging, which sets the weights "
                "after it, expected one of them: call kalmannorm.recalibrate(network, loader) after fit"
            )

    def _check_order(self, trainer: lightning.Trainer, stage: str) -> None:
        for callback in takewhile(lambda each: each is not self, _callbacks(trainer)):
            if stage == "fit" and any(_is_a(name, callback) for name in _AVERAGING):
                raise ValueError(
                    f"KalmanNormCallback got {type(callback).__name__} before it in Trainer(callbacks=[...]), which "
                    "has copied the network already, expected KalmanNormCallback first"
                )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: Any) -> None:
        """Undo the sharing, as the trainer does BatchNorm's, and switch back."""
        self._switched.close()
        for layer in self._synchronized:
            layer.process_group = None
        self._synchronized = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the steps to come."""
        if not self._counts_steps:
            return
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                f"KalmanNormCallback got anneal={self.anneal}, freeze_from={self.freeze_from} and a training of "
                f"{steps} steps, expected a Trainer with max_epochs or max_steps"
            )
        wrapped = trainer.model
        waits = isinstance(wrapped, DistributedDataParallel) and not wrapped.find_unused_parameters
        if self.freeze_from < 1 and waits:
            raise ValueError(
                f"KalmanNormCallback got freeze_from={self.freeze_from} with DistributedDataParallel, which waits for "
                "a gradient of each parameter, expected Trainer(strategy='ddp_find_unused_parameters_true')"
            )
        self._froze = False
        # `max_steps` counts those of all optimizers.
        each = 1 if steps != trainer.max_steps else len(trainer.optimizers)
        self._steps = math.ceil(steps / each)
        self._freeze_at = math.ceil(self.freeze_from * self._steps) if self.freeze_from < 1 else math.inf
        self._latest.clear()
        if trainer.global_step == 0:  # another training than the last one
            self._annealed, self._annealed_at = 0, None
        elif self._annealed_at is None:  # a checkpoint without a state of this callback
            self._annealed = trainer.global_step // each

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any,
                             batch_idx: int) -> None:  # fmt: skip
        """Anneal gains by a step's share, and freeze. The trainer counts the steps of all optimizers; those of a batch
        are one.
        """
        if self.recalibrate is not None and trainer.global_step == 0 and batch_idx == 0:
            self._try_to_recalibrate(trainer, pl_module, batch)
        if not self._counts_steps:
            return
        if self.recalibrate is not None and 0 <= self._freeze_at - self._annealed < self.recalibrate:
            self._latest.append(batch)
        if trainer.global_step == self._annealed_at:
            return
        if not self._froze and self._annealed >= self._freeze_at:
            if self._annealed == self._freeze_at:  # not when a training goes on
                self._recalibrate(trainer, pl_module, self._latest)
            freeze(pl_module)
            self._froze = True
            self._latest.clear()
        share = annealing(self._annealed, self._steps, self.anneal, self.anneal_from)
        if share != 1:
            anneal(pl_module, share)
        self._annealed, self._annealed_at = self._annealed + 1, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """How many steps were counted, and the trainer's number of the last."""
        return {"annealed": self._annealed, "annealed_at": self._annealed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._annealed, self._annealed_at = state_dict["annealed"], state_dict["annealed_at"]

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule,
                           outputs: Tensor | Mapping[str, Any] | None, batch: Any, batch_idx: int) -> None:  # fmt: skip
        """Check the loss when the trainer logs, as each check waits for the device."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.stop_at_nonfinite and every and trainer.global_step % every == 0:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
                raise FloatingPointError(f"loss {loss.item()} after step {trainer.global_step}: {_cause(pl_module)}")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the mean gain."""
        if self.log_gains:
            gains = [float(torch.as_tensor(layer.kalman_gain(1)).detach()) for _, layer in kalman_layers(pl_module)]
            pl_module.log("kalman_gain", sum(gains) / len(gains))

    def _try_to_recalibrate(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any) -> None:
        """Call the network as after the training, where an error would come too late."""
        network = network_of(pl_module, lambda layer: isinstance(layer, KalmanNorm))
        with trainer.precision_plugin.forward_context(), random_state_kept(network), in_eval(network):
            try:
                (self.forward or call_with)(network, batch)
            except Exception as error:  # the network's own code may raise anything
                raise ValueError(
                    f"KalmanNormCallback got recalibrate={self.recalibrate}, but {type(network).__name__} cannot be "
                    f"called with a training batch ({type(error).__name__}: {error}), expected forward=, which makes "
                    "the call"
                ) from error

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Recalibrate layers that are not frozen."""
        self._latest.clear()
        self._recalibrate(trainer, pl_module)

    def _recalibrate(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule,
                     batches: Iterable[Any] | None = None) -> None:  # fmt: skip
        network = network_of(pl_module, lambda layer: isinstance(layer, KalmanNorm))
        if self.recalibrate is not None and tracking_layers(network):
            recalibrate_by_training_batches(network, trainer, self.recalibrate, self.forward, batches)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Switch to online statistics."""
        if self.online:
            self._switched.enter_context(online_statistics(pl_module))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Switch back."""
        self._switched.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
    on_exception = teardown  # type: ignore[assignment]


def recalibrate_by_training_batches(
    network: nn.Module, trainer: lightning.Trainer, max_batches: int, forward: Forward | None = None,
    batches: Iterable[Any] | None = None,
) -> None:  # fmt: skip
    """As `kalmannorm.recalibrate`, by training batches of all processes of a trainer: those given, or new ones."""
    if batches is None:
        together = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # as in training
        batches = (trainer.strategy.batch_to_device(batch) for batch, *_ in together)
    with trainer.precision_plugin.forward_context():
        recalibrate(network, batches, forward=forward, max_batches=max_batches, progress=False,
                    process_group=dist.group.WORLD)  # fmt: skip


def _callbacks(trainer: lightning.Trainer) -> list[lightning.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _is_a(name: str, callback: lightning.Callback) -> bool:
    """Whether a callback is of a class, by name, as not each release of Lightning has it."""
    return any(kind.__name__ == name for kind in type(callback).__mro__)


def _cause(pl_module: lightning.LightningModule) -> str:
    try:
        name = first_nonfinite(pl_module)
    except ValueError:  # GroupKalmanNorm does not count
        return "look at the network's input first"
    if name is None:
        return "the Kalman layers' statistics were finite so far, so look behind them"
    return f"statistics were not finite first in layer {name!r}"


def network_of(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> nn.Module:
    """The one child of a LightningModule that contains such layers, as training steps call the child; or the module
    itself, if several children do.
    """
    parts = [part for part in module.children() if any(wanted(layer) for layer in part.modules())]
    return parts[0] if len(parts) == 1 and not wanted(parts[0]) else module


def check_shares(who: str, factor: float, start: float, freeze_from: float) -> None:
    """Check the arguments of `annealing`, and when to freeze; the error begins with ``who``."""
    if not 0 < factor < math.inf:
        raise ValueError(f"{who}anneal must be above 0; got {factor}")
    if not 0 <= start < 1:
        raise ValueError(f"{who}anneal_from must be a share of the training, 0 up to below 1; got {start}")
    if not 0 < freeze_from <= 1:
        raise ValueError(f"{who}freeze_from must be a share of the training, above 0 up to 1; got {freeze_from}")


def annealing(step: int, steps: int, factor: float, start: float = 0.0) -> float:
    """The factor of `kalmannorm.anneal` at a step of a training, counted from 0. The product over all steps is
    ``factor``; a share ``start`` of the steps goes before the first factor other than 1.
    """
    first = min(math.ceil(start * steps), steps - 1)
    return 1.0 if step < first else float(factor ** (1 / (steps - first)))
