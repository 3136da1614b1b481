"""Cluttered digits: apart between splits, and those that results were measured on."""

import numpy as np
import pytest
import torch

from kalmannorm.lab.data.digits import SOURCES, Clutter, cluttered_digits, source_indices


@pytest.mark.parametrize("seed", [0, 7])
def test_no_original_serves_two_splits(seed):
    parts = [source_indices(split, seed) for split in SOURCES]
    assert [len(part) for part in parts] == list(SOURCES.values())
    assert sorted(np.concatenate(parts)) == list(range(1797))


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


@pytest.mark.parametrize(
    ("split", "seed", "moments", "counts"),
    [
        ("train", 0, [-0.38742, 0.45833, -0.38653, -0.40451], [5, 11, 10, 7, 7, 15, 14, 6, 16, 9]),
        ("validation", 0, [-0.43612, 0.45122, -0.43972, -0.43517], [6, 12, 9, 11, 10, 10, 14, 11, 10, 7]),
        ("test", 0, [-0.41828, 0.45646, -0.41826, -0.41768], [7, 7, 9, 11, 13, 10, 15, 6, 7, 15]),
        ("train", 1, [-0.39573, 0.45022, -0.39913, -0.38053], [14, 14, 7, 8, 17, 10, 8, 5, 8, 9]),
    ],
)
def test_the_images_of_a_split_and_a_seed_stay_what_they_are(split, seed, moments, counts):
    """By the mean and the deviation, the means of the upper and of the left half, and the images of each class."""
    images, labels = cluttered_digits(split, 100, seed)
    assert images.shape == (100, 1, 32, 32)
    assert images.dtype == torch.float32
    parts = images, images[:, :, :16], images[..., :16]
    found = [parts[0].mean(), parts[0].std(), parts[1].mean(), parts[2].mean()]
    assert torch.stack(found).tolist() == pytest.approx(moments, abs=1e-4)
    assert labels.bincount().tolist() == counts
