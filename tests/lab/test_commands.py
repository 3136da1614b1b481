"""fit, validate and test from the command line."""

import re

import pytest
import torch
import yaml

from kalmannorm.lab import experiments
from kalmannorm.lab.cli import main
from kalmannorm.lab.configuration import Run
from kalmannorm.lab.fitting import load
from kalmannorm.lab.methods import METHODS


@pytest.fixture
def recipe(short, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(short))
    return str(path)


def test_train_then_score(images, recipe, tmp_path, capsys):
    output = str(tmp_path / "run")
    assert main(["fit", "--config", recipe, "--output", output, "--trainer.max_steps", "3"]) == 0
    trained = capsys.readouterr().out
    assert "3" in (tmp_path / "run" / "curve.csv").read_text().splitlines()[-1].split(",")
    assert main(["test", "--output", output]) == 0
    scored = capsys.readouterr().out
    assert trained.startswith(scored)
    assert scored.startswith("accuracy_running 0.")
    assert main(["validate", f"--output={output}", "--trainer.accelerator=cpu"]) == 0
    assert "accuracy_online" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--model.init_args.normalization", "nope"], ["must be one of bn, brn", "got 'nope'"]),
        (["--model.init_args.schedule", "steps"], ['"schedule"', "'cosine'", "steps"]),
        (["--model.init_args.network.init_args.depth", "9"], ["depth 9", "6n + 2"]),
        (["--model.init_args.ratte", "1"], ["'ratte'"]),
        (["--data.init_args.name", "cifar11"], ["cifar10", "'cifar11'"]),
        (["--data.init_args.name", "svhn"], ["'svhn' was not found", "svhn/train-*.parquet"]),
        (["--data.init_args.gradient_batch", "100"], ["at most 48, the images there are", "got 100"]),
        (["--trainer.max_steps", "0"], ["max_steps must be at least 1; got 0"]),
        (["--trainer.accumulate_grad_batches", "3"], ["gradient_batch must be a multiple of 3", "got 8"]),
        (["--trainer.devices", "0"], ["devices", "0"]),
        (["--checkpoint_every", "0"], ["checkpoint_every", "got 0"]),
        (["--trainr.max_steps", "1"], ["trainr"]),
        (["--trainer.max_steps", "abc"], ["kalmannorm: --trainer.max_steps: expected int; got abc\n"]),
        (["--split", "all"], ["kalmannorm: --split: expected one of 'validation', 'test'; got all\n"]),
        (["--config", "no-such-arm"], ["no-such-arm"]),
        (["--config", "fine-tuning-cpu/kn-2"],
         ["fine-tuning-cpu/kn-2 starts from the weights of fine-tuning-source-cpu/bn: give --model.init_args.weights"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(images, recipe, tmp_path, refused, settings, words):
    assert refused(["fit", "--config", recipe, "--output", tmp_path / "run", *settings], *words) == ""
    assert not (tmp_path / "run").exists()


def test_a_setting_of_a_network_that_a_function_makes():
    arm = experiments.config_of("detection-cpu/kn")
    for name in ("--model.init_args.rate", "--model.rate"):
        complete = Run(arm, [name, "1e-3", "--seed_everything=3"]).complete()
        assert (complete["model"]["init_args"]["rate"], complete["seed_everything"]) == (1e-3, 3)
        assert complete["model"]["init_args"]["network"]["class_path"].endswith("mask_rcnn_fpn")


def test_a_network_named_again_keeps_its_settings():
    arm = experiments.config_of("batch-sizes-cpu/kn-1")
    network = arm["model"]["init_args"]["network"]
    complete = Run(arm, ["--model.init_args.network", network["class_path"]]).complete()
    found = complete["model"]["init_args"]["network"]["init_args"]
    assert {name: found[name] for name in ("depth", "width")} == {"depth": 14, "width": 8}


@pytest.fixture
def exported(tmp_path, capsys):
    """Exports a run; returns the network that the lines shown make, which computes what the run's own does."""

    def export(folder, images, *options):
        capsys.readouterr()
        assert main(["export", str(folder), str(tmp_path / "model.pt"), *options]) == 0
        names: dict = {}
        exec(capsys.readouterr().out, names)
        with torch.no_grad():
            torch.testing.assert_close(names["network"](images), load(folder).network(images))
        return names["network"]

    return export


@pytest.mark.parametrize("stock", [False, True], ids=["as trained", "stock"])
def test_exported_weights_are_loaded_by_the_lines_that_are_shown(images, recipe, tmp_path, exported, refused, stock):
    assert main(["fit", "--config", recipe, "--output", str(tmp_path / "run")]) == 0
    network = exported(tmp_path / "run", torch.randn(4, 3, 32, 32), *["--stock"] * stock)
    kinds = {type(layer).__name__ for layer in network.modules()}
    assert ("KalmanNorm2d" in kinds, "BatchNorm2d" in kinds) == (not stock, stock)
    gone = tmp_path / "gone" / "model.pt"
    refused(["export", tmp_path / "run", gone], f"kalmannorm: {gone}: No such file or directory\n")


@pytest.fixture
def untrained(tmp_path):
    """Makes the folder of a run that has not begun to train."""

    def make(config):
        run, folder = Run(config), tmp_path / "run"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(run.complete()))
        torch.save({"state_dict": run.build()[1].state_dict()}, folder / "last.ckpt")
        return folder

    return make


def test_a_detector_with_standardized_filters_is_exported(shallow, untrained, exported):
    (arm,) = [arm for arm in experiments.read("pennfudan").arms if arm.name == "cpu-c4-kn-standardized"]
    exported(untrained(arm.scaled("tiny")), [torch.rand(3, 64, 64)])


@pytest.mark.parametrize(
    ("method", "options", "refusal"),
    [
        ("bn", {"weight_standardization": True}, None),
        ("kn", {"proxy": True}, "trained with proxy, which torch's BatchNorm does"),
        ("gn", {}, "trained gn, expected Kalman layers"),
    ],
)
def test_what_is_exported_as_stock_layers(untrained, short, tmp_path, exported, refused, method, options, refusal):
    short["model"]["init_args"] |= {"normalization": method, "normalization_options": options}
    folder, images = untrained(short), torch.randn(4, 3, 32, 32)
    if refusal is None:
        exported(folder, images, "--stock")
    else:
        refused(["export", folder, tmp_path / "model.pt", "--stock"], f"--stock: {folder} {refusal}")
        assert not (tmp_path / "model.pt").exists()
    exported(folder, images)


def test_the_list_tells_what_there_is(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*experiments.names(), *METHODS, "cifar100", "coco"):
        assert name in out
    # Without the released form, which is run if asked for.
    assert re.search(r"\| variants +\| 4 +\| 12 +\|", out)
