"""Splits in memory: apart from one another, the same for the same seed, and those that results were measured on."""

from functools import partial

import pytest
import torch
from image_files import write_parquet

from kalmannorm.lab.data.classification import ClassificationData
from kalmannorm.lab.data.digits import cluttered_digits
from kalmannorm.lab.data.signals import ClutterData, SignalData
from kalmannorm.lab.data.volumes import VolumeData, generate_volumes

DIGITS, VOLUMES = partial(cluttered_digits, count=100), partial(generate_volumes, count=4, size=16)


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


@pytest.mark.parametrize(
    ("generate", "split", "seed", "moments", "counts"),
    [
        (DIGITS, "train", 0, [-0.38742, 0.45833, -0.38653, -0.40451], [5, 11, 10, 7, 7, 15, 14, 6, 16, 9]),
        (DIGITS, "validation", 0, [-0.43612, 0.45122, -0.43972, -0.43517], [6, 12, 9, 11, 10, 10, 14, 11, 10, 7]),
        (DIGITS, "test", 0, [-0.41828, 0.45646, -0.41826, -0.41768], [7, 7, 9, 11, 13, 10, 15, 6, 7, 15]),
        (DIGITS, "train", 1, [-0.39573, 0.45022, -0.39913, -0.38053], [14, 14, 7, 8, 17, 10, 8, 5, 8, 9]),
        (VOLUMES, "train", 0, [0.69372, 0.67618, 0.68664, 0.65338], [15314, 650, 420]),
        (VOLUMES, "validation", 0, [1.10486, 0.88578, 1.09629, 1.10881], [15245, 668, 471]),
        (VOLUMES, "test", 0, [-0.00679, 0.98981, -0.04443, -0.00854], [15208, 748, 428]),
        (VOLUMES, "train", 1, [0.71337, 0.93325, 0.68744, 0.70137], [15304, 668, 412]),
    ],
)
def test_what_is_generated_stays_what_it_is(generate, split, seed, moments, counts):
    """By the mean and the deviation, the means of two halves, and the images or voxels of each class."""
    inputs, labels = generate(split, seed=seed)
    assert inputs.shape == ((100, 1, 32, 32) if generate is DIGITS else (4, 1, 16, 16, 16))
    assert inputs.dtype == torch.float32
    half = inputs.shape[-1] // 2
    found = [inputs.mean(), inputs.std(), inputs[:, :, :half].mean(), inputs[..., :half].mean()]
    assert torch.stack(found).tolist() == pytest.approx(moments, abs=1e-4 if generate is DIGITS else 1e-3)
    # A voxel at the edge of an object may fall on either side by rounding.
    assert labels.flatten().bincount().tolist() == pytest.approx(counts, abs=0 if generate is DIGITS else 3)
