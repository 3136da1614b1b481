"""Scores, weights and errors of detectors in training; and what a resumed training gives."""

import json

import pytest
import torch
from short_trainings import assert_same, quiet_trainer
from torch import nn

import kalmannorm as kn
from kalmannorm.lab import fitting
from kalmannorm.lab.data.generated import generate_objects
from kalmannorm.lab.data.objects import DetectionData
from kalmannorm.lab.detection import Detector
from kalmannorm.lab.experiments import merge, read
from kalmannorm.lab.models.detection import mask_rcnn_fpn

NAMES = ("box_ap", "mask_ap", "box_ap50", "mask_ap50")
PARTS = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")


@pytest.fixture
def data(root):
    """Five validation images."""
    generate_objects(root, "coco", train=6, validation=5)
    return DetectionData("coco", workers=0)


class Oracle(nn.Module):
    """Finds what there is: ``shift`` columns to the right, and on every ``each``-th image alone."""

    def __init__(self, data, shift=0, each=1):
        super().__init__()
        data.setup()
        self.known = [data.validation_set[index] for index in range(len(data.validation_set))]
        self.shift, self.each = shift, each

    def forward(self, images):
        return [self.find(image) for image in images]

    def find(self, image):
        index = next(i for i, (known, _) in enumerate(self.known) if torch.equal(known, image))
        target = self.known[index][1]
        kept = slice(None) if index % self.each == 0 else slice(0)
        boxes, masks, labels = (torch.as_tensor(target[key])[kept] for key in ("boxes", "masks", "labels"))
        masks = masks.roll(self.shift, 2).float()[:, None]
        return {
            "boxes": boxes + self.shift * torch.tensor([1.0, 0, 1, 0]),
            "labels": labels,
            "scores": torch.ones(len(labels)),
            "masks": masks,
        }


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("method", ["kn", "gn"])
def test_standardized_filters_below_every_norm(method):
    """By a call, as torch.fx cannot trace a detector."""
    small = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 8}
    options = {"weight_standardization": True}
    detector = Detector(mask_rcnn_fpn(2, **small), method, normalization_options=options)
    filters = [m for m in detector.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    norms = sum(isinstance(m, nn.BatchNorm2d | nn.GroupNorm) for m in detector.network.modules())
    assert sum(type(m).__name__.startswith("Standardized") for m in filters) == norms == 33


def scores(data, network, **options):
    (found,) = quiet_trainer(1, **options).validate(Detector(network), datamodule=data, verbose=False)
    assert set(found) == set(NAMES)
    return found


class OfWideImages(Oracle):
    """Finds what there is where what leaves a normalization layer has a deviation of more than a half."""

    def __init__(self, data):
        super().__init__(data)
        self.norm = nn.BatchNorm2d(3)

    def find(self, image):
        found = super().find(image)
        return found if self.norm(image[None]).std() > 0.5 else {name: each[:0] for name, each in found.items()}


@pytest.mark.parametrize(
    ("normalization", "options", "running", "online"),
    [("kn", {}, 0, 1), ("bn", {}, 0, 1), ("gn", {"groups": 1}, 1, 1), ("frozen", {}, 0, 0)],
)
def test_online_each_image_normalizes_itself(data, normalization, options, running, online):
    """The images have a deviation of some 0.1, and running statistics are still 0 and 1."""
    detector = Detector(
        OfWideImages(data), normalization, normalization_options=options, scratch=True, score_online=True
    )
    (found,) = quiet_trainer(1).validate(detector, datamodule=data, verbose=False)
    expected = dict.fromkeys(NAMES, running) | dict.fromkeys([f"{name}_online" for name in NAMES], online)
    assert found == pytest.approx(expected)


def test_what_is_found_in_a_crowd_does_not_count_against(data, root):
    """All objects of the first image become crowds: to find them is neither right nor wrong."""
    oracle = Oracle(data)
    path = root / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    first = content["images"][0]["id"]
    for entry in content["annotations"]:
        entry["iscrowd"] = int(entry["image_id"] == first)
    path.write_text(json.dumps(content))
    assert scores(DetectionData("coco", workers=0), oracle)["box_ap"] == pytest.approx(1)


@pytest.mark.slow
def test_two_processes_score_as_one(data):
    """Of five images the first process has three, and the second two."""
    network = Oracle(data, shift=2, each=2)
    alone = scores(data, network)
    assert 0 < alone["box_ap"] < alone["box_ap50"] < 1
    assert 0 < alone["mask_ap"] < alone["mask_ap50"] < 1
    assert scores(data, network, devices=2, strategy="ddp_fork") == pytest.approx(alone)


class Line(nn.Module):
    """Losses of a detector, one of them not finite from the third call on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.calls = 0

    def forward(self, images, targets):
        self.calls += 1
        return {
            "loss_mask": self.weight.sum(),
            "loss_box_reg": self.weight.sum() * float("1" if self.calls < 3 else "inf"),
        }


def test_a_loss_that_is_not_finite_names_the_step_and_the_part(data):
    with pytest.raises(FloatingPointError, match=r"loss at step 2 is inf \(loss_mask [\d.-]+, loss_box_reg inf\)"):
        quiet_trainer(5, limit_val_batches=0).fit(Detector(Line(), rate=0.1, steps=5), datamodule=data)


def test_each_loss_is_logged_and_their_sum_is_trained_on(data):
    trainer = quiet_trainer(1, limit_val_batches=0)
    trainer.fit(Detector(Line(), rate=0.1, steps=5), datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == {"loss": 8, "loss_mask": 4, "loss_box_reg": 4}


def test_frozen_layers_want_weights():
    network = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="weights=FILE, or scratch=True"):
        Detector(network, "frozen")
    Detector(network, "frozen", scratch=True)
    network = nn.Sequential(nn.BatchNorm2d(8))
    network[0].running_mean += 1  # trained before
    Detector(network, "frozen")


@pytest.mark.parametrize("name", ["table6", "pennfudan"])
def test_arms_are_complete(name):
    for arm in read(name).arms:
        assert set(arm.column) <= set(NAMES)
        assert arm.scaled("tiny")["trainer"]["max_steps"] == 4
        assert arm.scaled("tiny")["model"]["init_args"].get("weights") is None
        assert (arm.start is None) == (name == "pennfudan")


@pytest.fixture
def tiny(root):
    for name in ("coco", "pennfudan"):
        generate_objects(root, name, train=4, validation=2)
    arms = {f"{name}/{arm.name}": arm for name in ("table6", "pennfudan") for arm in read(name).arms}
    return lambda name: arms[name].scaled("tiny")


def small(config):
    """With a small network, whose checkpoints take no time."""
    config["model"]["init_args"]["network"] = {"class_path": "short_trainings.small_mask_rcnn"}
    return config


@pytest.mark.usefixtures("shallow")
def test_an_arm_trains_and_scores(tiny, tmp_path):
    result = fitting.fit(tiny("table6/c4-frozen"), tmp_path / "run")
    assert set(result.scores) == set(NAMES)
    assert all(0 <= value <= 1 for value in result.scores.values())
    assert len(result.losses) == 4
    assert set(PARTS) <= set(result.validations[0])


@pytest.mark.slow
def test_recalibrated_statistics_are_kept_with_the_run(tiny, tmp_path, monkeypatch):
    """And one that had trained all its steps, but was not recalibrated, is when it goes on."""
    recalibrate, done = kn.recalibrate, []

    def twice(network, batches, **options):
        done.append(recalibrate(network, batches, **options))
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("kalmannorm.integrations.lightning.recalibrate", twice)
    options = {"model": {"init_args": {"recalibrate": 2, "score_online": True}}, "data": {"init_args": {"workers": 0}}}
    config = small(merge(tiny("pennfudan/cpu-fpn-bn"), options))
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(config, tmp_path / "run")
    averages = fitting.load(tmp_path / "run").network.backbone[1].running_mean
    result = fitting.fit(config, tmp_path / "run")
    assert len(done) == 2
    assert len(result.losses) == 4
    assert set(result.scores) == {*NAMES, *(f"{name}_online" for name in NAMES)}
    kept = fitting.load(tmp_path / "run").network.state_dict()
    assert_same(kept, done[1].state_dict())
    assert not torch.equal(kept["backbone.1.running_mean"], averages)


@pytest.mark.parametrize(
    ("normalization", "batches", "words"),
    [("bn", 0, "at least 1; got 0"), ("gn", 2, "normalization='gn'"), ("frozen", 2, "normalization='frozen'")],
)
def test_what_cannot_be_recalibrated_is_said_before_a_training(normalization, batches, words):
    with pytest.raises(ValueError, match=words):
        Detector(nn.Sequential(nn.BatchNorm2d(32)), normalization, scratch=True, recalibrate=batches)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "workers"), [(4, 2), (2, 0)])
def test_a_training_ended_in_mid_epoch_or_at_its_end_goes_on_bit_for_bit(tiny, tmp_path, images, workers):
    """Of images on disk, one a step, that other processes read."""
    changes = {"trainer": {"val_check_interval": 4}, "data": {"init_args": {"limit": images, "workers": workers}}}
    config = small(merge(tiny("pennfudan/fpn-kn-default"), changes))

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    whole = fitting.fit(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(config, tmp_path / "stopped", on_progress=stop)
    kept = torch.load(tmp_path / "stopped" / "last.ckpt")
    assert kept["global_step"] == 2
    again = fitting.fit(config, tmp_path / "stopped")
    assert (again.losses, again.scores) == (whole.losses, whole.scores)
    assert_same(*(torch.load(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "stopped")))
