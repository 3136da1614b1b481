"""Generated image sets: read by the code that reads the real ones, and possible to learn."""

import numpy as np
import pytest
import torch

from kalmannorm.lab.data.generated import generate_images, generate_objects, pictures
from kalmannorm.lab.data.objects import SOURCES, DetectionData


def test_what_is_there_is_left_as_it_is(root):
    folder = generate_images(root, "cifar10", train=30, test=20)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(before) == 2
    generate_images(root, "cifar10", train=40, test=20)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_classes_are_told_apart_across_seeds():
    """The nearest mean of the training images names the class of nearly all others."""
    (train, labels), (test, expected) = (pictures(100, 32, 10, seed) for seed in (0, 1))
    assert not np.array_equal(train, test)
    means = np.stack([train[labels == label].mean(0) for label in range(10)])
    distances = torch.cdist(torch.tensor(test.reshape(100, -1) * 1.0), torch.tensor(means.reshape(10, -1)))
    assert (distances.argmin(1).numpy() == expected).mean() > 0.95


@pytest.mark.parametrize("name", SOURCES)
def test_a_set_of_objects_is_read_as_the_real_one(root, name):
    assert generate_objects(root, name, train=7, validation=3, side=64) == root / name
    data = DetectionData(name, workers=0)
    data.setup()
    assert (len(data.train_set), len(data.validation_set)) == (7, 3)
    labels, colours = set(), set()
    for image, target in [*data.train_set, *data.validation_set]:
        assert image.shape == (3, 64, 64)
        its = target["labels"].tolist()
        assert 1 <= len(its) <= 3
        labels |= set(its)
        for label, box, mask in zip(its, target["boxes"].int().tolist(), target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # Red or blue, where the rest is grey.
            red, _, blue = image[:, mask].mean(1)
            assert abs(red - blue) > 0.4
            colours.add((label, bool(red > blue)))
        assert target["masks"].sum(0).max() == 1
    assert labels == ({1, 2} if name == "coco" else {1})
    assert len(colours) == len({is_red for _, is_red in colours}) == len(labels)  # one for each
    numbers = [{target["image_id"] for _, target in part} for part in (data.train_set, data.validation_set)]
    assert not numbers[0] & numbers[1]


def test_objects_that_are_there_stay_and_the_same_numbers_give_the_same_images(root, tmp_path):
    first, second = (generate_objects(place, "pennfudan", 2, 1) for place in (root, tmp_path / "other"))
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert [(first / path).read_bytes() for path in files] == [(second / path).read_bytes() for path in files]
    (first / "images" / "0001.jpg").write_text("mine")
    generate_objects(root, "pennfudan", 5, 5)
    assert (first / "images" / "0001.jpg").read_text() == "mine"
    assert len(list((first / "images").iterdir())) == 3
