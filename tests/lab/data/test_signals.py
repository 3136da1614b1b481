"""Sets that ship with scikit-learn: apart between splits, the same again, and scaled by what is trained on."""

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

from kalmannorm.lab.data.signals import SETS, SignalData, load_set

every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_sets_are_as_they_are_said_to_be(name):
    count, classes, shape = SETS[name]
    inputs, labels = load_set(name)
    assert inputs.shape == (count, *shape)
    assert inputs.dtype == torch.float32
    assert labels.shape == (count,)
    assert sorted(set(labels.tolist())) == list(range(classes))


def test_a_digit_is_read_row_by_row_and_a_measurement_as_it_is():
    inputs, labels = load_set("digits")
    digits = load_digits()
    assert inputs[7, 0].view(8, 8).tolist() == digits.images[7].tolist()
    assert labels[7] == digits.target[7]
    assert load_set("breast_cancer")[0][3].tolist() == pytest.approx(load_breast_cancer().data[3].tolist())


@every_set
@pytest.mark.parametrize("split_seed", [0, 3])
def test_splits_are_disjoint_and_make_up_the_set(name, split_seed):
    splits = SignalData(name, split_seed=split_seed, validation=50, test=60).load()
    assert [len(labels) for _, labels in splits] == [SETS[name][0] - 110, 50, 60]
    parts = [{tuple(each.flatten().tolist()) for each in inputs} for inputs, _ in splits]
    everything = {tuple(each.flatten().tolist()) for each in load_set(name)[0]}
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(everything) == SETS[name][0]


@every_set
def test_splits_follow_from_their_seed_and_not_from_that_of_the_order(name):
    first, again, other = (
        SignalData(name, split_seed=split_seed, seed=seed).load() for split_seed, seed in ((0, 0), (0, 5), (1, 0))
    )
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert not torch.equal(one[0], three[0])


def test_a_smaller_validation_split_leaves_the_test_as_it_is():
    splits = [SignalData("digits", validation=count).load() for count in (10, 400)]
    assert torch.equal(splits[0].test[0], splits[1].test[0])
