"""A run that is killed again and again ends as one that was left alone."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from short_trainings import assert_same, fit_forked

from kalmannorm.lab.experiments import merge
from kalmannorm.lab.fitting import fit
from kalmannorm.lab.training import Classifier

KILLS = 2


def kill_after_a_checkpoint(process, checkpoint, draw):
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    end = time.monotonic() + 60
    while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kn-paper", "mabn"])
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(images, config, tmp_path, method):
    """With "kn-paper", whose draws follow torch's generator; and with "mabn", whose layers remember past steps."""
    config["model"]["init_args"]["normalization"] = method
    config["trainer"]["max_steps"] = 36
    unbroken = fit(config, tmp_path / "unbroken")
    context, draw = multiprocessing.get_context("forkserver"), random.Random(method)
    broken = tmp_path / "broken"
    for _ in range(KILLS):
        process = context.Process(target=fit_forked, args=(dict(os.environ), config, broken))
        process.start()
        kill_after_a_checkpoint(process, broken / "last.ckpt", draw)
        assert process.exitcode == -signal.SIGKILL
        assert not (broken / "result.json").exists()
    resumed = fit(config, broken)
    same(resumed, unbroken)
    assert len(resumed.losses) == 36
    assert [each["step"] for each in resumed.validations] == list(range(6, 37, 6))
    ours, theirs = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("unbroken", "broken"))
    assert ours["global_step"] == theirs["global_step"] == 36
    assert_same(ours["state_dict"], theirs["state_dict"])


@pytest.mark.parametrize(
    ("every", "method", "step"),
    [(4, "training_step", 5), (6, "training_step", 7), (7, "training_step", 8), (6, "on_validation_epoch_end", 12)],
)
def test_a_checkpoint_of_any_step_leads_to_the_same_end(
    images, unbroken, config, tmp_path, monkeypatch, every, method, step
):
    """Within an epoch (of 6 steps) and at its end, with a validation at the same step and without; and a validation
    that was cut short is repeated.
    """
    config["checkpoint_every"] = every
    break_off(monkeypatch, method, step, config, tmp_path / "broken")
    assert (tmp_path / "broken" / "last.ckpt").exists()
    same(fit(config, tmp_path / "broken"), unbroken)


def test_a_run_that_has_ended_is_made_longer(images, config, tmp_path):
    """Where the rate does not depend on the number of steps, it is the longer one bit for bit."""
    config["model"]["init_args"] |= {"schedule": "milestones", "milestones": {0: 1.0}}
    longer = merge(config, {"trainer": {"max_steps": 28}})
    short = fit(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration: trainer\.max_steps is 20 there; got 28"):
        fit(longer, tmp_path / "run")
    with pytest.raises(ValueError, match=r"init_args\.rate is 0\.05 there; got 0\.1"):
        fit(merge(longer, {"model": {"init_args": {"rate": 0.1}}}), tmp_path / "run", longer=True)
    assert fit(config, tmp_path / "run", longer=True) == short
    same(fit(longer, tmp_path / "run", longer=True), fit(longer, tmp_path / "whole"))
    assert fit(longer, tmp_path / "run").losses[:20] == short.losses


def break_off(monkeypatch, method, step, config, folder):
    """Run until after so many steps a method of the classifier fails."""
    original = getattr(Classifier, method)

    def fails(self, *args):
        if self.trainer.global_step == step:
            raise RuntimeError("broken off")
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Classifier, method, fails)
        with pytest.raises(RuntimeError, match="broken off"):
            fit(config, folder)


def same(resumed, unbroken):
    assert resumed.losses == unbroken.losses
    assert resumed.validations == unbroken.validations
    assert resumed.scores == unbroken.scores
