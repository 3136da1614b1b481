"""Cluttered digits: the same from the same seed, apart between splits, and as hard as they are said to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kalmannorm.lab.data.digits import SOURCES, Clutter, cluttered_digits, source_indices


@pytest.mark.parametrize("seed", [0, 7])
def test_no_original_serves_two_splits(seed):
    parts = [source_indices(split, seed) for split in SOURCES]
    assert [len(part) for part in parts] == list(SOURCES.values())
    assert sorted(np.concatenate(parts)) == list(range(1797))


def test_another_seed_deals_other_originals():
    assert set(source_indices("train", 0)) != set(source_indices("train", 1))


def test_images_are_made_of_their_own_splits_originals_alone(monkeypatch):
    """Blank one split's originals: its images lose all ink, those of the other splits don't change."""
    from kalmannorm.lab.data import digits

    images, targets = digits._originals()
    before = {split: cluttered_digits(split, 50, 3)[0] for split in SOURCES}
    blanked = images.clone()
    blanked[torch.from_numpy(source_indices("validation", 3))] = 0
    monkeypatch.setattr(digits, "_originals", lambda: (blanked, targets))
    after = {split: cluttered_digits(split, 50, 3, Clutter(noise=0.05))[0] for split in SOURCES}
    assert torch.equal(before["train"], after["train"])
    assert torch.equal(before["test"], after["test"])
    without_noise = cluttered_digits("validation", 50, 3, Clutter(noise=0.0))[0]
    assert torch.all(without_noise.flatten(1).std(1) < 1e-6)


def test_the_same_seed_gives_the_same_images_and_another_others():
    first, again, other = (cluttered_digits("train", 20, seed) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_shapes_types_and_range():
    images, labels = cluttered_digits("test", 300, clutter=Clutter(noise=0.0))
    assert images.shape == (300, 1, 32, 32)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))
    assert images.min() >= -1 - 1e-5
    assert images.max() <= 1 + 1e-5


def test_the_labelled_digit_lies_whole_on_the_canvas():
    """Its ink grows with the area that it is scaled to, in every image: none of it falls off the edge."""
    plain = Clutter(fragments=0, contrast=(1.0, 1.0), noise=0.0)
    small, large = (
        cluttered_digits("train", 60, clutter=replace(plain, digit_size=(size, size)))[0] for size in (16.0, 24.0)
    )
    ink_small, ink_large = ((images + 1).sum((1, 2, 3)) for images in (small, large))
    assert torch.allclose(ink_large / ink_small, torch.tensor((24 / 16) ** 2), rtol=0.05)


def test_contrast_differs_between_images_and_fragments_add_ink():
    plain = Clutter(fragments=0, contrast=(1.0, 1.0), noise=0.0)
    without, _ = cluttered_digits("train", 100, clutter=plain)
    cluttered, _ = cluttered_digits("train", 100, clutter=Clutter(contrast=(1.0, 1.0), noise=0.0))
    assert cluttered.mean() > without.mean() + 0.05
    varied, _ = cluttered_digits("train", 100, clutter=Clutter(noise=0.0))
    spread = varied.flatten(1).amax(1) - varied.flatten(1).amin(1)
    assert spread.min() < 1.0
    assert spread.max() > 1.6


@pytest.mark.parametrize(("split", "count", "message"), [("exam", 4, "exam"), ("train", 0, "at least 1; got 0")])
def test_bad_requests_say_what_was_wrong(split, count, message):
    with pytest.raises(ValueError, match=message):
        cluttered_digits(split, count)
