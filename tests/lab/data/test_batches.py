"""Batches in memory and on disk: shared out among processes, drawn by seed and epoch, and resumed in mid-epoch."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from kalmannorm.lab.data.batches import OrderedBatches, ShuffledBatches
from kalmannorm.lab.data.memory import MemoryBatches

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


def on_disk(gradient_batch=4, trainer=None, epoch=0, seed=0, **options):
    loader = ShuffledBatches(Noted(), gradient_batch, trainer, seed=seed, **options)
    loader.set_epoch(epoch)
    return loader


def in_memory(gradient_batch=4, trainer=None, epoch=0, seed=0, **options):
    """Image ``i`` is noise, by which a crop can be told from others, but for a channel that holds ``i + 1``."""
    images = torch.randint(1, 256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    images[:, 0] = torch.arange(1, COUNT + 1)[:, None, None]
    given = {"prepare": torch.Tensor.float, "drop_last": True, "augment": "none" if seed is None else "crop_flip"}
    labels = torch.arange(COUNT)
    loader = MemoryBatches(images, labels, gradient_batch, trainer, seed=seed, **given | options)
    loader.set_epoch(epoch)
    return loader


def values(loader):
    """Batch by batch, the number of each image, and what was drawn for it."""
    if isinstance(loader, MemoryBatches):
        places = torch.arange(3.0 * 8 * 8).view(3, 8, 8)
        return [
            list(zip(numbers.tolist(), (images * places).sum((1, 2, 3)).tolist(), strict=True))
            for images, numbers in loader
        ]
    return [torch.stack(batch, 1).tolist() for batch in loader]


def numbers(loader):
    return [int(index) for batch in values(loader) for index, _ in batch]


both = pytest.mark.parametrize("batches", [on_disk, in_memory])


@both
def test_an_epoch_has_whole_gradient_batches_and_no_image_twice(batches):
    loader = batches()
    assert [len(batch) for batch in values(loader)] == [4] * 5 == [4] * len(loader)
    assert len(set(numbers(loader))) == 20


@both
def test_seed_and_epoch_decide_order_and_draws(batches):
    first = dict(map(tuple, itertools.chain(*values(batches(epoch=1, seed=3)))))
    assert values(batches(epoch=1, seed=3)) == values(batches(epoch=1, seed=3))
    for other in ({"epoch": 2, "seed": 3}, {"epoch": 1, "seed": 4}):
        assert numbers(batches(**other)) != numbers(batches(epoch=1, seed=3))
        # The draws of an image, and not merely those of a place in the order.
        drawn = dict(map(tuple, itertools.chain(*values(batches(**other)))))
        shared = first.keys() & drawn.keys()
        assert sum(first[index] != drawn[index] for index in shared) > 0.9 * len(shared)


@both
def test_draws_do_not_depend_on_the_batch_and_leave_torch_as_it_was(batches):
    before = torch.get_rng_state()
    one_by_one = dict(map(tuple, itertools.chain(*values(batches(1)))))
    by_four = dict(map(tuple, itertools.chain(*values(batches(4)))))
    assert {index: one_by_one[index] for index in by_four} == by_four
    assert len(set(by_four.values())) == 20
    assert torch.equal(torch.get_rng_state(), before)


@both
@pytest.mark.parametrize("accumulated", [1, 2])
def test_each_process_takes_a_slice_of_what_one_takes(batches, accumulated):
    alone = values(batches(8, process(accumulated=accumulated)))
    shares = [values(batches(8, process(rank, 2, accumulated))) for rank in range(2)]
    assert alone == [[*first, *second] for first, second in zip(*shares, strict=True)]
    assert len(alone) == 2 * accumulated
    assert list(itertools.chain(*alone)) == list(itertools.chain(*values(batches(8))))


@pytest.mark.parametrize(("batches", "workers"), [(on_disk, 0), (on_disk, 2), (in_memory, None)])
def test_a_loader_goes_on_where_it_was_left_and_then_starts_anew(batches, workers):
    left, resumed = batches(2, **({"num_workers": workers} if workers else {})), batches(2)
    expected = values(left)
    steps = iter(left)
    for _ in range(3):
        next(steps)
    resumed.load_state_dict(left.state_dict())
    assert resumed.state_dict() == left.state_dict() == {"handed_out": 3}  # asked again before the first batch
    assert values(resumed) == expected[3:]
    if batches is on_disk:  # what was handed out before is not even read
        assert len(resumed.data.read) == 2 * len(expected[3:])
    assert values(resumed) == expected
    resumed.load_state_dict(resumed.state_dict())  # at the epoch's end nothing is left out of the next
    assert values(resumed) == expected


@both
def test_the_epoch_may_be_told_after_iter_by_a_sampler_as_lightning_does(batches):
    loader = batches()
    steps = iter(loader)
    loader.sampler.set_epoch(5)
    assert loader.sampler.batch_sampler is None
    following = batches(epoch=5)
    assert torch.equal(next(steps)[1], next(iter(following))[1])
    assert len(list(steps)) == len(following) - 1


@both
@pytest.mark.parametrize(
    ("images", "trainer", "message"),
    [
        (24, None, "at most 23.*got 24"),
        (3, process(0, 2), "multiple of 2.*got 3"),
        (0, None, "at least 1; got 0"),
        (24, process(1, 3, 2), "at most 23.*got 24"),
    ],
)
def test_gradient_batches_that_cannot_be_are_refused(batches, images, trainer, message):
    with pytest.raises(ValueError, match=message):
        batches(images, trainer)


def test_without_a_seed_images_come_in_order_as_they_are_and_the_last_ones_too():
    loader = in_memory(seed=None, drop_last=False)
    found = list(loader)
    assert [len(batch) for _, batch in found] == [4] * 5 + [3]
    assert torch.equal(torch.cat([batch for _, batch in found]), torch.arange(COUNT))
    assert torch.equal(torch.cat([images for images, _ in found]), loader.inputs.float())


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_crops_belong_to_their_images(augment):
    found = list(in_memory(augment=augment))
    for images, numbers in found:
        assert images.dtype == torch.float32
        assert torch.equal(images[:, 0].amax((1, 2)), numbers + 1.0)
    black = torch.cat([images for images, _ in found]) == 0
    assert black.any() == (augment != "none")


def test_processes_get_as_many_of_the_last_images():
    alone = values(in_memory(12, drop_last=False))
    parts = [values(in_memory(12, process(rank, 3), drop_last=False)) for rank in range(3)]
    together = [list(itertools.chain(*step)) for step in zip(*parts, strict=True)]
    assert [len(batch) for batch in together] == [12, 9]
    assert together == [alone[0], alone[1][:9]]


@pytest.mark.parametrize(
    ("options", "message"), [({"augment": "blur"}, "'blur'"), ({"augment": "crop", "seed": None}, "needs a seed")]
)
def test_an_augmentation_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        in_memory(**options)


def test_scoring_sees_each_image_once_in_whole_batches():
    shares = [OrderedBatches(Noted(), 5, process(rank, 3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    found = [batch[0].int().tolist() for share in shares for batch in share]
    assert sorted(found) == [list(range(start, min(start + 5, COUNT))) for start in range(0, COUNT, 5)]
    with pytest.raises(ValueError, match="score_batch must be at least 1; got 0"):
        OrderedBatches(Noted(), 0)
