"""Measured beside reported: layout, numbers and files."""

import csv
import io
import math

import pytest

from kalmannorm.lab.recipes import Recipe
from kalmannorm.lab.results import Result
from kalmannorm.lab.tables import (
    Cell,
    as_csv,
    as_markdown,
    format_value,
    grid,
    layout,
    mean_and_deviation,
    steps_to_reach,
    summary,
    with_spread,
)

CONFIG = {
    "model": {"init_args": {"normalization": "kn", "statistics_batch": 2}},
    "data": {"init_args": {"gradient_batch": 128}},
    "trainer": {"max_steps": 20},
}


def result(running, online, validations=()):
    scores = {"accuracy_running": running, "accuracy_online": online}
    return Result({}, scores, 12.0, 0.25, [9.0] * 18 + [1.0, 3.0], list(validations), {})


def cell(place, runs=(), name="t/kn", **computed):
    made = Cell(Recipe(name, CONFIG, place, {}, name), CONFIG, dict(enumerate(runs)))
    made.computed = computed
    return made


SPREAD = {
    "table": "t",
    "row": "KN",
    "column": {"accuracy_running": "moving", "accuracy_online": "online"},
    "reported": {"accuracy_running": 90.9},
}


def test_mean_spread_and_what_is_reported_stand_in_their_place():
    cells = [
        cell(SPREAD, [result(0.90, 0.5), result(0.92, 0.5)]),
        cell({**SPREAD, "row": "BN", "column": "moving", "reported": {"accuracy_running": 89.4}}),
    ]
    order = layout("t", cells)
    assert (order.rows, order.columns) == (["KN", "BN"], ["moving", "online"])
    assert grid(cells, order) == [
        ["", "moving", "online"],
        ["KN", "91.00 ± 1.41 (90.9)", "50.00 ± 0.00"],
        ["BN", "- (89.4)", ""],
    ]


def test_the_papers_order_of_rows_and_columns():
    cells = [
        cell({"table": "table8", "row": row, "column": "Inception, SVHN"}) for row in ("KN (bs = 2)", "BN (bs = 2)")
    ]
    assert layout("table8", cells).rows == ["BN (bs = 2)", "KN (bs = 2)"]
    assert layout("table8", cells).title.startswith("Table 8")


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


def test_computed_numbers_are_shown_as_they_are():
    shown = cell({"table": "t", "row": "KN", "column": "c", "reported": {"parameters": 11.3}}, parameters=11.295309)
    assert grid([shown], layout("t", [shown]))[1] == ["KN", "11.30 (11.3)"]


def test_steps_to_reach_a_goal():
    run = result(0.5, 0.5, [{"step": step, "accuracy_running": step / 100} for step in (10, 20, 30)])
    assert steps_to_reach(run, "accuracy_running", 0.2) == 20
    assert steps_to_reach(run, "accuracy_running", 0.31) is None
    assert steps_to_reach(run, "box_ap", 0.0) is None


def test_a_line_a_run_and_one_for_each_reason():
    made = cell(SPREAD, [result(0.9, 0.5), result(0.92, 0.5)])
    made.reached = {0: 30, 1: None}
    made.problems.append("seed 2 failed: no")
    rows = list(csv.DictReader(io.StringIO(as_csv([made], "0.05"))))
    assert [(row["seed"], row["status"], row["scale"]) for row in rows] == [
        ("0", "finished", "0.05"),
        ("1", "finished", "0.05"),
        ("", "not run", "0.05"),
    ]
    assert [row["steps_to_baseline"] for row in rows] == ["30", "", ""]
    assert float(rows[1]["accuracy_running"]) == 0.92
    assert rows[2]["problem"] == "seed 2 failed: no"
    assert rows[0]["gradient_batch"] == "128"


def test_the_summary_has_the_last_tenth_of_the_loss():
    made = cell(SPREAD, [result(0.9, 0.5)])
    header, row = summary([made, cell(SPREAD)])
    assert header[2:4] == ["accuracy running, %", "accuracy online, %"]
    assert row == ["t/kn", "1", "90.00", "50.00", "-", "2.000", "250.0"]


def test_markdown_is_aligned():
    assert as_markdown([["", "a"], ["row", "1"]]) == "|     | a |\n|-----|---|\n| row | 1 |\n"
