"""The speed goals, and their measured values in the CSV."""

from typing import NamedTuple

HALF = "bfloat16"
LARGE = ("layer/n128-c64-112x112/eager/bfloat16", "layer/n64-c256-56x56/eager/bfloat16")


class Goal(NamedTuple):
    """A bound on a measured number of one method, in some cases."""

    words: str
    device: str
    cases: tuple[str, ...]
    bound: float
    measure: str = "ratio_to_batch_norm"
    """A column of the CSV, or ``peak``: peak memory over BatchNorm's."""
    method: str = "kalman_norm"
    over: str = ""
    """Another method; the number is then its median time over this one's, and must be at least the bound."""

    in_all: bool = False
    """Whether the worst of several cases is used; otherwise the best."""

    @property
    def at_most(self):
        return not self.over and self.measure != "share_of_copy"

    @property
    def wanted(self):
        return f"at {'most' if self.at_most else 'least'} {self.bound:.2f}"


def _layer_goals(words, method):
    """Goals for a single layer with its ReLU, on large maps."""
    yield Goal(f"layer and ReLU, large maps, bf16: {words}, time", "cuda", LARGE, 0.80, method=method, in_all=True)
    yield Goal(f"layer and ReLU, large maps, bf16: {words}, share of a copy's bandwidth", "cuda", LARGE, 0.80,
               "share_of_copy", method, in_all=True)  # fmt: skip


GOALS = (
    Goal("ResNet-50, 224 x 224, bf16, batch 2, eager", "cuda", ("step/resnet50/b2/224/eager/bfloat16",), 1.50),
    Goal("batch 32, eager", "cuda", ("step/resnet50/b32/224/eager/bfloat16",), 1.30),
    Goal("800 x 1344, batch 2, eager", "cuda", ("step/resnet50_wide/b2/800/eager/bfloat16",), 1.20),
    Goal("batch 2, compiled", "cuda", ("step/resnet50/b2/224/compiled/bfloat16",), 1.05),
    Goal("batch 32, compiled", "cuda", ("step/resnet50/b32/224/compiled/bfloat16",), 1.02),
    Goal("batch 2, the whole step captured", "cuda", ("step/resnet50/b2/224/graph/bfloat16",), 1.02),
    Goal("batch 32, the whole step captured", "cuda", ("step/resnet50/b32/224/graph/bfloat16",), 1.02),
    Goal("batch 2, kn.capture over BatchNorm in eager mode", "cuda", ("step/resnet50/b2/224/eager/bfloat16",), 0.35,
         method="kalman_norm_captured"),
    *_layer_goals("converted", "kalman_norm"),
    *_layer_goals("KalmanNormAct2d", "kalman_norm_act"),
    Goal("peak memory, training ResNet-50, batch 32, eager", "cuda", ("step/resnet50/b32/224/eager/bfloat16",), 1.00,
         "peak"),
    Goal("(2, 128) in one pass, ResNet-32: times faster than 64 batches of 2", "cuda",
         ("groups/(2,128)/cifar_resnet32/b128/32/eager/float32",), 20, over="kalman_norm_loop"),
    Goal("exact over Monte-Carlo moments: times faster, ResNet-50, batch 2, eager", "cuda",
         ("step/resnet50/b2/224/eager/bfloat16",), 1.3, over="kalman_norm_monte_carlo"),
    Goal("ResNet-50, 128 x 128, batch 2, eager", "cpu", ("step/resnet50/b2/128/eager/float32",), 1.12),
    Goal("ResNet-18, 96 x 96, batch 2, eager", "cpu", ("step/resnet18/b2/96/eager/float32",), 1.20),
    Goal("ResNet-50, 128 x 128, batch 2, compiled", "cpu", ("step/resnet50/b2/128/compiled/float32",), 1.05),
    Goal("(2, 128), ResNet-32, over BatchNorm of the whole 128", "cpu",
         ("groups/(2,128)/cifar_resnet32/b128/32/eager/float32",), 1.10),
)  # fmt: skip


def by_case(rows):
    """Rows by case and method."""
    return {(row["case"], row["method"]): row for row in rows}


def value(goal, rows):
    """The measured number and its case; None for both if it was not measured."""
    table = by_case(row for row in rows if row["device"] == goal.device)
    found = [(number, case) for case in goal.cases if (number := _in_case(goal, case, table)) is not None]
    if not found:
        return None, None
    if goal.in_all and len(found) < len(goal.cases):
        return None, None
    return min(found) if goal.at_most != goal.in_all else max(found)


def _in_case(goal, case, table):
    ours = table.get((case, goal.method), {})
    if goal.over:
        return over(table.get((case, goal.over), {}).get("median_ms"), ours.get("median_ms"))
    if goal.measure == "peak":
        return over(ours.get("peak_bytes"), table.get((case, "batch_norm"), {}).get("peak_bytes"))
    return ours.get(goal.measure)


def over(a, b):
    """``a / b``; None if one is missing."""
    return None if a is None or not b else a / b


def is_met(goal, number):
    return number <= goal.bound if goal.at_most else number >= goal.bound
