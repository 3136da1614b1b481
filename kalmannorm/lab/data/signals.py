"""Signals, rows and the demo's images, from data sets of scikit-learn, without a download."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmannorm.lab.data.augmentation import Scaling
from kalmannorm.lab.data.digits import Split, cluttered_digits
from kalmannorm.lab.data.memory import MemoryData, Splits

# Number of inputs, number of classes, and the shape of one input.
SETS: dict[str, tuple[int, int, tuple[int, ...]]] = {"digits": (1797, 10, (1, 64)), "breast_cancer": (569, 2, (30,))}


def load_set(name: str) -> tuple[Tensor, Tensor]:
    """All inputs ``(N, *)`` of a set, float32, shaped as in `SignalData`, and labels ``(N,)``, int64."""
    from sklearn import datasets  # noqa: PLC0415  (slow to import, and only needed here)

    found = getattr(datasets, f"load_{name}")()
    return torch.from_numpy(found.data).float().unflatten(1, SETS[name][2]), torch.from_numpy(found.target).long()


class SignalData(MemoryData):
    """Signals or rows to classify, in memory, each channel scaled by the training inputs.

    ``"digits"``: 1797 scanned digits (10 classes) read row by row, as signals ``(1, 64)``.
    ``"breast_cancer"``: 569 tumours (2 classes), each a row of 30 measurements ``(30,)``.

    ``validation`` and ``test`` are numbers of held-out inputs, by default a fifth and a quarter.
    ``split_seed`` chooses them; it is not ``seed``, so that all runs have the same. For the other
    arguments see `MemoryData`.

    Example:
        >>> data = SignalData("breast_cancer", gradient_batch=2)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))[0].shape
        torch.Size([2, 30])
    """

    def __init__(
        self,
        name: str,
        gradient_batch: int = 2,
        *,
        validation: int | None = None,
        test: int | None = None,
        split_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(gradient_batch, **options)
        if name not in SETS:
            raise ValueError(f"name must be one of {', '.join(SETS)}; got {name!r}")
        count, self.num_classes, _ = SETS[name]
        self.dataset, self.split_seed = name, split_seed
        self.validation = count // 5 if validation is None else validation
        self.test = count // 4 if test is None else test
        if min(self.validation, self.test) < 1 or self.validation + self.test >= count:
            raise ValueError(
                f"validation and test must be at least 1 and leave some of the {count} inputs to train on; got "
                f"validation={self.validation} and test={self.test}"
            )

    def load(self) -> Splits:
        """The three splits, disjoint; the same for the same ``split_seed`` and sizes."""
        inputs, labels = load_set(self.dataset)
        shuffled = torch.from_numpy(np.random.default_rng(self.split_seed).permutation(len(labels)))
        # The test inputs come first, so that they do not depend on the size of the validation split.
        test, validation, train = shuffled.tensor_split([self.test, self.test + self.validation])
        return Splits(*((inputs[chosen], labels[chosen]) for chosen in (train, validation, test)))


class ClutterData(MemoryData):
    """The demo's images, unscaled, see `kalmannorm.lab.data.digits.cluttered_digits`.

    Validation and test have ``scored`` images each. ``split_seed`` decides the split of the digits
    and the composition of the images.
    """

    num_classes = 10

    def __init__(
        self, gradient_batch: int = 2, *, train: int = 8000, scored: int = 2000, split_seed: int = 0, **options: Any
    ) -> None:
        super().__init__(gradient_batch, **options)
        self.counts: dict[Split, int] = {"train": train, "validation": scored, "test": scored}
        self.split_seed = split_seed

    def load(self) -> Splits:
        return Splits(*(cluttered_digits(split, count, self.split_seed) for split, count in self.counts.items()))

    def scaling_of(self, inputs: Tensor) -> Scaling:
        """The identity: the images are already from about -1 to 1."""
        return Scaling(torch.zeros(1), torch.ones(1))
