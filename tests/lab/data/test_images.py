"""Sets of small images: read from the root first, exactly, and split without overlap."""

import numpy as np
import pytest
import torch
from image_files import numbered_images, write_parquet

from kalmannorm.lab.data.images import load_images
from kalmannorm.lab.data.roots import MissingDataError


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_files_under_the_root_are_read_exactly_and_the_hub_is_not_asked(root, asked_of_the_hub, name):
    write_parquet(root, name, {"train": 30, "test": 10})
    splits = load_images(name, validation=0)
    expected = torch.from_numpy(np.moveaxis(numbered_images(30, 0), 3, 1))
    assert splits.train[0].dtype == torch.uint8
    assert torch.equal(splits.train[0], expected)
    assert splits.train[1].tolist() == [number % 10 for number in range(30)]
    assert splits.validation[0].shape == (0, 3, 32, 32)
    assert numbers(splits.test[0]) == list(range(30, 40))
    assert asked_of_the_hub == []


def test_svhns_extra_images_are_trained_on_where_asked_for(root):
    write_parquet(root, "svhn", {"train": 6, "extra": 5, "test": 4})
    assert numbers(load_images("svhn", validation=0).train[0]) == list(range(6))
    assert numbers(load_images("svhn_extra", validation=0).train[0]) == list(range(11))


def test_some_classes_are_kept_and_numbered_anew_and_then_counted(root):
    write_parquet(root, "cifar10", {"train": 50, "test": 20})
    splits = load_images("cifar10", validation=5, classes=[7, 2])
    train, validation, test = (numbers(images) for images, _ in splits)
    assert len(validation) == 5
    assert sorted(train + validation) == [number for number in range(50) if number % 10 in (2, 7)]
    assert test == [52, 57, 62, 67]
    for images, labels in splits:
        assert labels.tolist() == [{7: 0, 2: 1}[number % 10] for number in numbers(images)]
    few = load_images("cifar10", validation=5, classes=[7, 2], limit=3)  # the first of each split
    assert [numbers(images) for images, _ in few] == [train[:3], validation[:3], test[:3]]


def test_a_part_of_a_set_is_not_mended_by_a_download(root, asked_of_the_hub):
    write_parquet(root, "cifar10", {"train": 3})
    with pytest.raises(MissingDataError, match="cifar10"):
        load_images("cifar10", validation=0)
    assert asked_of_the_hub == []


def test_files_with_other_columns_are_named(root):
    write_parquet(root, "svhn", {"train": 3, "test": 3})
    (root / "svhn").rename(root / "cifar10")
    with pytest.raises(ValueError, match="img and label; got image, label"):
        load_images("cifar10", validation=0)
