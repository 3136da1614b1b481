"""Batches from memory: each image once an epoch, and the same again under the same seed and epoch."""

import pytest
import torch

from kalmannorm.lab.data.memory import MemoryBatches


def batches(count=10, batch_size=4, **options):
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8).contiguous()
    return MemoryBatches(images + 1, torch.arange(count), batch_size, prepare=torch.Tensor.float, **options)


def labels(loader):
    return [label for _, batch in loader for label in batch.tolist()]


def same(first, second):
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_without_a_seed_they_come_in_order():
    loader = batches()
    assert [len(batch) for _, batch in loader] == [4, 4, 2]
    assert labels(loader) == list(range(10))
    images, numbers = next(iter(loader))
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0, 0, 0], numbers + 1.0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_image_comes_once_an_epoch_but_for_what_is_dropped(drop_last):
    loader = batches(seed=0, drop_last=drop_last)
    seen = labels(loader)
    assert len(list(loader)) == len(loader) == (2 if drop_last else 3)
    assert len(set(seen)) == len(seen) == (8 if drop_last else 10)


def test_seed_and_epoch_decide_order_and_crops():
    loaders = [batches(30, seed=seed, augment="crop_flip") for seed in (3, 3, 4)]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert same(loaders[0], loaders[1])
        assert labels(loaders[0]) != labels(loaders[2])
    late = list(loaders[0])
    loaders[0].set_epoch(0)
    assert not same(loaders[0], late)


def test_crops_belong_to_their_images():
    for images, numbers in batches(30, seed=0, augment="crop"):
        inked = images.amax((1, 2, 3))
        assert torch.equal(inked, numbers + 1.0)
        assert (images == 0).any()


def test_a_loader_goes_on_where_it_was_left_and_then_starts_anew():
    left, resumed = (batches(30, seed=5, augment="crop_flip") for _ in range(2))
    expected = list(left)
    steps = iter(left)
    for _ in range(3):
        next(steps)
    resumed.load_state_dict(left.state_dict())
    assert same(resumed, expected[3:])
    assert same(resumed, expected)


def test_at_an_epochs_end_nothing_is_left_out_of_the_next():
    left, resumed = batches(seed=0), batches(seed=0)
    assert len(list(left)) == 3
    resumed.load_state_dict(left.state_dict())
    assert len(list(resumed)) == 3


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_take_neighbouring_slices_of_what_one_would_take(drop_last):
    options = {"seed": 0, "augment": "crop", "drop_last": drop_last}
    alone = list(batches(29, 12, **options))
    parts = [list(batches(29, 4, rank=rank, replicas=3, **options)) for rank in range(3)]
    together = [[torch.cat(tensors) for tensors in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert [len(numbers) for _, numbers in together] == ([12, 12] if drop_last else [12, 12, 3])
    for (images, numbers), (expected, expected_numbers) in zip(together, alone, strict=drop_last):
        assert torch.equal(images, expected[: len(images)])
        assert torch.equal(numbers, expected_numbers[: len(numbers)])


def test_accumulated_batches_make_whole_gradient_steps():
    alone, parts = batches(29, 12, seed=0, drop_last=True), batches(29, 4, seed=0, drop_last=True, accumulated=3)
    assert labels(parts) == labels(alone)
    assert [len(batch) for _, batch in parts] == [4] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "blur", "seed": 0}, "'blur'"),
        ({"augment": "crop"}, "needs a seed"),
        ({"batch_size": 0}, "1 to 10.*got 0"),
        ({"batch_size": 11, "drop_last": True}, "1 to 10.*got 11"),
        ({"batch_size": 2, "replicas": 3, "accumulated": 2, "drop_last": True}, "1 to 10 images.*got 12"),
    ],
)
def test_bad_requests_say_what_was_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
