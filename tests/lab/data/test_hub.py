"""ImageNet-1k as Parquet files, and from the hub, which these tests do not reach."""

import datasets
import numpy as np
import pytest
from image_files import CLASSES
from PIL import Image

from kalmannorm.lab.data.folders import REPOSITORY, FolderData
from kalmannorm.lab.data.hub import HubImages


def part(count, grey=False):
    """Pictures whose colour says which they are."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    pictures = [Image.new("L" if grey else "RGB", (40, 30), n if grey else (n, 0, 255)) for n in range(count)]
    return datasets.Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(count)]}, features=features)


def ready(**options):
    data = FolderData("imagenet", 2, size=16, workers=0, **options)
    data.setup()
    return data


def test_an_item_is_a_picture_in_colour_and_its_label():
    images = HubImages(part(4, grey=True), np.asarray)
    assert len(images) == 4
    assert images.classes == CLASSES
    picture, label = images[2]
    assert images.targets == [0, 1, 2, 0]
    assert picture.shape == (30, 40, 3)
    assert (picture == 2).all()
    assert label == 2


def test_other_columns_are_refused():
    with pytest.raises(ValueError, match="expected the columns image and label"):
        HubImages(part(2).rename_column("image", "img"))


def test_parquet_files_of_the_repository(root, asked_of_the_hub):
    (root / "imagenet").mkdir()
    for name, count in (("train", 10), ("validation", 4)):
        part(count).to_parquet(root / "imagenet" / f"{name}-00000-of-00001.parquet")
    data = ready(validation="test")
    assert (data.classes, data.num_classes) == (CLASSES, 3)
    assert (len(data.train_set), len(data.validation_set), len(data.test_set)) == (10, 4, 4)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 1, 2, 0]
    assert next(iter(data.train_dataloader()))[0].shape == (2, 3, 16, 16)
    assert asked_of_the_hub == []


def test_from_the_hub_if_it_is_nowhere(root, monkeypatch):
    asked = []

    def load(path, configuration, split):
        assert configuration is None
        asked.append((path, split))
        return part({"train": 10, "validation": 4}[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert (len(ready().train_set), len(ready().test_set)) == (7, 4)
    assert set(asked) == {(REPOSITORY, "train"), (REPOSITORY, "validation")}
