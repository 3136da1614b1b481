"""The benchmarks run, and their tables and figures say what their CSV says. What they measure here means nothing."""

import argparse
import csv
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    cases,
    command,
    figures,
    goals,
    memory,
    networks,
    overhead,
    plot,
    profiling,
    rows,
    sides,
    tables,
    throughput,
    timing,
)  # fmt: skip
from benchmarks.environment import KEEPING
from benchmarks.steps import step_of
from kalmannorm.kernels import on_cpu

ROOT = Path(__file__).parent.parent
QUICK = ["--tiny", "--device", "cpu", "--steps", "2", "--warm-up", "1", "--backend", "aot_eager"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every kind of case, through the command itself."""
    path = tmp_path_factory.mktemp("speed") / "cpu.csv"
    environment = {name: value for name, value in os.environ.items() if name not in KEEPING}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *QUICK, "--output", str(path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def row(case, method="kalman_norm", device="cuda", **values):
    """A row of the CSV as it is read, of a case by its name."""
    empty = dict.fromkeys(rows.COLUMNS)
    return {**empty, "case": case, "method": method, "device": device, "kind": case.split("/")[0], **values}


def test_a_commit_that_looks_like_a_number_stays_what_it_is(tmp_path):
    path = tmp_path / "some.csv"
    for commit in ("3e69644", "0123456"):
        rows.append(path, [{"case": f"of {commit}", "method": "none", "commit": commit, "size": 32, "median_ms": 1.5}])
    found = rows.read(path)
    assert [row["commit"] for row in found] == ["3e69644", "0123456"]
    assert (found[0]["size"], found[0]["median_ms"], found[0]["dirty"]) == (32, 1.5, None)


def test_every_kind_of_case_has_its_numbers(measured):
    assert rows.header(measured) == rows.COLUMNS
    found = rows.read(measured)
    assert {row["case"] for row in found} == {case.name for case in cases.cases("cpu", tiny=True)}
    for line in found:
        assert line["device"] == "cpu"
        assert line["threads"] == 1
        assert line["allocator"] == "glibc 4294967296/4294967296"
        if line["error"]:
            assert line["error"].startswith("skipped: ")
            assert line["median_ms"] is None
            continue
        assert line["steps"] == 2
        assert line["quartile_1_ms"] <= line["median_ms"] <= line["quartile_3_ms"]
        assert (line["ratio_to_batch_norm"] is None) == (line["kind"] == "copy")
        assert (line["compile_s"] is not None) == (line["mode"] == "compiled")
        assert (line["share_of_copy"] is not None) == (line["network"] in ("layer", "copy"))
        if line["method"] == "batch_norm":
            assert line["ratio_to_batch_norm"] == 1
        if line["kind"] == "step":
            parts = line["forward_ms"] + line["backward_ms"] + line["optimizer_ms"]
            assert parts == pytest.approx(line["median_ms"], rel=0.5)
            assert line["peak_bytes"] > line["saved_bytes"] > 0


def test_what_cannot_run_here_is_a_row_and_the_rest_goes_on(measured):
    errors = {(line["case"].split("/")[1], line["method"]): line["error"] for line in rows.read(measured)}
    assert errors["absent", "kalman_norm"] == "skipped: no network 'absent'"
    assert errors["n2-c8-8x8", "sync_batch_norm"] == "skipped: torch's SyncBatchNorm is for GPUs"
    assert errors["n2-c8-8x8", "group_norm"] is None


def test_a_side_that_fails_is_told_from_one_that_is_skipped(tmp_path, monkeypatch):
    def fail(model, case):
        raise RuntimeError("broken\nat length")

    monkeypatch.setitem(sides.SIDES, "kalman_norm", sides.Side(fail))
    path = tmp_path / "speed.csv"
    given = [*QUICK, "--output", str(path), "--only", "inference/*"]
    assert command.main(given) == 1
    theirs, deployed, ours, *_ = rows.read(path)
    assert ours["error"] == "RuntimeError: broken"
    assert ours["median_ms"] is None
    assert theirs["ratio_to_batch_norm"] == 1
    assert deployed["ratio_to_batch_norm"] > 0
    assert command.main([*given, "--resume"]) == 0  # it has its row


def test_names_and_columns_that_are_not_there(tmp_path):
    path = tmp_path / "speed.csv"
    with pytest.raises(ValueError, match="no case is called nothing"):
        command.main([*QUICK, "--output", str(path), "--only", "nothing"])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.append(path, [{}])


def test_the_last_row_of_a_case_and_method_counts(tmp_path):
    path = tmp_path / "speed.csv"
    for milliseconds in (3.0, 1234.5678):
        rows.append(path, [{"case": "a", "method": "b", "median_ms": milliseconds}])
    (line,) = rows.read(path)
    assert line["median_ms"] == 1235


def test_goals_are_of_cases_that_are_measured():
    for goal in goals.GOALS:
        methods = {case.name: case.methods for case in cases.cases(goal.device)}
        for case in goal.cases:
            assert goal.method in methods[case]
            assert (goal.over or "batch_norm") in methods[case]


def test_names_are_of_one_case_each():
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases.cases(device, everything=True)]
        assert len(names) == len(set(names))
        assert set(cases.cases(device)) <= set(cases.cases(device, everything=True))
    assert all(case.memory_format == "channels_last" for case in cases.cases("cuda") if case.network == "resnet50")


def test_goals_take_the_case_that_counts():
    either = goals.Goal("", "cuda", ("step/a", "step/b"), 1.0)
    both = either._replace(in_all=True)
    found = [row("step/a", ratio_to_batch_norm=0.9), row("step/b", ratio_to_batch_norm=1.2)]
    assert goals.value(either, found) == (0.9, "step/a")
    assert goals.value(both, found) == (1.2, "step/b")
    assert goals.value(both, found[:1]) == (None, None)
    assert goals.value(either, [row("step/a", device="cpu", ratio_to_batch_norm=0.9)]) == (None, None)
    assert goals.is_met(either, 0.9)
    assert not goals.is_met(both, 1.2)


def test_goals_of_memory_and_of_two_methods():
    found = [
        row("step/a", "batch_norm", peak_bytes=100, median_ms=1.0), row("step/a", peak_bytes=110, median_ms=2.0),
        row("step/a", "kalman_norm_loop", median_ms=50.0),
    ]  # fmt: skip
    memory_goal = goals.Goal("", "cuda", ("step/a",), 1.0, "peak")
    speed_goal = goals.Goal("", "cuda", ("step/a",), 20, over="kalman_norm_loop")
    assert goals.value(memory_goal, found) == (1.1, "step/a")
    assert goals.value(speed_goal, found) == (25, "step/a")
    assert goals.is_met(speed_goal, 25)
    assert speed_goal.wanted == "at least 20.00"


def test_the_page_keeps_its_words_and_gets_tables_and_figures(measured, tmp_path):
    page, folder = tmp_path / "speed.md", tmp_path / "figures"
    before = (ROOT / "docs" / "speed.md").read_text()
    page.write_text(before)
    profile = tmp_path / "profile.csv"
    profile.write_text("case,method\n")
    given = [str(measured), str(profile), "--page", str(page), "--figures", str(folder)]
    plot.main(given)
    once = page.read_text()
    pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = ("steps", "layers", "groups", "growth", "memory", "inference")
    assert set(pictures) == {f"cpu-{name}.svg" for name in names}
    for name, content in pictures.items():
        assert b"</svg>" in content
        assert f"(figures/{name})" in once
    for line in before.split("<!-- cpu -->")[0].splitlines():
        assert line in once
    (line,) = (line for line in once.splitlines() if line.startswith("| cifar_resnet8 | 2 | 16 | eager | bfloat16 |"))
    ours = {row["case"]: row for row in rows.read(measured) if row["method"] == "kalman_norm"}
    ratio = ours["step/cifar_resnet8/b2/16/eager/bfloat16"]["ratio_to_batch_norm"]
    assert f"| {ratio:.2f} (" in line
    assert once.count("not measured") >= len(goals.GOALS)
    plot.main(given)
    assert page.read_text() == once
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == pictures


def test_a_page_without_a_place_for_a_table():
    with pytest.raises(ValueError, match="no place for 'cpu'"):
        plot.fill("<!-- cuda -->", "cpu", "")


def test_goals_are_drawn_where_they_belong():
    case = "step/resnet50/b32/224/eager/bfloat16"
    side = {"median_ms": 1.0, "ratio_to_batch_norm": 1.0, "ratio_quartile_1": 1.0, "ratio_quartile_3": 1.0}
    drawn = figures.ratios([row(case, "batch_norm", **side), row(case, **side)], "step", "").axes[0]
    bars = [line.get_xdata()[0] for line in drawn.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert bars == [1.3]
    assert figures.ratios([], "step", "") is None


def test_what_a_layer_adds():
    side = {"median_ms": 4.0, "ratio_to_batch_norm": 1.5, "depth": 8}
    assert tables.extra_a_layer({"batch_norm": {"median_ms": 4.0}, "kalman_norm": side}) == pytest.approx(250)


def test_sides_take_turns():
    order = []
    steps = {name: lambda mark, name=name: order.append(name) for name in "abc"}
    readings = timing.in_turn(steps, 3)
    assert "".join(order) == "abccbaabc"
    assert all(len(taken) == 3 for taken in readings.values())
    order.clear()
    timing.in_turn(steps, 100, seconds=0)
    assert len(order) == 3 * timing.FEWEST_STEPS


def test_a_ratio_is_the_median_of_rounds():
    ours, theirs = [{"step": 2.0}, {"step": 30.0}, {"step": 3.0}], [{"step": 1.0}, {"step": 10.0}, {"step": 3.0}]
    found = timing.summary(ours, theirs)
    assert found["ratio_to_batch_norm"] == 2
    assert found["ratio_of_medians"] == 1
    assert found["median_ms"] == 3


def test_parts_are_summed_and_averaged_over_repeats():
    def step(mark):
        for part in ("forward", "backward", "forward"):
            mark(part)

    reading = timing.read_cpu(step, 4)
    assert list(reading) == ["step", "forward", "backward"]
    assert reading["step"] >= reading["forward"] + reading["backward"] > 0


def test_saved_bytes_are_counted_once_and_without_parameters():
    x, weight = torch.randn(100), torch.randn(100, requires_grad=True)
    # sin keeps its input, a product both factors: the product of x and weight, and x.
    assert memory.saved_bytes(lambda mark: ((weight * x).sin() * x).sum(), [weight]) == 2 * 400


def test_the_peak_is_of_what_is_there_at_once():
    def step(mark):
        for _ in range(3):
            torch.empty(1000)

    assert 4000 <= memory.peak_cpu(step, [torch.empty(10)]) - 40 < 3 * 4000


def test_layers_alone_have_a_prior():
    import kalmannorm as kn

    (case,) = (case for case in cases.cases("cpu", tiny=True) if case.name == "layer/n2-c8-8x8/eager/float32")
    for method in ("kalman_norm", "kalman_norm_act"):
        model = sides.SIDES[method].convert(networks.build(case), case)
        description = kn.describe(model, networks.batch(case, "cpu")[0])
        assert "1 of 1 layers have a prior" in str(description)


def test_pieces_give_the_gradients_of_the_whole_batch():
    """The loop does the same work: with a norm that looks at each sample alone, the very same."""
    found = []
    for pieces in (False, True):
        case = cases.Case("groups", "cifar_resnet8", 4, 16, (), stats_batch=2)
        kept = []

        def convert(model, case, kept=kept):
            kept.append(sides.SIDES["group_norm"].convert(model, case))
            return kept[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sides.SIDES, "tried", sides.Side(convert, in_pieces=pieces))
            step, _ = step_of(case, "tried", "cpu")
        step(lambda part: None)
        found.append(nn.utils.parameters_to_vector(kept[0].parameters()))
    torch.testing.assert_close(*found)


def test_the_overhead_of_a_step_by_part(tmp_path):
    path, page = tmp_path / "overhead.csv", tmp_path / "page.md"
    page.write_text("before\n<!-- overhead -->\n<!-- /overhead -->\nafter\n")
    for _ in range(2):  # the second time rows take the place of the first's
        overhead.main(["--cases", "tiny", "--seconds", "0.3", "--device", "cpu", "--output", str(path),
                       "--page", str(page)])  # fmt: skip
    theirs, ours = csv.DictReader(path.read_text().splitlines())
    assert (theirs["method"], ours["method"]) == ("batch_norm", "kalman_norm")
    assert (float(theirs["ratio"]), float(ours["ratio"]) > 0) == (1, True)
    parts = ["network_ms", *(f"{part.replace(' ', '_')}_ms" for part in overhead.PARTS)]
    for line in (theirs, ours):
        assert sum(float(line[name]) for name in parts) == pytest.approx(float(line["ms"]), rel=0.01)
    assert float(theirs["network_ms"]) == pytest.approx(float(theirs["ms"]), rel=0.01)
    assert float(ours["layer_and_link_ms"]) > 0
    assert page.read_text().count("| KN |") == 1


def test_a_layer_takes_no_more_calls_than_it_did():
    """Half of the cost of a layer is Python's, and hardly a change of the code shows in a timing."""

    def calls(depth):
        case = cases.Case("chain", "chain", 2, 4, cases.PAIR, channels=4, depth=depth)
        step, _ = step_of(case, "kalman_norm", "cpu")
        step(lambda part: None)
        seen = []

        def see(frame, event, _):
            if event == "call" and frame.f_code.co_filename.startswith(overhead.HOME):
                seen.append(frame.f_code.co_qualname)

        sys.setprofile(see)
        try:
            step(lambda part: None)
        finally:
            sys.setprofile(None)
        return Counter(seen)

    each = calls(4) - calls(3)
    most = 216 if on_cpu.is_available() else 246  # without a C compiler, torch's functions compute
    assert 0 < sum(each.values()) <= most, each.most_common()


def test_where_a_frame_is_counted():
    frames, space = {}, {}
    exec(compile("def f(note):\n    note()\n", f"{overhead.HOME}propagation.py", "exec"), space)
    space["f"](lambda: frames.update(here=sys._getframe()))
    assert overhead.part_of(frames["here"]) == "evaluation"
    assert overhead.part_of(sys._getframe()) == "network"


@pytest.mark.parametrize(("network", "samples"), [("deeplabv3", 2), ("maskrcnn", 1), ("resnet50_wide", 2)])
def test_workloads_of_few_images_run(network, samples):
    """Where a graph is captured, it is on a GPU: here the sides run as they are."""
    case = cases.Case("step", network, samples, 64, cases.GRAPHS)
    for method in ("batch_norm", "kalman_norm_captured"):
        step, _ = step_of(case, method, "cpu")
        step(lambda part: None)


def test_a_profile_names_operators(tmp_path, capsys):
    path = tmp_path / "profile.csv"
    given = ["--tiny", "--device", "cpu", "--steps", "1", "--warm-up", "1", "--top", "5", "--output", str(path)]
    profiling.main([*given, "--case", "chain/d1-w8-b2/eager/float32"])
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(profiling.COLUMNS)
    assert len(lines) == 1 + 2 * 5
    assert "kalman_norm: " in capsys.readouterr().out


def test_the_command_lists_its_cases(capsys):
    assert command.main(["--device", "cuda", "--list"]) == 0
    assert capsys.readouterr().out.split()[0] == "step/resnet50/b2/224/eager/bfloat16"


def test_errors_that_end_a_process_are_told_apart():
    assert command.is_fatal(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not command.is_fatal(RuntimeError("CUDA error: out of memory"))
    assert not command.is_fatal(argparse.ArgumentTypeError("no"))


@pytest.mark.parametrize("of", [("bn", 128, "float32"), ("kn", 2, "float32"), ("brn", 2, "float32")])
def test_steps_a_second_are_of_whole_steps(of):
    step = throughput.step_of(*of, "channels_last", "cpu", depth=8)
    losses = torch.stack([step() for _ in range(3)])
    assert losses.isfinite().all()
    assert len(set(losses.tolist())) == 3  # it trains
    assert 0 < throughput.rate(step, 0.01, "cpu") < 1000


def test_a_lent_gpu_s_study_leaves_what_has_ended_and_what_has_not(tmp_path):
    """The script that a session with a GPU runs, rehearsed on a CPU; to its end, and cut off."""
    script = ROOT / "benchmarks" / "lent_gpu.sh"
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "RUNS": str(tmp_path / "runs"), "SCALE": "tiny",
                   "ONLY": "bn", "PYTHON": sys.executable}  # fmt: skip

    def run(*arguments):
        command = ["bash", str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("none").returncode == 2
    whole = run("study", "demo", "400", "1")
    assert "the study: 0" in whole.stdout, whole.stdout + whole.stderr
    with tarfile.open(tmp_path / "out" / "runs.tgz") as packed:
        names = packed.getnames()
    assert "./demo/runs.csv" in names
    assert not [name for name in names if "ckpt" in name]
    assert sum(name.endswith("result.json") for name in names) == 3  # seeds
    cut_off = next((tmp_path / "runs").rglob("test-seed-0/result.json"))
    cut_off.unlink()
    assert "the study: 124" in run("study", "demo", "0.5", "1").stdout
    with tarfile.open(tmp_path / "out" / "checkpoints.tgz.aa") as packed:
        assert packed.getnames() == [str(cut_off.with_name("last.ckpt").relative_to(tmp_path / "runs"))]
    # What is told in docs/results is not trained again: nothing at all where all is told.
    kept = ROOT / "docs" / "results" / "studies" / "volumes-standardized" / "runs.csv"
    environment |= {"GROW": "1", "SCALE": "1", "ONLY": "*", "RUNS": str(tmp_path / "grown")}
    assert "the study: 0" in run("study", "volumes-standardized", "400", "1").stdout
    grown = (tmp_path / "grown" / "volumes-standardized" / "runs.csv").read_text().splitlines()
    assert sorted(grown) == sorted(kept.read_text().splitlines())
    assert not list((tmp_path / "grown").rglob("result.json"))
