"""Image folders: with train and val, or split by a seed."""

import pytest
import torch
from image_files import CLASSES, write_classes
from PIL import Image

from kalmannorm.lab.data.folders import MEAN, STD, FolderData, image_transform
from kalmannorm.lab.data.roots import MissingDataError


def ready(folder, gradient_batch=2, **options):
    data = FolderData(str(folder), gradient_batch, size=16, workers=0, **options)
    data.setup()
    return data


def files(subset):
    return [subset.dataset.samples[index][0] for index in subset.indices]


def split_files(data):
    return [files(part) for part in (data.train_set, data.validation_set, data.test_set)]


def test_hidden_files_and_folders_are_none(root):
    write_classes(root / "mine", 10)
    write_classes(root / "mine", 2, [".ipynb_checkpoints"])
    (root / "mine" / "bee" / "._0.png").write_bytes(b"")
    write_classes(root / "mine" / "bee", 2, [".thumbnails"])
    data = ready("mine")
    assert data.classes == CLASSES
    assert sum(map(len, split_files(data))) == 30


def test_pictures_that_are_not_those_expected_are_refused(root):
    write_classes(root / "mine", 10)
    found = ready("mine").found
    assert ready("mine", pictures=found).found == found
    (root / "mine" / "bee" / "0.png").rename(root / "mine" / "bee" / "10.png")
    with pytest.raises(ValueError, match=r"mine: the pictures have changed: expected 30 pictures, .*; got 30 pictures"):
        ready("mine", pictures=found)


def test_three_folders_are_taken_as_they_are(root):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        write_classes(root / "imagenet" / part, count)
    data = ready("imagenet", 4, seed=5)
    assert data.classes == CLASSES
    assert data.num_classes == 3
    assert [{file.split("/")[-3] for file in part} for part in split_files(data)] == [{"train"}, {"val"}, {"test"}]
    assert [len(part) for part in split_files(data)] == [9, 6, 3]
    assert [images.shape for images, _ in data.train_dataloader()] == [(4, 3, 16, 16)] * 2
    assert data.train_dataloader().seed == 5
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [0, 1, 2]


def test_without_test_val_takes_its_place_and_validation_is_of_train(root):
    write_classes(root / "imagenet" / "train", 10)
    write_classes(root / "imagenet" / "val", 2)
    train, validation, test = split_files(ready("imagenet", validation=0.2))
    assert (len(train), len(validation), len(test)) == (24, 6, 6)
    assert not set(train) & set(validation)
    assert {file.split("/")[-3] for file in train + validation} == {"train"}
    assert {file.split("/")[-3] for file in test} == {"val"}


def test_one_folder_is_split_in_three_by_its_seed_without_overlap(tmp_path):
    write_classes(tmp_path / "pets", 10)
    first, again, other = (split_files(ready(tmp_path / "pets", validation=0.2, split_seed=seed)) for seed in (0, 0, 1))
    assert [len(part) for part in first] == [18, 6, 6]
    assert len(set().union(*first)) == 30
    assert first == again
    assert all(part != another for part, another in zip(first, other, strict=True))


def test_training_images_alone_are_cropped_at_random(tmp_path):
    write_classes(tmp_path / "pets", 10)
    data = ready(tmp_path / "pets")
    transforms = [part.dataset.transform.transforms for part in (data.train_set, data.validation_set, data.test_set)]
    assert [type(each[1]).__name__ for each in transforms] == ["RandomResizedCrop", "Resize", "Resize"]


def test_the_root_comes_before_the_path(root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "pets", 4)
    write_classes(root / "pets", 4)
    assert all(file.startswith(str(root)) for file in files(ready("pets").train_set))


def test_limit_keeps_images_of_all_classes_and_the_same_ones(tmp_path):
    write_classes(tmp_path, 20)
    first, again = (ready(tmp_path, limit=12) for _ in range(2))
    assert files(first.train_set) == files(again.train_set)
    assert len(first.train_set) == 12
    assert {label for _, label in first.train_set} == {0, 1, 2}


@pytest.mark.parametrize("train", [False, True])
def test_transforms_normalize_as_imagenet(train):
    picture = Image.new("RGB", (50, 40), (255, 0, 51))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(MEAN)) / torch.tensor(STD)
    image = image_transform(32, train)(picture)
    assert torch.allclose(image, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_a_part_alone_is_no_class(root, part):
    write_classes(root / "imagenet" / part, 1)
    with pytest.raises(MissingDataError, match="val"):
        ready("imagenet")


def test_of_a_folder_of_ones_own_the_layouts_are_told(root, tmp_path):
    write_classes(tmp_path / "own" / "train", 1)
    write_classes(tmp_path / "own" / "test", 1)
    with pytest.raises(MissingDataError, match=r"has train and test of train, val and test; expected") as raised:
        ready(tmp_path / "own")
    assert "image-net" not in str(raised.value)


@pytest.mark.parametrize("part", ["val", "test"])
def test_classes_that_differ_are_named(tmp_path, part):
    for name in ("train", "val", "test"):
        write_classes(tmp_path / name, 1, CLASSES[:2] if name == part else CLASSES)
    with pytest.raises(ValueError, match=f"train and {part} .*only in one: dog"):
        ready(tmp_path)


def labels(subset):
    return [subset.dataset.targets[index] for index in subset.indices]


@pytest.mark.parametrize("split_seed", [0, 1])
@pytest.mark.parametrize("folders", [(".",), ("train", "val")])
def test_each_split_has_its_share_of_a_small_class(tmp_path, folders, split_seed):
    for folder in folders:
        write_classes(tmp_path / folder, 45, CLASSES[:1])
        write_classes(tmp_path / folder, 5, CLASSES[1:2])
    data = ready(tmp_path, validation=0.2, split_seed=split_seed)
    counts = [torch.tensor(labels(part)).bincount().tolist() for part in (data.train_set, data.validation_set)]
    assert counts == ([[27, 3], [9, 1]] if folders == (".",) else [[36, 4], [9, 1]])
    assert torch.tensor(labels(data.test_set)).bincount().tolist() == ([9, 1] if folders == (".",) else [45, 5])


@pytest.mark.parametrize(("folder", "count"), [(".", 2), ("train", 1), (".", 1)])
def test_a_class_too_small_to_be_in_each_split_is_trained_on_alone(tmp_path, folder, count):
    write_classes(tmp_path / folder, 20, CLASSES[:2])
    write_classes(tmp_path / folder, count, CLASSES[2:])
    if folder == "train":
        write_classes(tmp_path / "val", 2)
    data = ready(tmp_path)
    assert labels(data.train_set).count(2) == count
    assert 2 not in labels(data.validation_set)
    assert data.num_classes == 3


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "val", "test")])
def test_test_images_can_draw_the_curve(root, parts):
    for part in parts:
        write_classes(root / "imagenet" / part, 2)
    data = ready("imagenet", validation="test")
    train, validation, test = split_files(data)
    assert validation == test
    assert {file.split("/")[-3] for file in test} == {parts[-1]}
    assert len(train) == 6


def test_without_test_images_there_is_nothing_to_validate_on(root):
    write_classes(root / "photos", 4)
    with pytest.raises(ValueError, match="no test images to validate on"):
        ready("photos", validation="test")
