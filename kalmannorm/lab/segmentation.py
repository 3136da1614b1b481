"""Training and scoring a network that gives each voxel a class, as `kalmannorm.lab.training` does an image."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.segmentation import DiceScore

from kalmannorm.lab.optimization import Schedule
from kalmannorm.lab.scoring import online_logits
from kalmannorm.lab.training import Batch, Classifier

__all__ = ["Segmenter", "soft_dice_loss"]


class Segmenter(Classifier):
    """Trains a network to classify voxels, by SGD with momentum, on the sum of cross entropy and `soft_dice_loss`.

    That sum is the usual loss (nnU-Net, arXiv:1809.10486): by cross entropy alone a network learns for long to call
    everything background, where nearly everything is.

    Logs ``loss`` in training. Scoring gives ``dice_running`` (plain ``eval``) and ``dice_online`` (``eval``, but each
    ``statistics_batch`` images normalize themselves), 0 to 1: the mean over images of an image's mean over the classes
    but the background, 0, of the Dice score. A class that an image neither has nor is said to have does not count.

    Args:
        network: Images or volumes ``(N, C, *)`` to logits ``(N, num_classes, *)``, built with BatchNorm. Labels are
            ``(N, *)``, int64, 0 to ``num_classes`` - 1.
        normalization: See `kalmannorm.lab.training.Classifier`.
        normalization_options: See `kalmannorm.lab.methods.normalize`.
        num_classes: Number of classes, with the background.
        statistics_batch: See `kalmannorm.lab.training.Classifier`.
        rate: Learning rate, before the schedule's factor.
        steps: Optimizer steps the schedule is laid out for.
        schedule: See `kalmannorm.lab.optimization.sgd`.
        milestones: See `kalmannorm.lab.optimization.sgd`.
        momentum: SGD's.
        weight_decay: On weights alone, see `kalmannorm.lab.optimization.parameter_groups`.
        score_online: Give ``dice_online`` too.
        dice_weight: Of `soft_dice_loss` in the loss, where cross entropy has 1.

    Raises:
        ValueError: Fewer than two classes, or a weight that is negative; and see `kalmannorm.lab.training.Classifier`.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: str = "bn",
        *,
        normalization_options: dict[str, Any] | None = None,
        num_classes: int = 3,
        statistics_batch: int | None = None,
        rate: float = 0.1,
        steps: int = 1000,
        schedule: Schedule = "cosine",
        milestones: dict[float, float] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        score_online: bool = True,
        dice_weight: float = 1.0,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, the background being one; got {num_classes}")
        if not 0 <= dice_weight < math.inf:
            raise ValueError(f"dice_weight must be at least 0; got {dice_weight}")
        super().__init__(
            network,
            normalization,
            normalization_options=normalization_options,
            num_classes=num_classes,
            statistics_batch=statistics_batch,
            rate=rate,
            steps=steps,
            schedule=schedule,
            milestones=milestones,
            momentum=momentum,
            weight_decay=weight_decay,
            score_online=score_online,
        )
        del self.running_accuracy, self.online_accuracy
        self.running_dice, self.online_dice = _dice(num_classes), _dice(num_classes)
        self.dice_weight = dice_weight

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch: its mean cross entropy, and the soft Dice loss."""
        images, labels = batch
        logits = self.training_logits(images)
        loss = F.cross_entropy(logits, labels) + self.dice_weight * soft_dice_loss(logits, labels)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score a batch both ways."""
        images, labels = batch
        self.running_dice.update(_classes(self.network(images)), labels)
        if self.score_online:
            logits = online_logits(self.network, images, self.statistics_batch or len(images))
            self.online_dice.update(_classes(logits), labels)

    def on_validation_epoch_end(self) -> None:
        """Publish the Dice scores."""
        self.log("dice_running", self.running_dice.compute(), sync_dist=True)
        self.running_dice.reset()
        if self.score_online:
            self.log("dice_online", self.online_dice.compute(), sync_dist=True)
            self.online_dice.reset()


def soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 minus the mean, over images and the classes but the background, of the Dice score of the probabilities.

    Args:
        logits: ``(N, num_classes, *)``.
        labels: ``(N, *)``, int64; 0 is the background.

    Returns:
        A scalar, 0 to 1.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> labels = torch.tensor([[0, 1, 2, 2]])
        >>> soft_dice_loss(100 * F.one_hot(labels).mT.float(), labels)
        tensor(0.)
    """
    said = logits.float().softmax(1)[:, 1:].flatten(2)
    there = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].flatten(2)
    tiny = 1e-5  # 1 for a class that is neither there nor said to be, and not 0 / 0
    dice = (2 * (said * there).sum(2) + tiny) / (said.sum(2) + there.sum(2) + tiny)
    return 1 - dice.mean()


def _dice(num_classes: int) -> DiceScore:
    return DiceScore(num_classes, include_background=False, average="macro", input_format="index")


def _classes(logits: Tensor) -> Tensor:
    """``(N, num_classes, *)`` to the likeliest class, ``(N, *)``."""
    return logits.argmax(1)
