"""Sets that ship with scikit-learn: apart between splits, the same again, and scaled by what is trained on."""

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

from kalmannorm.lab.data.signals import SignalData, load_set


def test_a_digit_is_read_row_by_row_and_a_measurement_as_it_is():
    inputs, labels = load_set("digits")
    digits = load_digits()
    assert inputs[7, 0].view(8, 8).tolist() == digits.images[7].tolist()
    assert labels[7] == digits.target[7]
    assert load_set("breast_cancer")[0][3].tolist() == pytest.approx(load_breast_cancer().data[3].tolist())


def test_a_smaller_validation_split_leaves_the_test_as_it_is():
    splits = [SignalData("digits", validation=count).load() for count in (10, 400)]
    assert torch.equal(splits[0].test[0], splits[1].test[0])
