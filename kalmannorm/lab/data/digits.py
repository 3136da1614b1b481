"""Cluttered digits: a small, hard image task made from data that ships with scikit-learn.

Its 1797 8x8 digits are too easy as they are: any network passes 97 %. Here each is drawn at a random size and
place on a 32x32 canvas among fragments of other digits, and every image has its own brightness, contrast and
noise, as photographs have. Images that differ so much make the statistics of a mini-batch of two unreliable.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Split = Literal["train", "validation", "test"]

# How many of the 1797 originals each split draws from. No original serves two splits, not even as clutter.
SOURCES: dict[Split, int] = {"train": 1000, "validation": 300, "test": 497}


@dataclass(frozen=True)
class Clutter:
    """How hard the task is. Lengths are pixels of the canvas, intensities run from 0 to 1.

    Attributes:
        digit_size: Smallest and largest side of the box that the labelled 8x8 digit is scaled to.
        fragments: How many pieces of other digits each image holds.
        fragment_size: Smallest and largest side of the box of a fragment's whole digit.
        fragment_side: Side of the square window, in pixels of the original, that a fragment shows.
        contrast: Smallest and largest contrast of an image, spread evenly on a logarithmic scale.
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
    """Which of scikit-learn's digits a split is made from, after a shuffle by the seed:
    ``(SOURCES[split],)`` indices, none in two splits.
    """
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

    Images are ``(count, 1, canvas, canvas)``, float32, between -1 and 1 but for the noise, and
    labels ``(count,)``, int64, 0 to 9. The seed decides both the split of the originals and how
    each image is composed.

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
        # The window's own centre lands on the random spot; the box around it may reach past the canvas.
        offset = (corner[:, ::-1] + how.fragment_side / 2 - 4) / 8 * size[:, None]
        centre = rng.uniform(0, how.canvas, (count, 2)) - offset
        image = torch.maximum(image, _place(digits[rng.choice(own, count)] * window, size, centre, how.canvas))

    noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
    low, high = np.log(how.contrast)
    contrast = torch.from_numpy(np.exp(rng.uniform(low, high, (count, 1, 1, 1)))).float()
    # Brightness: where the darkest and the lightest pixel may sit so that both stay between -1 and 1.
    floor = torch.from_numpy(rng.uniform(-1, 1, (count, 1, 1, 1))).float() * (1 - contrast) - contrast
    return (image + how.noise * noise) * 2 * contrast + floor, targets[torch.from_numpy(chosen)]
