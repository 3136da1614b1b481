"""The curve of a run, and its random state."""

import random

import lightning
import numpy as np
import torch
from short_trainings import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kalmannorm.lab.curve import Curve, RandomState


class Counted(lightning.LightningModule):
    """Its losses count the batches from 1; its validation logs how many there were."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        self.log("loss", float(self.batches))
        return self.weight.sum() + self.batches

    def validation_step(self, batch, batch_idx):
        self.log("batches", float(self.batches))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def numbers():
    return DataLoader(TensorDataset(torch.arange(12.0)), batch_size=2)


def test_every_step_every_validation_and_what_was_told():
    told = []
    curve = Curve(told.append, every=2)
    quiet_trainer(11, curve, val_check_interval=3).fit(Counted(), numbers(), numbers())
    assert curve.losses == list(range(1, 12))
    assert curve.validations == [{"step": step, "batches": step} for step in (3, 6, 9)]
    # A block ends after two steps, before a validation, and at the end.
    assert told == [2, 3, 5, 6, 8, 9, 11]
    assert len(curve.seconds) == 11
    assert 0 < sum(curve.seconds) < curve.elapsed


def test_a_step_of_accumulated_batches_has_their_mean_loss():
    curve = Curve()
    quiet_trainer(3, curve, accumulate_grad_batches=2).fit(Counted(), numbers())
    # The loss that is differentiated is divided by 2, so that the sum of both is the mean.
    assert curve.losses == [1.5, 3.5, 5.5]


class Draws(lightning.Callback):
    """Draws of each generator in each step; in one of them, a checkpoint."""

    def __init__(self, path, save_after=None):
        self.path, self.save_after, self.drawn = path, save_after, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.drawn.append((torch.rand(1).item(), np.random.rand(), random.random(), random.gauss(0, 1)))  # noqa: NPY002
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


def test_after_resuming_the_draws_and_the_curve_go_on(tmp_path):
    path, step = tmp_path / "run.ckpt", 3
    unbroken, resumed = Draws(path, step), Draws(path)
    curves = [Curve(every=2), Curve(every=2)]
    quiet_trainer(10, curves[0], RandomState(), unbroken).fit(Counted(), numbers())
    torch.rand(5), np.random.rand(5), random.gauss(0, 1)  # noqa: NPY002
    again = Counted()
    again.batches = step
    # In plain types, so that torch loads it without running code from it.
    quiet_trainer(10, curves[1], RandomState(), resumed).fit(again, numbers(), ckpt_path=path, weights_only=True)
    assert resumed.drawn == unbroken.drawn[step:]
    assert curves[1].losses == curves[0].losses == list(range(1, 11))
    assert curves[1].elapsed > 0
