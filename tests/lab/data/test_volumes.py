"""Generated volumes: apart between splits, and those that results were measured on."""

import pytest
import torch

from kalmannorm.lab.data.volumes import VolumeData, generate_volumes


@pytest.mark.parametrize(
    ("split", "seed", "moments", "counts"),
    [
        ("train", 0, [0.69372, 0.67618, 0.68664, 0.65338], [15314, 650, 420]),
        ("validation", 0, [1.10486, 0.88578, 1.09629, 1.10881], [15245, 668, 471]),
        ("test", 0, [-0.00679, 0.98981, -0.04443, -0.00854], [15208, 748, 428]),
        ("train", 1, [0.71337, 0.93325, 0.68744, 0.70137], [15304, 668, 412]),
    ],
)
def test_the_volumes_of_a_split_and_a_seed_stay_what_they_are(split, seed, moments, counts):
    """By the mean and the deviation, the means of two halves, and the voxels of each class, whatever their number."""
    volumes, classes = generate_volumes(split, 4, 16, seed)
    assert volumes.shape == (4, 1, 16, 16, 16)
    assert volumes.dtype == torch.float32
    found = [volumes.mean(), volumes.std(), volumes[:, :, :8].mean(), volumes[..., :8].mean()]
    assert torch.stack(found).tolist() == pytest.approx(moments, abs=1e-3)
    # A voxel at the edge of an object may fall on either side by rounding.
    assert classes.flatten().bincount().tolist() == pytest.approx(counts, abs=3)
    few = generate_volumes(split, 2, 16, seed)
    assert all(torch.equal(one, many[:2]) for one, many in zip(few, (volumes, classes), strict=True))


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
