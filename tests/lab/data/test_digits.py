"""Cluttered digits: apart between splits; `test_splits` has what they are."""

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
