"""Tensors in memory as a data module: what is scaled by what, and who gets which batches."""

import pytest
import torch

from kalmannorm.lab.data.memory import MemoryData, Splits


class Counted(MemoryData):
    """Inputs ``(N, 2, 3)`` that are easy to recognize."""

    def __init__(self, *args, shift=0.0, **options):
        super().__init__(*args, **{"score_batch": 4} | options)
        self.shift, self.loaded = shift, 0

    def load(self):
        self.loaded += 1
        parts = []
        for first, count in ((0, 10), (10, 6), (16, 5)):
            numbers = torch.arange(first, first + count)
            shift = self.shift if first else 0.0
            parts.append((numbers[:, None, None] * torch.tensor([[1.0], [-5.0]]).expand(2, 3) + shift, numbers))
        return Splits(*parts)


def test_each_split_is_handed_out_by_its_own_loader_and_loaded_once():
    data = Counted(3, seed=5)
    data.setup()
    data.setup("test")
    assert data.loaded == 1
    assert data.train_dataloader().seed == 5
    found = [[label for _, labels in loader() for label in labels.tolist()]
             for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]  # fmt: skip
    assert len(set(found[0])) == 9
    assert set(found[0]) <= set(range(10))
    assert found[1:] == [list(range(10, 16)), list(range(16, 21))]


def test_channels_are_scaled_by_what_is_trained_on():
    data, shifted = Counted(10), Counted(10, shift=50.0)
    for each in (data, shifted):
        each.setup()
        inputs, _ = next(iter(each.train_dataloader()))
        assert torch.allclose(inputs.mean((0, 2)), torch.zeros(2), atol=1e-6)
        assert torch.allclose(inputs.std((0, 2), correction=0), torch.ones(2), atol=1e-6)
    plain, moved = (next(iter(each.val_dataloader()))[0] for each in (data, shifted))
    assert (moved - plain > 1).all()


def test_it_has_to_be_set_up_first():
    with pytest.raises(RuntimeError, match="call setup"):
        Counted(2).train_dataloader()
