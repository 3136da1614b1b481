"""Training and scoring a segmentation: what Dice is the mean of, and that it learns."""

import copy
import re

import pytest
import torch
from short_trainings import quiet_trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.segmentation import DiceScore

import kalmannorm
from kalmannorm.lab import experiments, fitting
from kalmannorm.lab.cli import main
from kalmannorm.lab.costs import build
from kalmannorm.lab.curve import Curve
from kalmannorm.lab.data.volumes import VolumeData
from kalmannorm.lab.models.unet3d import UNet3d
from kalmannorm.lab.segmentation import Segmenter, soft_dice_loss
from kalmannorm.traversal import kalman_layers


class Said(nn.Module):
    """Says of each voxel what stands in it."""

    def forward(self, volumes):
        return torch.stack([-(volumes[:, 0] - each).abs() for each in range(3)], 1)


def scores(network, volumes, classes, batch=2, **options):
    module = Segmenter(network, **options)
    batches = DataLoader(TensorDataset(volumes, classes), batch)
    (found,) = quiet_trainer(1).validate(module, batches, verbose=False)
    return found


def data(**options):
    return VolumeData(**{"train": 4, "validation": 2, "test": 2, "size": 8} | options)


def segmenter(method="bn", **options):
    given = {"statistics_batch": 1, "rate": 0.02, "steps": 30} | options
    return Segmenter(UNet3d(4, 2, num_classes=3), method, **given)


def test_dice_is_the_mean_over_images_of_the_mean_over_the_classes_but_the_background():
    classes = torch.zeros(3, 1, 1, 8, dtype=torch.int64)
    said = classes.clone()
    classes[0, ..., :4], said[0, ..., 2:4] = 1, 1  # 2 * 2 / (4 + 2)
    classes[0, ..., 4:6], said[0, ..., 4:8] = 2, 2  # 2 * 2 / (2 + 4)
    classes[1, ..., :2], said[1, ..., :2] = 1, 1  # 1, and neither has class 2
    classes[2, ..., :2], said[2, ..., 4:6] = 2, 1  # 0 and 0
    found = scores(Said(), said[:, None].float(), classes)
    assert found == pytest.approx(dict.fromkeys(("dice_running", "dice_online"), (2 / 3 + 1 + 0) / 3))


def test_soft_dice_is_dice_where_probabilities_are_certain():
    classes, said = torch.randint(0, 3, (2, 4, 4, 4)), torch.randint(0, 3, (2, 4, 4, 4))
    dice = DiceScore(3, include_background=False, average="macro", input_format="index")(said, classes)
    certain = 100 * F.one_hot(said, 3).movedim(-1, 1).float()
    assert soft_dice_loss(certain, classes).item() == pytest.approx(1 - dice.item(), abs=1e-5)
    assert soft_dice_loss(100 * F.one_hot(classes, 3).movedim(-1, 1).float(), classes) == pytest.approx(0, abs=1e-5)


def test_a_class_that_is_nowhere_is_no_reason_to_change():
    logits = 100 * F.one_hot(torch.zeros(1, 8, dtype=torch.int64), 3).mT.float()
    assert soft_dice_loss(logits, torch.zeros(1, 8, dtype=torch.int64)) == 0
    uncertain = torch.zeros(1, 3, 8, requires_grad=True)
    soft_dice_loss(uncertain, torch.zeros(1, 8, dtype=torch.int64)).backward()
    assert uncertain.grad.isfinite().all()


def test_the_loss_is_the_sum_of_both():
    losses = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        recorder = Curve()
        module = segmenter("gn", dice_weight=weight, normalization_options={"groups": 2})
        network = copy.deepcopy(module.network)
        quiet_trainer(1, recorder, limit_val_batches=0).fit(module, data(train=1))
        losses.append(recorder.losses[0])
    given = data(train=1)
    given.setup()
    volumes, classes = next(iter(given.train_dataloader()))
    assert losses[0] == pytest.approx(F.cross_entropy(network(volumes), classes).item(), rel=1e-5)
    assert losses[1] - losses[0] == pytest.approx(0.5 * soft_dice_loss(network(volumes), classes).item(), rel=1e-4)


def test_one_volume_can_be_learned_by_heart():
    recorder = Curve()
    quiet_trainer(60, recorder, limit_val_batches=0).fit(segmenter("kn", rate=0.05, steps=60), data(train=1))
    assert recorder.losses[-1] < 0.6 * recorder.losses[0]


@pytest.mark.parametrize("channels_last", [False, True])
def test_planes_are_segmented_too(channels_last):
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3))
    module = Segmenter(network, "kn", statistics_batch=2, rate=0.05, steps=5, channels_last=channels_last)
    images, classes = torch.randn(4, 1, 8, 8), torch.randint(0, 3, (4, 8, 8))
    quiet_trainer(2).fit(module, DataLoader(TensorDataset(images, classes), 2))
    assert set(scores(network, images, classes)) == {"dice_running", "dice_online"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, .*; got 1"),
        ({"dice_weight": -1.0}, "dice_weight must be at least 0; got -1.0"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(UNet3d(4, 2), **options)


@pytest.mark.parametrize("name", ["volumes", "signals", "tabular"])
def test_each_arm_of_the_study_trains_and_kalman_layers_know_the_input(name, tmp_path, capsys):
    study = experiments.read(name)
    configs = {arm.name: arm.scaled("tiny") for arm in study.arms}
    data = build(configs["kn"], "data")
    data.setup()
    inputs, _ = next(iter(data.train_dataloader()))
    for arm, config in configs.items():
        module, recorder = build(config, "model"), Curve()
        quiet_trainer(2, recorder, limit_val_batches=0).fit(module, data)
        assert torch.isfinite(torch.tensor(recorder.losses)).all(), arm
        filters = [layer for _, layer in kalman_layers(module) if not layer.ignores_prior]
        assert bool(filters) == arm.startswith("kn"), arm
        if filters:
            description = kalmannorm.describe(module.network, inputs)
            assert description.with_prior == len(description.rows) == len(filters), str(description)
    result = fitting.fit(configs["kn"], tmp_path / "run", split="validation")
    assert 0 <= result.scores[study.metric] <= 1
    if name == "volumes":
        assert main(["layers", "--run", str(tmp_path / "run"), "--batches", "1", "--convert", "corrected"]) == 0
        assert re.search(r"^dice_running 0\.\d+\ndice_online 0\.\d+$", capsys.readouterr().out, re.MULTILINE)
