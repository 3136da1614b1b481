"""Generated volumes: the same from the same seed, apart between splits, and each scanned in its own way."""

from dataclasses import replace

import pytest
import torch

from kalmannorm.lab.data.volumes import SPLITS, Scan, VolumeData, generate_volumes

PLAIN = Scan(texture=0.0, brightness=0.0, contrast=(1.0, 1.0), bias=0.0, noise=(0.0, 0.0))


def test_shapes_and_types():
    volumes, classes = generate_volumes("train", 6, size=16)
    assert volumes.shape == (6, 1, 16, 16, 16)
    assert volumes.dtype == torch.float32
    assert classes.shape == (6, 16, 16, 16)
    assert classes.dtype == torch.int64


def test_each_volume_has_both_kinds_and_much_background():
    _, classes = generate_volumes("train", 12)
    for each in classes:
        shares = each.flatten().bincount(minlength=3) / each.numel()
        assert len(shares) == 3
        assert shares.min() > 0.002
        assert shares[0] > 0.8


def test_the_same_seed_gives_the_same_volumes_and_another_others():
    first, again, other = (generate_volumes("train", 3, 16, seed) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


def test_the_first_ones_are_the_same_whatever_their_count():
    few, many = (generate_volumes("test", count, 16) for count in (2, 4))
    assert all(torch.equal(one, two[:2]) for one, two in zip(few, many, strict=True))


def test_no_volume_is_in_two_splits():
    made = torch.cat([generate_volumes(split, 4, 16)[1] for split in SPLITS]).flatten(1)
    assert len({tuple(each.tolist()) for each in made}) == 12


def test_without_clutter_and_scanner_a_volume_is_its_objects():
    bare = replace(PLAIN, sheets=0, balls=0)
    volumes, classes = generate_volumes("train", 2, scan=bare)
    assert torch.equal(volumes[:, 0], (classes > 0).float())


def test_clutter_is_as_bright_as_the_objects_and_belongs_to_the_background():
    volumes, classes = generate_volumes("train", 2, scan=PLAIN)
    assert set(volumes.unique().tolist()) == {0.0, 1.0}
    assert (volumes[:, 0][classes > 0] == 1).all()
    assert (volumes[:, 0][classes == 0] == 1).any()
    assert torch.equal(generate_volumes("train", 2)[1], classes)  # whatever the scanner


def test_tubes_are_thin_and_reach_from_side_to_side():
    _, classes = generate_volumes("train", 8, scan=replace(PLAIN, ellipsoids=0, tubes=1))
    for tube in classes == 2:
        crossed = [tube.any(a).any(b - 1).all() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert any(crossed)
        assert tube.float().mean() < 0.05


def test_each_volume_has_its_own_brightness_contrast_and_noise():
    volumes = generate_volumes("train", 12)[0].flatten(1)
    assert volumes.mean(1).std() > 0.5
    assert volumes.std(1).max() > 2 * volumes.std(1).min()
    noisy = generate_volumes("train", 1, scan=replace(PLAIN, noise=(0.3, 0.3)))[0]
    plain = generate_volumes("train", 1, scan=PLAIN)[0]
    assert (noisy - plain).std() == pytest.approx(0.3, rel=0.05)


def test_the_data_module_hands_out_three_splits_and_scales_them_together():
    data = VolumeData(1, score_batch=2, train=6, validation=2, test=3, size=16)
    data.setup()
    batches = list(data.train_dataloader())
    assert [classes.shape for _, classes in batches] == [(1, 16, 16, 16)] * 6
    volumes = torch.cat([volumes for volumes, _ in batches])
    assert volumes.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert volumes.std().item() == pytest.approx(1.0, abs=1e-3)
    assert volumes.flatten(1).mean(1).std() > 0.3  # but not each by itself
    assert [len(each) for each, _ in data.val_dataloader()] == [2]
    assert [len(each) for each, _ in data.test_dataloader()] == [2, 1]


def test_standardized_volumes_have_a_mean_and_a_deviation_of_their_own():
    for volumes, _ in VolumeData(train=3, validation=2, test=2, size=16, standardize=True).load():
        assert volumes.flatten(1).mean(1).abs().max() < 1e-5
        assert torch.allclose(volumes.flatten(1).std(1, correction=0), torch.ones(len(volumes)))


def test_the_seed_of_the_order_does_not_change_the_volumes():
    first, second = (VolumeData(train=3, validation=1, test=1, size=16, seed=seed).load() for seed in (0, 1))
    assert torch.equal(first.train[0], second.train[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("exam", 1), "one of train, validation, test; got 'exam'"),
        (("train", 0), "got count=0, size=24"),
        (("train", 1, 6), "got count=1, size=6"),
    ],
)
def test_bad_requests_say_what_was_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        generate_volumes(*given)
