"""Generated volumes to segment: ellipsoids and tubes among clutter.

As in magnetic resonance images, each volume has its own brightness, contrast, smooth bias field and noise. Objects
differ from the clutter by their shape alone: ellipsoids are class 1, tubes class 2, and sheets and small balls of the
same brightness belong to the background, class 0.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kalmannorm.lab.data.digits import Split
from kalmannorm.lab.data.memory import MemoryData, Splits

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NUM_CLASSES = 3

# The difficulty of the task. Lengths are in voxels of a volume with 24 a side, and scale with the side; counts are for
# one volume; pairs are the smallest and the largest value.
ELLIPSOIDS, HALF_AXES = 3, (2.5, 5.0)
TUBES, TUBE_RADIUS = 2, (1.2, 1.8)
SHEETS, HALF_THICKNESS = 1, 0.7
BALLS, BALL_RADIUS = 4, 1.2
TEXTURE = 0.3  # standard deviation of the tissue's smooth structure; objects are 1 brighter than tissue
BRIGHTNESS = 1.0  # standard deviation of a volume's offset
CONTRAST = (0.3, 2.0)  # log-uniform
BIAS = 0.2  # standard deviation of the logarithm of the bias field
NOISE = (0.1, 0.4)  # standard deviation of a volume's noise at contrast 1


def generate_volumes(split: Split, count: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make volumes ``(count, 1, size, size, size)``, float32, and their classes, int64, 0 to 2.

    The same arguments give the same volumes, and the first ones do not depend on ``count``. Each
    split draws its own volumes. A side has at least 8 voxels.

    Example:
        >>> volumes, classes = generate_volumes("train", 2, size=16)
        >>> volumes.shape, classes.shape
        (torch.Size([2, 1, 16, 16, 16]), torch.Size([2, 16, 16, 16]))
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if count < 1 or size < 8:
        raise ValueError(f"expected at least 1 volume of at least 8 voxels a side; got count={count}, size={size}")
    made = [_volume(np.random.default_rng([seed, SPLITS.index(split), index]), size) for index in range(count)]
    volumes, classes = zip(*made, strict=True)
    return torch.from_numpy(np.stack(volumes))[:, None], torch.from_numpy(np.stack(classes))


def _volume(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One volume ``(size, size, size)``, float32, and its classes, int64."""
    unit = size / 24
    sides = (np.arange(size) + 0.5) / unit
    place = np.stack(np.meshgrid(sides, sides, sides, indexing="ij"), -1)  # (size, size, size, 3), 0 to 24
    clutter = np.zeros((size,) * 3, dtype=bool)
    classes = np.zeros((size,) * 3, dtype=np.int64)
    for _ in range(SHEETS):
        normal = rng.standard_normal(3)
        normal /= np.linalg.norm(normal)
        clutter |= np.abs((place - rng.uniform(6, 18, 3)) @ normal) < HALF_THICKNESS
    for _ in range(BALLS):
        clutter |= np.square(place - rng.uniform(2, 22, 3)).sum(-1) < BALL_RADIUS**2
    for _ in range(ELLIPSOIDS):
        turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        off = (place - rng.uniform(5, 19, 3)) @ turn / rng.uniform(*HALF_AXES, 3)
        classes[np.square(off).sum(-1) < 1] = 1
    for _ in range(TUBES):
        classes[_tube(rng, place) < rng.uniform(*TUBE_RADIUS)] = 2
    tissue = ((classes > 0) | clutter) + TEXTURE * _smooth(rng, size, 6)
    tissue += rng.uniform(*NOISE) * rng.standard_normal(tissue.shape)
    low, high = np.log(CONTRAST)
    field = np.exp(rng.uniform(low, high) + BIAS * _smooth(rng, size, 3))
    return (tissue * field + BRIGHTNESS * rng.standard_normal()).astype(np.float32), classes


def _tube(rng: np.random.Generator, place: np.ndarray) -> np.ndarray:
    """The distance ``(size, size, size)`` of places ``(size, size, size, 3)`` from a random curve in the volume."""
    axis = rng.integers(3)
    points = rng.uniform(4, 20, (3, 3))
    points[:, axis] = -2, 12, 26
    along = np.linspace(0, 1, 48)[:, None]
    line = (1 - along) ** 2 * points[0] + 2 * along * (1 - along) * points[1] + along**2 * points[2]
    # |p - q|^2 as |p|^2 - 2 p q + |q|^2, without an array of all differences.
    squares = np.square(place).sum(-1)[..., None] - 2 * place @ line.T + np.square(line).sum(-1)
    return np.asarray(np.sqrt(squares.min(-1).clip(0)))


def _smooth(rng: np.random.Generator, size: int, knots: int) -> np.ndarray:
    """A smooth random field ``(size, size, size)`` of standard deviation 1, from ``knots`` random values a side."""
    drawn = torch.from_numpy(rng.standard_normal((1, 1, knots, knots, knots)))
    field = F.interpolate(drawn, size=(size,) * 3, mode="trilinear", align_corners=True)[0, 0].numpy()
    return np.asarray((field - field.mean()) / field.std())


class VolumeData(MemoryData):
    """`generate_volumes` in memory, scaled by the training volumes' mean and standard deviation.

    With ``standardize`` each volume is first scaled by its own, as is usual for scans without units
    (nnU-Net, arXiv:1809.10486; MONAI's ``NormalizeIntensity``). Otherwise each volume keeps its
    brightness and contrast.

    ``train``, ``validation`` and ``test`` are numbers of volumes of ``size`` voxels a side.
    ``data_seed`` is not ``seed``, so that all runs have the same volumes. For the other arguments
    see `MemoryData`.

    Example:
        >>> data = VolumeData(train=4, validation=2, test=2, size=16)
        >>> data.setup()
        >>> next(iter(data.train_dataloader()))[1].shape
        torch.Size([1, 16, 16, 16])
    """

    num_classes = NUM_CLASSES

    def __init__(
        self,
        gradient_batch: int = 1,
        *,
        score_batch: int = 8,
        train: int = 100,
        validation: int = 16,
        test: int = 50,
        size: int = 24,
        standardize: bool = False,
        data_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(gradient_batch, score_batch=score_batch, **options)
        self.counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self.size, self.standardize, self.data_seed = size, standardize, data_seed

    def load(self) -> Splits:
        made = [generate_volumes(split, count, self.size, self.data_seed) for split, count in self.counts.items()]
        if self.standardize:
            made = [(_standardized(volumes), classes) for volumes, classes in made]
        return Splits(*made)


def _standardized(volumes: Tensor) -> Tensor:
    """Volumes ``(N, 1, D, H, W)``, each scaled to mean 0 and standard deviation 1."""
    var, mean = torch.var_mean(volumes, (1, 2, 3, 4), correction=0, keepdim=True)
    return (volumes - mean) / var.sqrt()
