"""Crops and flips against a plain loop; scalings against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from kalmannorm.lab.data.augmentation import (
    channel_scaling,
    crop_and_flip,
    draw_moves,
    mean_colour,
    pixel_scaling,
    standardization,
)


def images(count=6, height=8, width=10):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("colour", [None, (200, 0, 7)])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_each_image_is_cut_at_its_own_place(padding, colour):
    batch = images(20)
    moves = draw_moves(20, torch.Generator().manual_seed(1), padding=padding)
    border = None if colour is None else torch.tensor(colour, dtype=torch.uint8)
    cut = crop_and_flip(batch, moves, padding, border)
    assert cut.dtype == torch.uint8
    for image, (top, left, flip), got in zip(batch, moves.tolist(), cut, strict=True):
        channels = zip(image, colour or (0, 0, 0), strict=True)
        padded = torch.stack([F.pad(channel, [padding] * 4, value=value) for channel, value in channels])
        expected = padded[:, top : top + 8, left : left + 10]
        assert torch.equal(got, expected.flip(2) if flip else expected)


def test_draws_cover_all_places_evenly_and_flip_half():
    moves = draw_moves(9000, torch.Generator().manual_seed(0))
    for column in (0, 1):
        counts = moves[:, column].bincount()
        assert len(counts) == 9
        assert counts.min() > 850
    assert abs(moves[:, 2].float().mean() - 0.5) < 0.02
    assert draw_moves(100, torch.Generator().manual_seed(0), flip=False)[:, 2].sum() == 0


@pytest.mark.parametrize("scaling", [channel_scaling, standardization])
def test_scaling_gives_mean_0_and_deviation_1_but_to_a_channel_without_variance(scaling):
    batch = images(50)
    batch[:, 2] = 7
    scaled = scaling(batch)(batch)
    std, mean = torch.std_mean(scaled[:, :2], (0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(2), atol=1e-4)
    assert torch.allclose(std, torch.ones(2), atol=1e-4)
    assert torch.equal(scaled[:, 2], torch.zeros(50, 8, 10))


def test_mean_colour_is_the_nearest_to_the_mean():
    batch = images(50)
    assert (mean_colour(batch).float() - batch.float().mean((0, 2, 3))).abs().max() <= 0.5


def test_pixel_scaling_is_the_released_codes():
    batch = images(50)
    pixels = batch.float() / 128
    assert torch.allclose(pixel_scaling(batch)(batch), pixels - pixels.mean(0), atol=1e-5)
