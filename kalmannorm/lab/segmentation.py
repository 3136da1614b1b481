"""Training and scoring a network that gives each voxel a class, as `kalmannorm.lab.training` does an image."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.segmentation import DiceScore

from kalmannorm.lab.training import Classifier


class Segmenter(Classifier):
    """Trains a network to classify voxels on the sum of cross entropy and `soft_dice_loss`.

    That sum is the usual loss (nnU-Net, arXiv:1809.10486): by cross entropy alone a network learns
    for long to call everything background, where nearly everything is.

    Logs ``loss`` in training. Scoring gives ``dice_running`` (plain ``eval``) and ``dice_online``
    (``eval``, but each ``statistics_batch`` images normalize themselves), 0 to 1: the mean over
    images of an image's mean over the classes but the background, 0, of the Dice score. A class
    that an image neither has nor is said to have does not count.

    Args:
        network: Images or volumes ``(N, C, *)`` to logits ``(N, num_classes, *)``, built with
            BatchNorm. Labels are ``(N, *)``, int64, 0 to ``num_classes`` - 1.
        num_classes: Number of classes, with the background.
        dice_weight: Of `soft_dice_loss` in the loss, where cross entropy has 1.
        options: See `kalmannorm.lab.training.Classifier`; ``channels_last`` does not suit volumes.
    """

    score = "dice"

    def __init__(
        self,
        network: nn.Module,
        normalization: str = "bn",
        *,
        num_classes: int = 3,
        dice_weight: float = 1.0,
        **options: Any,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, the background being one; got {num_classes}")
        if not 0 <= dice_weight < math.inf:
            raise ValueError(f"dice_weight must be at least 0; got {dice_weight}")
        super().__init__(network, normalization, num_classes=num_classes, **options)
        self.dice_weight = dice_weight

    def metric(self, num_classes: int) -> Metric:
        return DiceScore(num_classes, include_background=False, average="macro", input_format="index")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) + self.dice_weight * soft_dice_loss(logits, labels)


def soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 minus the probabilities' mean Dice score over images and all classes but the first.

    Logits are ``(N, num_classes, *)`` and labels ``(N, *)``, int64, 0 being the background; the
    loss is a scalar, 0 to 1.

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
