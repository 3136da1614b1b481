"""What is timed and counted without a training."""

import pytest
import torch

from kalmannorm.lab import costs
from kalmannorm.lab.computed import relative_gap, speed
from kalmannorm.lab.recipes import merge, read
from kalmannorm.lab.tables import Cell


def test_a_step_is_timed_in_proportion_to_the_gradient_batch(config, monkeypatch):
    monkeypatch.setattr(costs, "timed_step", lambda module, optimizer, batch: len(batch[0]) * 0.5)
    monkeypatch.setattr(costs, "device", lambda: torch.device("cpu"))
    large = merge(config, {"model": {"init_args": {"num_classes": 10}}, "data": {"init_args": {"gradient_batch": 128}}})
    assert costs.seconds_per_step(large) == 64


@pytest.mark.parametrize("name", ["table8/resnet32-kn-bs2", "table8/inception-cifar10-brn-bs2", "peers/inception-cbn"])
def test_a_real_step_takes_time(name):
    assert 0.01 < costs.seconds_per_step(read(name).scaled("tiny"), 1) < 60


def test_images_of_many_sizes_are_not_timed(config):
    config["data"]["class_path"] = "kalmannorm.lab.data.objects.DetectionData"
    assert costs.seconds_per_step(config) is None


def test_the_list_counts_images_and_hours_and_names_the_data(monkeypatch):
    monkeypatch.setattr(costs, "seconds_per_step", lambda config: 3600.0)
    cells = [Cell(read(name), read(name).scaled("tiny")) for name in ("table8/resnet32-kn-bs2", "table2/resnet50-kn")]
    text = costs.costs(cells, 2, lambda config: "not here")
    line = next(line for line in text.splitlines() if "table8/resnet32-kn-bs2" in line)
    assert [word.strip() for word in line.split("|")[2:6]] == ["6", "24", "6.00", "not here"]
    assert "needs none" in next(line for line in text.splitlines() if "table2" in line)
    assert "12.0 hours with 2 seeds" in text
    assert "estimate" in text


def test_speed_is_of_both_in_turn_and_their_ratio():
    found = speed(read("table3/inception-v2").scaled("tiny"), rounds=1)
    assert found["ratio"] == pytest.approx(found["images_per_second_bn"] / found["images_per_second_kn"])
    assert found["images_per_second_kn"] > 0


def test_gaps_are_relative_to_the_running_variance():
    gaps = {"a": torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "b": torch.tensor([[1.0]])}
    assert relative_gap(gaps, {"a": torch.tensor([4.0, 4.0]), "b": torch.tensor([1.0])}) == 0.75
