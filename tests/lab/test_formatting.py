"""Numbers over seeds, and tables, as text."""

import math

import pytest

from kalmannorm.lab.formatting import as_markdown, format_value, mean_and_deviation, with_spread


def test_numbers_have_their_unit():
    assert format_value("parameters", [11.295309]) == "11.30"
    assert format_value("images_per_second_bn", [1325.741]) == "1,325.74"
    assert format_value("ratio", [1.0149]) == "1.015"
    assert format_value("steps_to_baseline", [170000.0, 160000.0]) == "165,000 ± 7,071"
    assert format_value("accuracy_running", []) == "-"


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_shown_and_end_nothing(wrong):
    mean, deviation = mean_and_deviation([wrong, 1.0])
    assert str(mean) == str(wrong)
    assert math.isnan(deviation)
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_deviation([2.0]) == (2.0, 0.0)
    assert format_value("ratio", [wrong, 1.0]) == with_spread([wrong, 1.0], 3) == f"{wrong} ± nan"


def test_markdown_is_aligned():
    assert as_markdown([["", "a"], ["row", "1"]]) == "|     | a |\n|-----|---|\n| row | 1 |\n"
    assert as_markdown([["|x|", "a"]]).splitlines()[0] == r"| \|x\| | a |"
