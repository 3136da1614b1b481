"""Training and scoring a segmentation network, which classifies each voxel, with Lightning."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.segmentation import DiceScore

from kalmannorm.lab.training import Classifier


class Segmenter(Classifier):
    """Trains a network to classify voxels on the sum of cross entropy and `soft_dice_loss`.

    That sum is the usual loss (nnU-Net, arXiv:1809.10486): with cross entropy alone a network
    predicts background everywhere for long, since most voxels are background.

    Logs ``loss`` in training. Scoring gives ``dice_running`` (plain ``eval``) and ``dice_online``
    (``eval``, but each group of ``statistics_batch`` images is normalized by its own statistics),
    0 to 1: the Dice score, averaged over the classes but the background, 0, then over images. A class
    that is neither in an image nor predicted for it is left out.

    Args:
        network: Images or volumes ``(N, C, *)`` to logits ``(N, num_classes, *)``, built with
            BatchNorm. Labels are ``(N, *)``, int64, 0 to ``num_classes`` - 1.
        num_classes: Number of classes, the background included.
        dice_weight: Weight of `soft_dice_loss`; that of cross entropy is 1.
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
    """1 minus the mean Dice score of the probabilities, over images and all classes but the background.

    Logits are ``(N, num_classes, *)`` and labels ``(N, *)``, int64, 0 for the background; the loss
    is a scalar, 0 to 1.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> labels = torch.tensor([[0, 1, 2, 2]])
        >>> soft_dice_loss(100 * F.one_hot(labels).mT.float(), labels)
        tensor(0.)
    """
    predicted = logits.float().softmax(1)[:, 1:].flatten(2)
    target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)[:, 1:].flatten(2)
    tiny = 1e-5  # a class that is neither predicted nor in the target scores 1, not 0 / 0
    dice = (2 * (predicted * target).sum(2) + tiny) / (predicted.sum(2) + target.sum(2) + tiny)
    return 1 - dice.mean()
