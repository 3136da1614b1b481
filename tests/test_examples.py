"""The examples: each trains, with a prior for every layer, in fewer than 40 lines."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

NAMES = ["lightning_callback", "maskrcnn", "monai_unet3d", "smp_segmentation", "timm_classification"]


def test_each_example_is_tested_and_short():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == NAMES
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 40, path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_every_layer_has_a_prior(name, tmp_path, monkeypatch, capsys):
    """As a script, but in this process: another one would take seconds to import what it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)$", out, re.M)]
    assert len(losses) >= 3
    assert losses[-1] < 0.9 * losses[0], losses
    with_prior, layers = map(int, re.search(r"^(\d+) of (\d+) layers have a prior$", out, re.M).groups())
    assert with_prior == layers > 1
    assert not list(tmp_path.iterdir()), "it left files behind"
