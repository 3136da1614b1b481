"""Cluttered digits: a small, hard image task made from scikit-learn's digits.

The 1797 8x8 digits themselves are too easy: any network exceeds 97 %. Here each digit has a random size and place on
a 32x32 canvas among fragments of other digits, and each image has its own brightness, contrast and noise. Such images
make the statistics of a mini-batch of two unreliable.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Split = Literal["train", "validation", "test"]

# Number of the 1797 originals in each split. No original is in two splits, not even as clutter.
SOURCES: dict[Split, int] = {"train": 1000, "validation": 300, "test": 497}


@dataclass(frozen=True)
class Clutter:
    """The difficulty of the task. Lengths are in pixels of the canvas, intensities from 0 to 1.

    Attributes:
        digit_size: Smallest and largest side of the labelled digit's box.
        fragments: Number of fragments of other digits in each image.
        fragment_size: Smallest and largest side of the box of a fragment's whole digit.
        fragment_side: Side of a fragment's square window, in pixels of the original digit.
        contrast: Smallest and largest contrast of an image, log-uniform.
        noise: Standard deviation of the noise added to each pixel, before contrast is applied.
    """

    canvas: int = 32
    digit_size: tuple[float, float] = (16.0, 26.0)
    fragments: int = 3
    fragment_size: tuple[float, float] = (10.0, 16.0)
    fragment_side: int = 4
    contrast: tuple[float, float] = (0.4, 1.0)
    noise: float = 0.05


@cache
def _originals() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import, and only needed here)

    digits = load_digits()
    return torch.from_numpy(digits.images).float().div(16)[:, None], torch.from_numpy(digits.target).long()


def source_indices(split: Split, seed: int = 0) -> np.ndarray:
    """Indices ``(SOURCES[split],)`` of a split's digits in scikit-learn's set; the seed decides the disjoint splits."""
    if split not in SOURCES:
        raise ValueError(f"split must be one of {', '.join(SOURCES)}; got {split!r}")
    *ends, total = np.cumsum(list(SOURCES.values()))
    dealt = np.split(np.random.default_rng(seed).permutation(total), ends)
    return dealt[list(SOURCES).index(split)]


def _place(patches: Tensor, size: np.ndarray, centre: np.ndarray, canvas: int) -> Tensor:
    """Draw ``(N, 1, 8, 8)`` patches ``size`` (N,) pixels wide around ``centre`` (N, 2): ``(N, 1, H, W)``."""
    zoom = torch.from_numpy(canvas / size).float()
    shift = torch.from_numpy(1 - 2 * centre / canvas).float() * zoom[:, None]
    affine = torch.zeros(len(patches), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, [len(patches), 1, canvas, canvas], align_corners=False)
    return F.grid_sample(patches, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def cluttered_digits(split: Split, count: int, seed: int = 0, clutter: Clutter | None = None) -> tuple[Tensor, Tensor]:
    """Make labelled images; the same arguments give the same images.

    Images are ``(count, 1, canvas, canvas)``, float32, from -1 to 1 without the noise, and labels
    ``(count,)``, int64, 0 to 9. The seed decides the split of the originals and the composition of
    each image.

    Example:
        >>> images, labels = cluttered_digits("train", 4)
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 32, 32]), torch.Size([4]))
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    how = clutter or Clutter()
    own = source_indices(split, seed)
    rng = np.random.default_rng([seed, list(SOURCES).index(split)])
    digits, targets = _originals()

    chosen = rng.choice(own, count)
    size = rng.uniform(*how.digit_size, count)
    centre = rng.uniform(size[:, None] / 2, how.canvas - size[:, None] / 2, (count, 2))
    image = _place(digits[chosen], size, centre, how.canvas)

    for _ in range(how.fragments):
        size = rng.uniform(*how.fragment_size, count)
        corner = rng.integers(0, 8 - how.fragment_side + 1, (count, 2))
        window = torch.zeros(count, 1, 8, 8)
        rows, columns = (torch.from_numpy(corner[:, i, None] + np.arange(how.fragment_side)) for i in (0, 1))
        window[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]] = 1
        # The window is centred on a random point; the digit's box may exceed the canvas.
        offset = (corner[:, ::-1] + how.fragment_side / 2 - 4) / 8 * size[:, None]
        centre = rng.uniform(0, how.canvas, (count, 2)) - offset
        image = torch.maximum(image, _place(digits[rng.choice(own, count)] * window, size, centre, how.canvas))

    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    low, high = np.log(how.contrast)
    contrast = torch.from_numpy(np.exp(rng.uniform(low, high, (count, 1, 1, 1)))).float()
    # Brightness: a random offset that keeps all pixels between -1 and 1.
    floor = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 1, 1))).float() * (1 - contrast) - contrast
    return (image + how.noise * noise) * 2 * contrast + floor, targets[torch.from_numpy(chosen)]
