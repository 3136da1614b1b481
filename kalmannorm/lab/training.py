"""Training and scoring an image classifier with Lightning, alike for all normalizations."""

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import kalmannorm
from kalmannorm.convert import with_stock_norms
from kalmannorm.freezing import unfrozen_layers
from kalmannorm.integrations.lightning import annealing, check_shares
from kalmannorm.lab.baselines.renorm import BatchRenorm
from kalmannorm.lab.baselines.replacing import count_in_steps
from kalmannorm.lab.baselines.weight_norm import initialize
from kalmannorm.lab.data.batches import images_a_process
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.optimization import Schedule, check_schedule, sgd
from kalmannorm.lab.pretrained import started
from kalmannorm.lab.scoring import online_logits
from kalmannorm.modules import is_stock_batchnorm

Batch = tuple[Tensor, Tensor]
# Warnings that do not apply to our runs.
UNWANTED = (
    ".*does not have many workers.*",  # the data are tensors in memory, which need no workers
    ".*have no `val_dataloader`.*",  # scored once, after training
    ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning 2.6 calling torch's old name
)


class Classifier(lightning.LightningModule):
    """Trains a network on cross entropy by SGD with momentum.

    Logs ``loss`` in training. Scoring gives both of the paper's options in one pass over the
    images: ``accuracy_running`` (A: plain ``eval``) and ``accuracy_online`` (B: ``eval``, but each
    group of ``statistics_batch`` images is normalized by its own statistics), 0 to 1.

    Args:
        network: Images ``(N, C, H, W)`` to logits ``(N, num_classes)``, built with BatchNorm.
        normalization: The replacement of BatchNorm, a key of `kalmannorm.lab.methods.METHODS`.
            ``"bn"`` keeps the network's own layers.
        normalization_options: See `kalmannorm.lab.methods.normalize`.
        weights: File to start from: a state dict, or the ``last.ckpt`` of one of our runs. The last
            linear layer keeps its initial values. Weights of a network with BatchNorm are loaded
            before the conversion, weights of a converted network after it.
        num_classes: Number of classes.
        statistics_batch: Images that are normalized together, by methods with batch statistics.
            None for all images that a process takes at a time.
        rate: Learning rate, before the schedule's factor; for the next arguments see
            `kalmannorm.lab.optimization.sgd`.
        score_online: Score ``accuracy_online`` too.
        compile: Train through ``torch.compile``.
        channels_last: Keep weights and images ``(N, C, H, W)`` in channels-last memory, which is
            faster for half-precision convolutions on GPUs; results differ by rounding.
        anneal: Factor on the priors' weight by the end of training, see `kalmannorm.anneal`; 1 does
            not anneal.
        anneal_from: The share of the steps after which annealing begins.
        freeze_from: The share of the steps after which BatchNorm and Kalman layers are frozen, see
            `kalmannorm.freeze`. 1 never freezes.
        capture: Replay forward and backward passes as CUDA graphs, see `kalmannorm.capture`: the
            same numbers, faster for small networks. Methods that are not capturable ignore it.

    Attributes:
        score: Prefix of the scores' names. Subclasses for other tasks override it, `metric` and `loss`.
    """

    score = "accuracy"

    def __init__(
        self,
        network: nn.Module,
        normalization: str = "bn",
        *,
        normalization_options: dict[str, Any] | None = None,
        weights: str | None = None,
        num_classes: int = 10,
        statistics_batch: int | None = None,
        rate: float = 0.1,
        steps: int = 1000,
        schedule: Schedule = "cosine",
        milestones: dict[float, float] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        score_online: bool = True,
        compile: bool = False,
        channels_last: bool = False,
        anneal: float = 1.0,
        anneal_from: float = 0.0,
        freeze_from: float = 1.0,
        capture: bool = False,
    ) -> None:
        super().__init__()
        check_schedule(rate, steps, schedule, milestones)
        check_shares("", anneal, anneal_from, freeze_from)
        options = {"statistics_batch": statistics_batch, "steps": steps, **(normalization_options or {})}
        stock = any(map(is_stock_batchnorm, network.modules()))
        self._was_batchnorm = normalization == "bn" and stock and statistics_batch is not None
        self.network = started(network, weights, partial(normalize, method=normalization, **options))
        self._memory_format = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.method, self.statistics_batch, self._passes = METHODS[normalization], statistics_batch, 1
        self._optimization = (rate, steps, schedule, milestones, momentum, weight_decay, self.method.warmup)
        self.score_online = score_online
        self._anneal = partial(annealing, steps=steps, factor=anneal, start=anneal_from)
        self._freeze_at = math.ceil(freeze_from * steps) if freeze_from < 1 else math.inf
        if freeze_from < 1 and not unfrozen_layers(self.network):
            raise ValueError(
                f"freeze_from={freeze_from} needs BatchNorm or Kalman layers; got normalization={normalization!r}"
            )
        # A compiled network would be a second submodule, so a function is compiled.
        self._forward: Callable[[Tensor], Tensor] = torch.compile(self._plain) if compile else self._plain
        if capture and self.method.capturable:
            kalmannorm.capture(self.network)
        self.running_metric, self.online_metric = self.metric(num_classes), self.metric(num_classes)

    def metric(self, num_classes: int) -> Metric:
        return MulticlassAccuracy(num_classes, average="micro")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def _plain(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return sgd(self.network, *self._optimization)

    def setup(self, stage: str) -> None:
        """Before training: check the statistics batch, and give weight normalization its first batch."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or data is None:
            return
        if hasattr(data, "gradient_batch"):
            self._check_statistics_batch(images_a_process(data.gradient_batch, self.trainer))
        if any(name.endswith("awaits_data") for name, _ in self.network.named_buffers()):
            # In each process, before DDP wraps the network and broadcasts the first process's parameters.
            initialize(self.network, next(iter(data.train_dataloader()))[0].to(self.device))

    def _check_statistics_batch(self, images: int) -> None:
        size = self.statistics_batch
        if size is not None and self.method.statistics != "sample" and images % size:
            raise ValueError(
                f"statistics_batch must divide the {images} images that a process takes at a time; got {size}"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step >= self._freeze_at:
            kalmannorm.freeze(self.network)
            self._freeze_at = math.inf

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.loss(self.training_logits(images), labels)
        self.log("loss", loss.detach())
        return loss

    def training_logits(self, images: Tensor) -> Tensor:
        """Logits of a batch, normalized in statistics batches."""
        images = images.to(memory_format=self._memory_format)
        self._check_statistics_batch(len(images))
        if self._was_batchnorm and len(images) == self.statistics_batch:
            with_stock_norms(self.network)  # torch's own layers are faster for a single group
            self._was_batchnorm = False
        whole = self.method.statistics != "batch" or self.statistics_batch is None
        parts = (images,) if whole else images.split(self.statistics_batch)
        if len(parts) > self._passes:  # the last batch of an epoch may have fewer parts
            self._passes = len(parts)
            count_in_steps(self.network, self._passes)
        return torch.cat([self._forward(part) for part in parts])

    def on_after_backward(self) -> None:
        """Average the running statistics over processes, so that they are those of all images."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Batch Renorm averages standard deviations, and stores variances.
            renorm: list[Any] = [layer for layer in self.network.modules() if isinstance(layer, BatchRenorm)]
            for layer in renorm:
                layer.running_var.add_(layer.eps).sqrt_()
            buffers = [buffer for buffer in self.network.buffers() if buffer.is_floating_point()]
            if buffers:
                together = torch.cat([buffer.flatten() for buffer in buffers])
                dist.all_reduce(together)
                for buffer, mean in zip(buffers, together.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(mean.view_as(buffer) / dist.get_world_size())
            for layer in renorm:
                layer.running_var.square_().sub_(layer.eps).clamp_min_(0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (share := self._anneal(self.global_step)) != 1:
            kalmannorm.anneal(self.network, share)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch[0].to(memory_format=self._memory_format), batch[1]
        self.running_metric.update(self.network(images).argmax(1), labels)
        self.log(f"{self.score}_running", self.running_metric)
        if self.score_online:
            logits = online_logits(self.network, images, self.statistics_batch or len(images))
            self.online_metric.update(logits.argmax(1), labels)
            self.log(f"{self.score}_online", self.online_metric)

    test_step = validation_step


def quiet() -> None:
    """Silence the messages that Lightning prints for every run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message)
