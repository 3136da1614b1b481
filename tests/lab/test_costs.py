"""What is timed and counted without a training."""

import pytest
import torch

from kalmannorm.lab import costs
from kalmannorm.lab.analysis import relative_gap
from kalmannorm.lab.costs import speed
from kalmannorm.lab.experiments import merge, read


def tiny(name):
    experiment, _, arm = name.partition("/")
    return next(each for each in read(experiment).arms if each.name == arm).scaled("tiny")


def test_a_step_is_timed_in_proportion_to_the_gradient_batch(config, monkeypatch):
    monkeypatch.setattr(costs, "timed_step", lambda module, optimizer, batch: len(batch[0]) * 0.5)
    monkeypatch.setattr(costs, "device", lambda: torch.device("cpu"))
    large = merge(config, {"model": {"init_args": {"num_classes": 10}}, "data": {"init_args": {"gradient_batch": 128}}})
    assert costs.seconds_per_step(large) == 64


@pytest.mark.parametrize(
    "name", ["table8/resnet32-kn-bs2", "table8/inception-cifar10-brn-bs2", "peers-inception/inception-cbn"]
)
def test_a_real_step_takes_time(name):
    assert 0.01 < costs.seconds_per_step(tiny(name), 1) < 60


def test_a_part_that_cannot_be_built_is_named(config):
    with pytest.raises(ValueError, match=r"^data: .*No module named 'foo'$"):
        costs.build(merge(config, {"data": {"class_path": "foo.Bar"}}), "data")


def test_images_that_are_resized_are_timed_at_their_size_and_those_of_many_sizes_not(config):
    config["data"]["class_path"] = "kalmannorm.lab.data.objects.DetectionData"
    assert costs.seconds_per_step(config) is None
    assert costs.image_size(tiny("fine-tuning-imagenet-cpu/kn-1")) == 40
    assert costs.image_size(tiny("table8/resnet32-kn-bs2")) == 32
    assert costs.image_size(tiny("table1/resnet50-bn")) == 64
    as_they_are = merge(tiny("fine-tuning-imagenet-cpu/kn-1"), {"data": {"init_args": {"size": None}}})
    assert costs.image_size(as_they_are) == 32


def test_speed_is_of_both_in_turn_and_their_ratio():
    found = speed(tiny("table3/inception-v2-default"), rounds=1)
    assert found["ratio"] == pytest.approx(found["images_per_second_bn"] / found["images_per_second_kn"])
    assert found["images_per_second_kn"] > 0


def test_gaps_are_relative_to_the_running_variance():
    gaps = {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "b": torch.tensor([[1.0]])}
    assert relative_gap(gaps, {"a": torch.tensor([4.0, 4.0]), "b": torch.tensor([1.0])}) == 0.75
