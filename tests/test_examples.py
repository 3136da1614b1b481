"""The examples: each trains, with a prior for every layer, in fewer than 40 lines."""

import os
import re
import subprocess
import sys
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
def test_the_loss_falls_and_every_layer_has_a_prior(name, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::UserWarning:kalmannorm", str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)$", done.stdout, re.M)]
    assert len(losses) >= 3
    assert losses[-1] < 0.9 * losses[0], losses
    with_prior, layers = map(int, re.search(r"^(\d+) of (\d+) layers have a prior$", done.stdout, re.M).groups())
    assert with_prior == layers > 1
    assert not list(tmp_path.iterdir()), "it left files behind"
