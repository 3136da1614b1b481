"""Training and scoring Mask R-CNN with Lightning, for the paper's Table 6 (section 4.2)."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.detection import MeanAveragePrecision

from kalmannorm.correction import is_trained
from kalmannorm.inference import tracking_layers
from kalmannorm.integrations.lightning import recalibrate_by_training_batches
from kalmannorm.lab.data.objects import Target
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.optimization import Schedule, check_schedule, sgd
from kalmannorm.lab.pretrained import resnet, started
from kalmannorm.lab.scoring import online

Batch = tuple[list[Tensor], list[Target]]

# Names of the scores, here and in torchmetrics.
SCORES = {"box_ap": "bbox_map", "mask_ap": "segm_map", "box_ap50": "bbox_map_50", "mask_ap50": "segm_map_50"}


def example() -> Batch:
    """An image with one object; tracing it through a detector finds the filters below its norms."""
    box, mask = torch.tensor([[16.0, 16.0, 48.0, 48.0]]), torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 16:48, 16:48] = 1
    return [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))], [
        {"boxes": box, "labels": torch.tensor([1]), "masks": mask}
    ]


class Detector(lightning.LightningModule):
    """Trains a Mask R-CNN on the sum of its five losses, by SGD with momentum.

    Logs ``loss`` and its parts (``loss_classifier``, ``loss_box_reg``, ``loss_mask``,
    ``loss_objectness``, ``loss_rpn_box_reg``) in training, and in validation COCO's average
    precision, 0 to 1: ``box_ap`` and ``mask_ap``, the mean over overlaps from 0.50 to 0.95, and
    ``box_ap50`` and ``mask_ap50``, at an overlap of 0.50; by plain ``eval()``, and with
    ``score_online`` again as ``box_ap_online`` and so on.

    Args:
        network: From `kalmannorm.lab.models.detection`, or a torchvision detector with masks built
            on a ResNet; with BatchNorm.
        normalization: See `kalmannorm.lab.training.Classifier`, also for the arguments not listed here.
        weights: State dict of a trained ResNet, or a run's ``last.ckpt``; its classifier is not loaded.
        scratch: Allow ``normalization="frozen"`` in an untrained network, where it does not normalize.
        milestones: See `kalmannorm.lab.optimization.sgd`. ``{0: 0.33, 0.002: 1}`` warms up.
        score_online: Score by online statistics too: those of each batch of images, and in the heads
            those of its boxes. See `kalmannorm.online_statistics`; a network without running
            statistics scores the same.
        recalibrate: When training ends, replace running statistics by those of this many training
            batches, see `kalmannorm.recalibrate`. None keeps the running averages, as validations
            and checkpoints during training do.

    Raises:
        FloatingPointError: In training, for a loss that is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: str = "bn",
        *,
        normalization_options: dict[str, Any] | None = None,
        weights: str | None = None,
        scratch: bool = False,
        rate: float = 0.01,
        steps: int = 1000,
        schedule: Schedule = "cosine",
        milestones: dict[float, float] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        score_online: bool = False,
        recalibrate: int | None = None,
    ) -> None:
        super().__init__()
        check_schedule(rate, steps, schedule, milestones)
        trained = any(is_trained(layer.running_mean, layer.running_var) for layer in network.modules()
                      if isinstance(layer, _BatchNorm))  # fmt: skip
        if normalization == "frozen" and weights is None and not trained and not scratch:
            raise ValueError(
                "normalization='frozen' keeps the statistics of a trained network: give weights=FILE, or scratch=True "
                "to train without; got neither"
            )
        if recalibrate is not None and recalibrate < 1:
            raise ValueError(f"recalibrate must be None or at least 1; got {recalibrate}")
        options = {"steps": steps, "inputs": example(), **(normalization_options or {})}
        normalized = partial(normalize, method=normalization, **options)
        self.network = started(network, weights, normalized, resnet)
        if recalibrate is not None and not tracking_layers(self.network):
            raise ValueError(
                f"recalibrate={recalibrate} is of running statistics, which a network with normalization="
                f"{normalization!r} does not have, or holds fixed; expected None"
            )
        self.recalibrate = recalibrate
        self._optimization = (rate, steps, schedule, milestones, momentum, weight_decay, METHODS[normalization].warmup)
        # The metric's own synchronization would hang where processes have different numbers of images.
        self.average_precision: Any = nn.ModuleDict(
            {
                way: MeanAveragePrecision(iou_type=("bbox", "segm"), sync_on_compute=False)
                for way in ("running", "online")[: 1 + score_online]
            }
        )

    def configure_optimizers(self) -> Any:
        return sgd(self.network, *self._optimization)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self.network(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            parts = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise FloatingPointError(f"the loss at step {self.global_step} is {loss.item()} ({parts})")
        self.log_dict({"loss": loss.detach(), **{name: part.detach() for name, part in losses.items()}})
        return loss

    def on_fit_end(self) -> None:
        """Recalibrate, also if a resumed run had no steps left."""
        if self.recalibrate is not None:
            recalibrate_by_training_batches(self.network, self.trainer, self.recalibrate)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        expected = [{key: each[key].cpu() for key in ("boxes", "labels", "masks", "iscrowd")} for each in targets]
        for way, metric in self.average_precision.items():
            with online(self.network) if way == "online" else nullcontext():
                found = [
                    {key: each[key].cpu() for key in ("boxes", "labels", "scores")}
                    | {"masks": (each["masks"][:, 0] > 0.5).to("cpu", torch.uint8)}
                    for each in self.network(images)
                ]
            metric.update(found, expected)

    def on_validation_epoch_end(self) -> None:
        """Log the average precisions over the images of all processes."""
        for way, metric in self.average_precision.items():
            if dist.is_initialized() and dist.get_world_size() > 1:
                parts: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(parts, metric.metric_state)
                for name in metric.metric_state:
                    setattr(metric, name, [each for part in parts for each in part[name]])
            values = metric.compute()
            suffix = "_online" if way == "online" else ""
            self.log_dict({f"{ours}{suffix}": values[theirs] for ours, theirs in SCORES.items()})
            metric.reset()
