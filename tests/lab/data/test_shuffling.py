"""Batches of images on disk: shared out among processes, drawn by epoch and index, and resumed in mid-epoch."""

import itertools
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from kalmannorm.lab.data.shuffling import OrderedBatches, ShuffledBatches

COUNT = 23


class Noted(Dataset):
    """Item ``i`` is ``i`` and a random number; ``read`` lists what was asked for."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor(float(index)), torch.rand(())


def process(rank=0, world=1, accumulated=1):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        global_rank=rank, world_size=world, accumulate_grad_batches=accumulated, strategy=strategy
    )  # fmt: skip


def batches(images=4, trainer=None, epoch=0, seed=0, **options):
    loader = ShuffledBatches(Noted(), images, trainer, seed=seed, **options)
    loader.set_epoch(epoch)
    return loader


def values(loader):
    return [torch.stack(batch, 1).tolist() for batch in loader]


def test_an_epoch_has_whole_gradient_batches_and_no_image_twice():
    found = values(batches())
    assert [len(batch) for batch in found] == [4] * 5
    assert len({index for batch in found for index, _ in batch}) == 20


def test_seed_and_epoch_decide_order_and_draws():
    assert values(batches(epoch=1, seed=3)) == values(batches(epoch=1, seed=3))
    for other in ({"epoch": 2, "seed": 3}, {"epoch": 1, "seed": 4}):
        order, draws = torch.tensor(values(batches(epoch=1, seed=3))), torch.tensor(values(batches(**other)))
        assert not torch.equal(order[..., 0], draws[..., 0])
        # The draws of an image, and not merely those of a place in the order.
        assert not set(order[..., 1].flatten().tolist()) & set(draws[..., 1].flatten().tolist())


def test_draws_are_of_the_image_alone_and_leave_torch_as_it_was():
    before = torch.get_rng_state()
    one_by_one = dict(image for batch in values(batches(1)) for image in batch)
    by_four = dict(image for batch in values(batches(4)) for image in batch)
    assert {index: one_by_one[index] for index in by_four} == by_four
    assert len(set(by_four.values())) == 20
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing():
    assert values(batches(num_workers=2)) == values(batches())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_process_takes_a_slice_of_what_one_takes(accumulated):
    alone = values(batches(8, process(accumulated=accumulated)))
    shares = [values(batches(8, process(rank, 2, accumulated))) for rank in range(2)]
    assert alone == [[*first, *second] for first, second in zip(*shares, strict=True)]
    assert len(alone) == 2 * accumulated


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was_left_and_then_starts_anew(workers):
    left = batches(2, num_workers=workers)
    expected = values(left)
    steps = iter(left)
    for _ in range(3):
        next(steps)
    resumed = batches(2)
    resumed.load_state_dict(left.state_dict())
    assert resumed.state_dict() == left.state_dict() == {"handed_out": 3}
    assert values(resumed) == expected[3:]
    # What was handed out before is not even read.
    assert len(resumed.data.read) == 2 * len(expected[3:])
    assert values(resumed) == expected


def test_the_epoch_may_be_told_after_iter():
    loader = batches(num_workers=2)
    steps = iter(loader)
    loader.set_epoch(5)
    assert values(steps) == values(batches(epoch=5))


@pytest.mark.parametrize(
    ("images", "trainer", "message"), [(24, None, "at most 23.*got 24"), (3, process(0, 2), "multiple of 2.*got 3")]
)
def test_gradient_batches_that_cannot_be_are_refused(images, trainer, message):
    with pytest.raises(ValueError, match=message):
        batches(images, trainer)


def test_scoring_sees_each_image_once_in_whole_batches():
    shares = [OrderedBatches(Noted(), 5, process(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    found = [batch[0].int().tolist() for share in shares for batch in share]
    assert sorted(found) == [list(range(start, min(start + 5, COUNT))) for start in range(0, COUNT, 5)]
    with pytest.raises(ValueError, match="score_batch must be at least 1; got 0"):
        OrderedBatches(Noted(), 0)


class Line(lightning.LightningModule):
    """Draws from torch's own state too, as Mask R-CNN does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        inputs = torch.stack(batch, 1)
        self.seen.append(inputs.tolist())
        return (self.layer(inputs / COUNT) * torch.rand(len(inputs), 1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class KeepState(lightning.Callback):
    """Saves after a step, and keeps torch's random state in the checkpoint."""

    def __init__(self, folder, at):
        self.folder, self.at = folder, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.state = checkpoint["random"]

    def on_train_start(self, trainer, pl_module):
        if hasattr(self, "state"):
            torch.set_rng_state(self.state)


def train(folder, steps, at, workers, resume):
    lightning.seed_everything(1, verbose=False)
    module = Line()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[KeepState(folder, at)],
    )  # fmt: skip
    loader = ShuffledBatches(Noted(), 4, trainer, num_workers=workers)
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if resume else None)
    return module


@pytest.mark.parametrize(("at", "workers"), [*itertools.product([2, 5, 8], [0]), (8, 2)])
def test_a_training_ended_at_any_step_goes_on_bit_for_bit(tmp_path, at, workers):
    """Five steps an epoch: in the first, at its end, and in the second, which starts before its epoch is told."""
    whole = train(tmp_path, 12, 0, workers, resume=False)
    first = train(tmp_path, at, at, workers, resume=False)
    second = train(tmp_path, 12, 0, workers, resume=True)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.layer.weight, whole.layer.weight)
