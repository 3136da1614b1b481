"""Short trainings for tests."""

import lightning
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from kalmannorm.lab.training import quiet


def loader(images, labels, batch_size, seed=None):
    """Batches of tensors in memory: shuffled by ``seed`` and of equal size, or in order if that is None."""
    data = TensorDataset(images, labels)
    if seed is None:
        return DataLoader(data, batch_size)
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    # A sampler of whole batches: one indexing a batch instead of one an image and a stack of them.
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=True), batch_size=None)


def quiet_trainer(steps, *callbacks, **options):
    """A Trainer for many short runs: it stops after ``steps``, saves nothing and prints nothing."""
    quiet()
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": list(callbacks),
    }
    return lightning.Trainer(**(settings | options))
