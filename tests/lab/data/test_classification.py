"""The data module under a Trainer: what it hands out."""

import pytest
import torch
from image_files import write_parquet
from short_trainings import quiet_trainer
from torch import nn

from kalmannorm.lab.data.classification import ClassificationData
from kalmannorm.lab.training import Classifier


@pytest.fixture
def cifar10(root):
    write_parquet(root, "cifar10", {"train": 50, "test": 14})


def classifier():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    return Classifier(network, num_classes=10, rate=0.01, steps=100)


@pytest.mark.parametrize("scaling", ["channel", "pixel"])
def test_scaling_is_taken_from_the_images_trained_on(cifar10, scaling):
    data = ClassificationData("cifar10", 40, validation=10, scaling=scaling, augment="none")
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert abs(images.mean()) < 1e-4
    held_out, _ = next(iter(data.val_dataloader()))
    assert abs(held_out.mean()) > 1e-4


def test_fixed_scaling_and_a_size_are_the_same_for_all_images(cifar10):
    small, large = (ClassificationData("cifar10", 40, validation=10, scaling="fixed", size=s) for s in (None, 48))
    for data in (small, large):
        data.setup()
    for split in (ClassificationData.val_dataloader, ClassificationData.test_dataloader):
        images, labels = next(iter(split(small)))
        resized, same_labels = next(iter(split(large)))
        part = small._splits.validation if split is ClassificationData.val_dataloader else small._splits.test
        assert torch.equal(images, (part[0].float() - 127) / 128)
        assert torch.equal(labels, same_labels)
        expected = nn.functional.interpolate(images, size=48, mode="bilinear", align_corners=False)
        assert torch.allclose(resized, expected, atol=1e-5)


def test_of_some_classes_there_are_as_many(cifar10):
    data = ClassificationData("cifar10", 8, validation=4, classes=[5, 1, 3])
    data.setup()
    assert data.num_classes == 3
    assert {label for _, labels in data.train_dataloader() for label in labels.tolist()} == {0, 1, 2}


def test_without_validation_a_trainer_fits_all_the_same(cifar10):
    trainer = quiet_trainer(6)
    trainer.fit(classifier(), ClassificationData("cifar10", 8, validation=0))
    assert trainer.global_step == 6


def test_the_test_images_can_stand_for_validation(cifar10):
    data = ClassificationData("cifar10", 8, validation="test")
    data.setup()
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 48
    ((images, labels),), ((expected, same),) = list(data.val_dataloader()), list(data.test_dataloader())
    assert torch.equal(images, expected)
    assert torch.equal(labels, same)
