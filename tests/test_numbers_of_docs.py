"""Each number that a page reports as measured is in the files of results.

A number is found in the tables that its section links, or it is among `facts`, which computes what the text derives
from the files: differences, ranges, ratios of speed. What is no measurement is among `SETTINGS`, with the reason.
"""

import csv
import functools
import json
import math
import re

import pytest
from pages import DOCS, FENCE, MADE, ROOT

pytest.importorskip("pandas")

from kalmannorm.lab import experiments
from kalmannorm.lab.tables import read_runs

RESULTS = DOCS / "results"
PAGES = [
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in (
        "index", "start", "evidence", "which-normalization", "compared", "speed", "how-it-works")),
    *sorted((DOCS / "guide").glob("*.md")),
]  # fmt: skip

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
# A number with a decimal point, or with a unit behind it or behind the last of several.
NUMBER = re.compile(r"(?<![\w.,/^-])-?\d+(?:\.\d+)?(?![\w^]|\.\d|,\d{3})")
UNIT = re.compile(r"(?:(?:,| to| and| or| of the) -?\d+(?:\.\d+)?)*(?: %| points?\b| times\b| ms\b| [MG]B| models?\b)")

# What looks like a measurement and is none, as the pages have it.
SETTINGS = {
    "versions, and the numbers of papers": r"(?:[Vv]ersion|Python|torch) \d+\.\d+|arXiv:[\d.]+",
    "learning rates": r"[Rr]ates? of [\d., and]+|rate [\d.]+|[Ww]ith a gain of 0\.1|code's 0\.1",
    "columns of rates": r"\| rate \| [\d. |]+|^\| 0\.[13] \|",
    "share of a training": r"last (?:30|15) %|after 70 %",
    "overlap that counts as found": r"boxes at 0\.5",
    "the paper's own scores": r"\| (?:92\.1 / 90\.0|89\.4 / 90\.0|90\.9 / 90\.9|90\.4|87\.8|77\.7) \|$",
    "ImageNet's mean and deviation": r"0\.485 and 0\.229",
    "the gain by its formula": r"is 5 or 10 %",
    "bounds of a healthy layer": r"0\.5 to 2",
    "an initial value": r"starts at 1 %|prior is 1 % wider",
    "the unit of a comparison": r"BatchNorm, the 1\.0",
    "sizes of tensors, by their shapes": r"are\s+94 MB|103 to\s+205 MB",
}  # fmt: skip


def prose(text):
    """Without code, what a program wrote, comments' marks, headings and settings; links keep their words."""
    text = MADE.sub("", FENCE.sub("", text))
    text = re.sub(r"`[^`]*`", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("#", "    ")))
    for pattern in SETTINGS.values():
        text = re.sub(pattern, "|", text, flags=re.M)
    return LINK.sub("]", text)


def sections(path):
    """Heading and text of each part of a page."""
    parts = re.split(r"^(?=##)", MADE.sub("", FENCE.sub("", path.read_text(encoding="utf-8"))), flags=re.M)
    return {part.partition("\n")[0].strip("# "): part for part in parts}


def measured(text):
    """The numbers of a text that are measurements, each with the place of its last digit and the words around it."""
    text = prose(text).replace("*", "").replace("\n", " ")
    text = re.sub(r" +", " ", text)
    for found in NUMBER.finditer(text):
        if "." in found[0] or UNIT.match(text, found.end()):
            yield found[0], text[max(0, found.start() - 40) : found.end() + 30]


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def study(name):
    return {arm.name: arm for arm in read_runs(experiments.read(name), RESULTS / "studies" / name).arms}


def score(name, arm, of="accuracy_running", first=None):
    """The mean over the runs that count, or the first of them, in per cent."""
    values = study(name)[arm].values(of)[:first]
    return sum(values) / len(values)


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decimals(text):
    return {float(found) for found in re.findall(r"-?\d+\.\d+", text)}


@functools.cache
def numbers_of(path):
    """The numbers that a linked file has."""
    if path.name == "table.md" and path.parent.parent.name == "studies":
        searched = [row for row in rows(path.with_name("runs.csv")) if row["kind"] == "search"]
        scores = ("accuracy_running", "accuracy_online")
        found = {100 * float(row[score]) for row in searched for score in scores if row.get(score)}
        return found | decimals(path.read_text().partition("\n| arm ")[0])
    if path.name in ("table.md", "evalnorm.md", "tried.md"):
        return decimals(path.read_text())
    if path == ROOT / "history":
        found = json.loads((path / "pennfudan-cpu" / "fpn-kn" / "result.json").read_text())["scores"]
        return decimals((path / "tables.md").read_text()) | {100 * value for value in found.values()}
    if path.name == "converted.csv":
        return {float(row[column]) for row in rows(path) for column in ("accuracy_eval", "accuracy_own_statistics")}
    if path.name == "first-steps.csv":
        from benchmarks.first_steps import summary

        found = decimals(summary(rows(path)))
        return found | {100 * value for value in found}
    return set()


def linked(path, part, depth=0):
    """The numbers of all files that a part of a page links, and of those that linked parts of results link."""
    found = set()
    for target, anchor in LINK.findall(part):
        there = (path.parent / target).resolve() if target else path
        if there.name == "evidence.md" and anchor and depth < 1:
            for heading, text in sections(there).items():
                found |= linked(there, text, depth + 1) if slug(heading) == anchor else set()
        elif there.exists():
            found |= numbers_of(there)
    return found


def difference(name, one, other, of="accuracy_running"):
    return score(name, one, of) - score(name, other, of)


def layer_ratios(name, estimate, column="log_ratio"):
    """By how much an estimate's variance is off, a factor a layer."""
    return [
        math.exp(float(row[column]))
        for row in rows(RESULTS / "layers" / f"{name}.csv")
        if (row["estimate"], row["reference"]) == (estimate, "population")
    ]


@functools.cache
def facts():
    """What the pages derive from the files, by page: the numbers as they are."""
    small, deep, tuned = "batch-sizes-cpu", "deeper-cpu", "fine-tuning-imagenet-cpu"
    gpu = {arm: difference("batch-sizes-gpu", "bn-128", arm) for arm in ("bn-2", "gn-2", "kn-2")}
    deeper = [difference(deep, f"bn-128{arm}", f"kn-2{arm}")
              for arm in ("", "-ws", "-ws-proxy", "-long", "-ws-long", "-ws-proxy-long")]  # fmt: skip
    frozen_late = [score(small, "kn-1-ws-frozen", first=3) - score(small, "kn-1-ws"),
                   score(small, "kn-1-ws-frozen") - score(small, "kn-1-ws-fixed"),
                   score(small, "kn-1-ws-proxy-frozen") - score(small, "kn-1-ws-proxy", first=3)]  # fmt: skip
    leapt, recalibrated = (study("longer-cpu")[f"kn-1-ws-proxy-{how}"].values("accuracy_running")
                           for how in ("frozen", "late"))  # fmt: skip
    gained = sorted(late - frozen for late, frozen in zip(recalibrated[3:], leapt[3:], strict=True))
    late_batchnorm = difference(small, "bn-2-ws-frozen", "bn-2-ws")
    fixed_gain = score(small, "kn-1-ws-fixed", first=3) - score(small, "kn-1-ws")
    layernorm = study("tabular")["ln"].values("accuracy_running")
    without_filters = [difference("signals", "kn", "kn-ws"), difference("tabular", "kn", "kn-ws")]
    at_one = [100 * (float(row["accuracy_online"]) - float(row["accuracy_running"]))
              for row in study("batch-sizes-gpu")["kn-1"].search]  # fmt: skip
    ratios = {name: sorted(1 / r for r in layer_ratios("kn-2", name)[2:]) for name in ("prior", "posterior")}
    observed = sorted(layer_ratios("kn-2", "observation", "log_ratio_rms")[2:])
    seeds = [study("fine-tuning-imagenet-cpu")[arm].values("accuracy_running") for arm in ("frozen-1", "frozen-2")]
    frozen = [max(values) - min(values) for values in seeds]
    cpu, cuda = ({(row["case"], row["method"]): row for row in rows(RESULTS / "speed" / f"{device}.csv")}
                 for device in ("cpu", "cuda"))  # fmt: skip
    ratio = lambda of, case, method="kalman_norm": float(of[case, method]["ratio_to_batch_norm"])  # noqa: E731
    ms = lambda of, case, method="kalman_norm": float(of[case, method]["median_ms"])  # noqa: E731
    eager, two, graph = (f"step/resnet50/{rest}/bfloat16" for rest in ("b32/224/eager", "b2/224/eager", "b2/224/graph"))
    mobile = "step/efficientnet_b0/b2/128/eager/float32"
    step, compiled = (f"step/resnet50/b2/128/{mode}/float32" for mode in ("eager", "compiled"))
    detector = "step/maskrcnn/b1/320/eager/float32"
    steps = [*(ratio(cpu, case) for case in (step, mobile, detector)), ratio(cpu, detector, "frozen_batch_norm"),
             ratio(cuda, eager), ratio(cuda, graph)]  # fmt: skip
    extra = [(ms(cuda, case) - ms(cuda, case, "batch_norm")) / 53 for case in (two, eager)]
    act = [ratio(cpu, f"layer/{case}/eager/float32", "kalman_norm_act") for case in (
        "n2-c64-56x56", "n2-c256-28x28", "n1-c64-112x112", "n8-c64-28x28", "n32-c64-32x32")]  # fmt: skip
    wide, deep_map = "layer/n128-c64-112x112/eager/bfloat16", "layer/n64-c256-56x56/eager/bfloat16"
    peak = {method: float(cuda[eager, method]["peak_bytes"]) for method in ("kalman_norm", "batch_norm")}
    covered = rows(RESULTS / "coverage.csv")
    corrected, uncorrected = (sorted(layer_ratios(name, "prior")) for name in ("pretrained-corrected", "pretrained"))
    volumes = [difference("volumes-standardized", "in-ws", "kn-ws", "dice_running")]
    return {
        "README.md": [*at_one, *deeper, *steps],
        "start.md": steps,
        "which-normalization.md": [
            *without_filters, *gpu.values(), *steps, *layernorm,
            *(ratio(of, case, "group_norm") for of, case in ((cpu, step), (cuda, eager))),
        ],
        "evidence.md": [
            *gpu.values(), difference("batch-sizes-gpu", "kn-2", "bn-128", "accuracy_online"), *at_one, *deeper,
            *layernorm, *without_filters, ratios["prior"][0], ratios["prior"][-1],
            *(difference("fine-tuning-cpu", f"kn-{n}", f"frozen-{n}") for n in (1, 2, 4)), *frozen,
            difference("fine-tuning-cpu", "kn-4", "bn-4"),
            difference(small, "kn-2", "bn-2"), difference(small, "bn-128", "bn-2"), difference(small, "bn-128", "kn-2"),
            difference(small, "bn-128", "kn-1"), difference(small, "bn-128", "kn-1-annealed"),
            difference(small, "bn-128-ws", "kn-2-ws"), difference(small, "kn-2-ws", "bn-128"),
            *(difference(small, f"kn-{n}-ws-proxy", "gn-2-ws-proxy") for n in (1, 2)),
            *(abs(difference("gains-cpu", f"fixed-{arm}", f"learned-{arm}")) for arm in ("ws-1", "ws-2", "ws-8", "2")),
            observed[0], observed[-1], corrected[0], corrected[-1], uncorrected[0], uncorrected[-1],
            difference("detection-cpu", "gn-ws", "kn", "box_ap"), *volumes,
            difference("detection-cpu", "kn", "bn-recalibrated", "box_ap_online"),
            *(difference("detection-pretrained-cpu", f"kn{clipped}", f"frozen{clipped}", of)
              for clipped in ("", "-clipped") for of in ("box_ap", "mask_ap")),
            *(difference(tuned, *pair) for pair in (("kn-2-clipped", "kn-2"), ("kn-2-clipped", "last-2"),
                                                    ("kn-1", "kn-1-clipped"), ("kn-1", "last-1"))),
            *(score(small, arm, first=3) - score(small, arm) for arm in ("kn-2-ws", "kn-1-ws-fixed")), fixed_gain,
            *frozen_late[1:], late_batchnorm, score(small, "kn-2-ws", first=3) - score(small, "bn-2-ws-frozen"),
            difference(small, "bn-128-ws", "kn-1-ws-frozen"),
            difference(small, "kn-1-ws-frozen", "gn-2-ws"),
            *(score(small, arm, first=3) for arm in ("kn-1", "kn-1-ws-frozen", "kn-2-ws")),
            min(leapt), gained[0], gained[-1],
        ],
        "speed.md": [
            *steps, ratio(cpu, step, "group_norm"), ratio(cpu, compiled), min(act), max(act),
            ratio(cpu, "step/resnet18/b32/64/eager/float32"), ratio(cpu, "step/resnet18/b2/64/eager/bfloat16"),
            ratio(cpu, "step/mobilenet_v3_large/b2/160/eager/float32"),
            ratio(cpu, "layer/n2-c512-7x7/eager/float32", "kalman_norm_act"), *extra, ms(cuda, two), ms(cuda, eager),
            ms(cuda, graph), 100 * (ratio(cuda, graph) - 1), ratio(cuda, wide), ratio(cuda, wide, "kalman_norm_act"),
            ratio(cuda, deep_map), ms(cuda, wide), peak["kalman_norm"] / peak["batch_norm"],
            float(cpu["copy/128MiB/eager/float32", "copy"]["gb_per_s"]),
        ],
        "compile.md": [
            *steps, ratio(cpu, compiled), ratio(cuda, two), ms(cuda, two), ms(cuda, two, "batch_norm"),
            ms(cuda, graph), ms(cuda, graph, "batch_norm"),
        ],
        "volumes.md": volumes,
        "options.md": [ratios["prior"][0], ratios["prior"][-1]],
        "troubleshooting.md": [*steps, *extra],
        "fine-tuning.md": [*frozen, frozen_late[0], late_batchnorm, min(leapt)],
        "compared.md": [float(len([row for row in covered if row["library"] in ("torchvision", "timm")]))],
    }  # fmt: skip


def agrees(shown, value):
    """Whether a number, with the digits that it is shown with, is the value; tables have two digits themselves."""
    places = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-places + (0.00501 if places < 2 else 1e-9)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_each_measured_number_is_in_the_files(path):
    absent = []
    for part in sections(path).values():
        there = linked(path, part) | set(facts().get(path.name, ()))
        absent += [words for shown, words in measured(part) if not any(agrees(shown, value) for value in there)]
    assert absent == []


def test_the_layers_with_a_prior_are_those_of_the_table_of_coverage():
    there = {row["model"]: (row["with_prior"], row["layers"]) for row in rows(RESULTS / "coverage.csv")}
    page = (DOCS / "guide" / "detection.md").read_text()
    shown = re.search(r"(\d+) of (\d+) have a prior in\s+`fasterrcnn_resnet50_fpn`, (\d+) of (\d+) in its second", page)
    assert shown.groups() == there["fasterrcnn_resnet50_fpn"] + there["fasterrcnn_resnet50_fpn_v2"]


def test_many_numbers_are_looked_at_and_each_setting_is_on_a_page():
    counts = {path.name: sum(1 for part in sections(path).values() for _ in measured(part)) for path in PAGES}
    assert counts["evidence.md"] > 200
    assert counts["README.md"] > 30
    assert sum(counts.values()) > 400
    texts = "".join(re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8")) for path in PAGES)
    assert [reason for reason, pattern in SETTINGS.items() if not re.search(pattern, texts, re.M)] == []


def test_a_number_that_is_nowhere_is_found_out():
    path = DOCS / "evidence.md"
    part = sections(path)["Standardized filters"]
    there = linked(path, part) | set(facts()["evidence.md"])
    assert not any(agrees("61.7", value) for value in there)
    assert [shown for shown, _ in measured(part.replace("52.7", "61.7"))].count("61.7") > 0
