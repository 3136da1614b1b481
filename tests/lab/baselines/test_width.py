"""Width-compensated BatchNorm."""

import pytest
import torch
from torch import nn

import kalmannorm
from kalmannorm.lab.baselines.width import matching_width, parameter_count
from kalmannorm.lab.models.small import SmallConvNet


def wide(width):
    return SmallConvNet(((round(20 * width), 2), (round(40 * width), 2)))


@pytest.fixture(scope="module")
def counts():
    """Of networks of many widths."""
    with torch.device("meta"):
        return [parameter_count(wide(step / 100)) for step in range(5, 400)]


@pytest.mark.parametrize("parameters", [100, 3_000, 8_450, 9_000, 40_000])
def test_no_other_width_is_nearer(parameters, counts):
    found = abs(parameter_count(wide(matching_width(wide, parameters))) - parameters)
    assert found == min(abs(count - parameters) for count in counts)


def test_for_a_kalman_network():
    kalman = kalmannorm.convert(wide(1.0), process_noise=True)
    count = parameter_count(kalman)
    assert count == parameter_count(wide(1.0)) + 20 + 40 + 2
    assert abs(parameter_count(wide(matching_width(wide, count))) - count) <= 62


def test_a_count_out_of_reach_raises():
    with pytest.raises(ValueError, match="matching_width got 5 parameters to match, expected a count from 110"):
        matching_width(lambda width: nn.Linear(10, 10), 5)
