"""Generated objects, as the real sets are read."""

import pytest

from kalmannorm.lab.data.generated_objects import generate_objects
from kalmannorm.lab.data.objects import SOURCES, DetectionData


@pytest.mark.parametrize("name", SOURCES)
def test_a_set_is_read_as_the_real_one(root, name):
    assert generate_objects(root, name, train=7, validation=3, side=64) == root / name
    data = DetectionData(name, workers=0)
    data.setup()
    assert (len(data.train_set), len(data.validation_set)) == (7, 3)
    labels = set()
    for image, target in [*data.train_set, *data.validation_set]:
        assert image.shape == (3, 64, 64)
        assert 1 <= len(target["labels"]) <= 3
        labels |= set(target["labels"].tolist())
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"].bool(), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # Red or blue, where the rest is grey.
            red, _, blue = image[:, mask].mean(1)
            assert abs(red - blue) > 0.4
        assert target["masks"].sum(0).max() == 1
    assert labels == ({1, 2} if name == "coco" else {1})
    numbers = [{target["image_id"] for _, target in part} for part in (data.train_set, data.validation_set)]
    assert not numbers[0] & numbers[1]


def test_what_is_there_stays_and_the_same_numbers_give_the_same_images(root, tmp_path):
    first, second = (generate_objects(place, "pennfudan", 2, 1) for place in (root, tmp_path / "other"))
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert [(first / path).read_bytes() for path in files] == [(second / path).read_bytes() for path in files]
    (first / "images" / "0001.jpg").write_text("mine")
    generate_objects(root, "pennfudan", 5, 5)
    assert (first / "images" / "0001.jpg").read_text() == "mine"
    assert len(list((first / "images").iterdir())) == 3


def test_an_unknown_set_is_named(root):
    with pytest.raises(ValueError, match="'pets'"):
        generate_objects(root, "pets")
