"""kalmannorm layers: a trained network's table."""

import re

import pytest
import yaml

from kalmannorm.lab import fitting
from kalmannorm.lab.analysis import prior_errors, variance_gaps
from kalmannorm.lab.cli import main
from kalmannorm.lab.rows import read_table


@pytest.fixture
def run(images, short, tmp_path):
    fitting.fit(short, tmp_path / "run")
    return tmp_path / "run"


def test_the_table_is_of_the_networks_layers(run, tmp_path, capsys):
    path = tmp_path / "out" / "layers.csv"
    assert main(["layers", "--run", str(run), "--batches", "3", "--output", str(path)]) == 0
    rows = read_table(path).to_dict("records")
    module, data = fitting.load_with_data(run)
    batches = next(iter(data.val_dataloader()))[0].split(2)[:3]
    expected = prior_errors(module.network, batches)
    assert [(row["layer"], row["estimate"], row["reference"]) for row in rows] == [error[:3] for error in expected]
    for row, error in zip(rows, expected, strict=True):
        assert float(row["log_ratio"]) == pytest.approx(error.log_ratio, rel=1e-4)
    gaps = variance_gaps(module.network, batches)
    found = {row["layer"]: float(row["variance_gap"]) for row in rows if row["estimate"] == "posterior"}
    assert len(found) == len(gaps) - 1  # the first layer has no prior
    for name, gap in found.items():
        running = module.network.get_submodule(name).running_var
        assert gap == pytest.approx(float(gaps[name].mean() / running.mean()), rel=1e-4)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


@pytest.mark.parametrize("kind", ["corrected", "uncorrected"])
def test_a_converted_network_scores_in_eval_as_it_did(run, capsys, kind):
    scores = fitting.score(run, "validation")
    assert main(["layers", "--run", str(run), "--batches", "1", "--convert", kind]) == 0
    found = dict(re.findall(r"^(accuracy_\w+) (\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert found.keys() == scores.keys()
    assert found["accuracy_running"] == f"{scores['accuracy_running']:.4f}"


def test_a_run_without_a_statistics_batch_is_refused(run, refused):
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["statistics_batch"] = None
    path.write_text(yaml.safe_dump(config))
    refused(["layers", "--run", run], "statistics_batch=None")
    refused(["layers", "--run", run, "--batches", "0"], "--batches: expected at least 1; got 0")
    refused(["layers", "--run", run, "--statistics_batch", "-1"], "--statistics_batch: expected at least 1; got -1")
