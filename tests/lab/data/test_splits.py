"""Splits in memory: apart from one another, and the same for the same seed, whatever that of the order is."""

from functools import partial

import pytest
import torch
from image_files import write_parquet

from kalmannorm.lab.data.classification import ClassificationData
from kalmannorm.lab.data.signals import ClutterData, SignalData
from kalmannorm.lab.data.volumes import VolumeData


@pytest.mark.parametrize(
    ("make", "seeded_by", "counts"),
    [
        (partial(ClassificationData, "cifar10", validation=12), "split_seed", [38, 12, 10]),
        (partial(ClutterData, train=30, scored=20), "split_seed", [30, 20, 20]),
        (partial(SignalData, "digits", validation=50, test=60), "split_seed", [1687, 50, 60]),
        (partial(SignalData, "breast_cancer"), "split_seed", [314, 113, 142]),
        (partial(VolumeData, train=4, validation=2, test=3, size=16), "data_seed", [4, 2, 3]),
    ],
    ids=["cifar10", "clutter", "digits", "breast_cancer", "volumes"],
)
def test_splits_share_nothing_and_follow_from_their_seed_alone(root, make, seeded_by, counts):
    write_parquet(root, "cifar10", {"train": 50, "test": 10})
    first, again, other = (make(**{seeded_by: seed}, seed=order).load() for seed, order in ((0, 0), (0, 5), (1, 0)))
    assert [len(labels) for _, labels in first] == counts
    assert len({tuple(each.flatten().tolist()) for inputs, _ in first for each in inputs}) == sum(counts)
    for (inputs, labels), (same, of_same) in zip(first, again, strict=True):
        assert torch.equal(inputs, same)
        assert torch.equal(labels, of_same)
    assert not any(torch.equal(first[at][0], other[at][0]) for at in (0, 1))
