"""Why a loss leaps in the first steps; docs/guide/troubleshooting.md says it, benchmarks/first_steps.py measures it."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

import kalmannorm as kn

ROOT = Path(__file__).parent.parent


def encoder():
    layers = []
    for channels in (3, *[16] * 11):
        layers += [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def features(kind, image, seed):
    """What leaves a fresh encoder in training."""
    torch.manual_seed(seed)
    model = encoder()
    if kind != "batch_norm":
        kn.convert(model)
    if kind == "calibrated":
        kn.calibrate(model, image)
    if kind == "gain of a half":
        kn.anneal(model, 1 / 18)
    with torch.no_grad():
        return model.train()(image)


def constant_part(x):
    """The share of the mean over pixels and images in the power."""
    return (x.mean((0, 2, 3)).square().mean() / x.square().mean()).item()


@pytest.mark.parametrize("seed", [1, 2])
def test_of_fresh_features_a_part_is_constant_until_the_batch_has_a_say(seed):
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    share = {kind: constant_part(features(kind, image, seed))
             for kind in ("batch_norm", "default", "calibrated", "gain of a half")}  # fmt: skip
    assert share.pop("batch_norm") < 1e-6
    assert share.pop("default") > 0.005
    assert max(share.values()) < 0.001, share


@pytest.mark.parametrize("seed", [1, 2])
def test_one_step_of_adam_moves_all_pixels_together_where_features_are_constant(seed):
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    moved = {}
    for kind in ("batch_norm", "default", "calibrated"):
        x = features(kind, image, seed)
        head = nn.Conv2d(16, 1, 1, bias=False)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
        before = head(x)
        nn.functional.softplus(before).mean().backward()  # all of the image is background
        optimizer.step()
        moved[kind] = (head(x) - before).mean().abs().item()
    assert moved["default"] > 20 * max(moved["batch_norm"], moved["calibrated"]), moved


def test_the_benchmark_writes_every_loss_and_sums_them_up(tmp_path, capsys):
    first_steps = pytest.importorskip("benchmarks.first_steps", reason="segmentation_models_pytorch")
    path = tmp_path / "losses.csv"
    given = ["--networks", "pspnet", "--images", "1", "--seeds", "0", "--steps", "2", "--size", "32"]
    first_steps.main([*given, "--output", str(path)])
    found = list(csv.DictReader(path.open(newline="")))
    assert tuple(found[0]) == first_steps.COLUMNS
    assert [(row["norm"], row["remedy"], row["step"]) for row in found] == [
        (*arm, step) for arm in first_steps.ARMS for step in ("1", "2")
    ]
    assert all(float(row["loss"]) > 0 for row in found)
    by = {(row["norm"], row["remedy"]): float(row["constant"]) for row in found if row["step"] == "1"}
    assert by["batch_norm", ""] < 0.01 < by["kalman_norm", ""]
    assert by["kalman_norm", "centred"] < 0.01
    assert by["batch_norm", "constant added"] > 0.5
    printed = capsys.readouterr().out.splitlines()
    first_steps.main(["--summary", str(path)])
    assert capsys.readouterr().out.splitlines()[1:] == printed
