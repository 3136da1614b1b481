"""Generated image sets: read by the code that reads the real ones, and possible to learn."""

import numpy as np
import pytest
import torch

from kalmannorm.lab.data.folders import FolderData
from kalmannorm.lab.data.generated import generate_folders, generate_images, pictures
from kalmannorm.lab.data.images import load_images


@pytest.mark.parametrize(
    ("name", "classes", "trained"),
    [("cifar10", 10, 30), ("cifar100", 100, 30), ("svhn", 10, 30), ("svhn_extra", 10, 60)],
)
def test_a_set_is_read_as_the_real_one(root, asked_of_the_hub, name, classes, trained):
    generate_images(root, name, train=30, test=20)
    splits = load_images(name, validation=5)
    assert [len(labels) for _, labels in splits] == [trained - 5, 5, 20]
    assert splits.test[0].shape == (20, 3, 32, 32)
    assert splits.test[1].tolist() == [number % classes for number in range(20)]
    assert not asked_of_the_hub


def test_what_is_there_is_left_as_it_is(root):
    folder = generate_images(root, "cifar10", train=30, test=20)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(before) == 2
    generate_images(root, "cifar10", train=40, test=20)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_folders_are_read_as_imagenet(root):
    generate_folders(root, "imagenet", classes=3, train=4, val=2)
    data = FolderData("imagenet", 4, size=32, workers=0)
    data.setup()
    # A training image of each class validates, which is more than a tenth, and `val` is for the test.
    parts = (data.train_set, data.validation_set, data.test_set)
    assert (data.num_classes, *map(len, parts)) == (3, 9, 3, 6)
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (6, 3, 32, 32)


def test_classes_are_told_apart_across_seeds():
    """The nearest mean of the training images names the class of nearly all others."""
    (train, labels), (test, expected) = (pictures(100, 32, 10, seed) for seed in (0, 1))
    assert not np.array_equal(train, test)
    means = np.stack([train[labels == label].mean(0) for label in range(10)])
    distances = torch.cdist(torch.tensor(test.reshape(100, -1) * 1.0), torch.tensor(means.reshape(10, -1)))
    assert (distances.argmin(1).numpy() == expected).mean() > 0.95
