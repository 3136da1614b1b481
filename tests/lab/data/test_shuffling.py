"""The order of images on disk: shared out among processes, and moved on by Lightning, epoch by epoch."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from kalmannorm.lab.data.shuffling import shuffled
from kalmannorm.lab.training import Classifier, quiet_trainer


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch(drop_last):
    processes = [SimpleNamespace(global_rank=rank, world_size=3) for rank in range(3)]
    shares = [list(shuffled(range(11), process, 0, drop_last)) for process in processes]
    assert [len(share) for share in shares] == [3 if drop_last else 4] * 3
    assert len(set().union(*shares)) == (9 if drop_last else 11)


def test_under_a_trainer_each_epoch_has_its_own_order():
    seen = []

    class Watched(Classifier):
        def training_step(self, batch, batch_idx):
            seen.append(batch[1].tolist())
            return super().training_step(batch, batch_idx)

    data = [(torch.zeros(4), label) for label in range(8)]
    loader = DataLoader(data, 8, sampler=shuffled(data, None, 0, drop_last=True))
    quiet_trainer(3).fit(Watched(torch.nn.Linear(4, 8), num_classes=8, rate=0.1, steps=3), loader)
    assert [sorted(labels) for labels in seen] == [list(range(8))] * 3
    assert len(set(map(tuple, seen))) == 3
