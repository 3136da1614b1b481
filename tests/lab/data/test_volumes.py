"""Generated volumes as a data module; `test_splits` has what they are."""

import pytest
import torch

from kalmannorm.lab.data.volumes import VolumeData, generate_volumes


def test_the_first_volumes_do_not_depend_on_their_number():
    few, more = (generate_volumes("train", count, 16) for count in (2, 4))
    assert all(torch.equal(one, many[:2]) for one, many in zip(few, more, strict=True))


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
