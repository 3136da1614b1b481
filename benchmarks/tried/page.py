"""The page of networks and situations, from the rows of the CSV."""

import textwrap
from collections import Counter

from benchmarks.tables import table
from benchmarks.tried.networks import FROZEN, LONGER, STANDARDIZED
from benchmarks.tried.trial import LAST, RATE, RECALIBRATION, STEPS

HEAD = f"""# Networks and situations that were tried

Made by `python -m benchmarks.tried` from [tried.csv](results/tried.csv): networks of other packages, and situations
from public issue threads, with BatchNorm and with Kalman layers. A network is built from a small configuration, without
weights. It is converted (`input_stats=(0.0, 1.0)`), described, and trained for {STEPS} steps of Adam (rate {RATE:g}) at
1 and at 2 samples, from the same weights and on the same samples as with BatchNorm. The target of each output is -1 or
1, for the one of two waves that the sample contains; the loss is the mean squared error. *Alone* is the loss in
`eval()` where each sample is normalized by its own statistics: by `kn.online_statistics`, or
`convert(track_running_stats=False)`.

{STEPS} steps of one seed show faults, not which normalization is better; for that see [Results](evidence.md).

"""

# A loss is listed if it is more than this many times BatchNorm's; more than FAILED times in `eval()` are a failure.
TIMES = {"eval": 2, "last": 1.2, "largest": 2}
FAILED = 10
WORSE = f"""These networks start from fresh weights and plain filters, where
[priors are too narrow](evidence.md#where-the-prior-is-wrong). In training each layer still follows its own batch, which
keeps its output small. In `eval()` no layer does, so errors grow from layer to layer. The training loss may not
show it. The remedy is [`kn.recalibrate`](guide/fine-tuning.md#running-statistics-of-eval) after the training
(*recalibrated*: by {RECALIBRATION} batches of other samples). Others are
[frozen layers](guide/fine-tuning.md#the-last-steps-as-in-eval) at the end of the training and
[standardized filters](guide/options.md#standardized-filters), both tried below, and
[each sample by itself](guide/options.md#each-sample-by-itself) (*alone*).

Listed are losses in `eval()` of more than {TIMES["eval"]} times BatchNorm's, losses at the end of training of more than
{TIMES["last"]} times, and largest losses of more than {TIMES["largest"]} times. A network that outputs 0 has loss 1.

"""


def page(rows):
    """The page as Markdown, from the CSV's rows, cells as text."""
    every = [row for row in rows if row["kind"] == "network" and not row["happened"]]
    networks = [row for row in every if not row["name"].endswith((STANDARDIZED, LONGER, FROZEN))]
    longer, frozen, standardized = ([r for r in every if r["name"].endswith(s)] for s in (LONGER, FROZEN, STANDARDIZED))
    skipped = sorted({row["library"] for row in rows if row["happened"].startswith("skipped")})
    situations = [row for row in rows if row["kind"] == "situation"]
    parts = [HEAD, *_summary(networks), "## Where Kalman layers are worse\n\n"]
    parts += [_failures(networks), WORSE, _worse(networks)]
    if frozen:
        parts += ["### With layers frozen for the last steps\n\n", *_frozen(longer, frozen)]
    if standardized:
        parts += ["### With standardized filters\n\n", *_filters(standardized), _networks(standardized, False)]
    parts += ["## Networks\n\n", _networks(networks)]
    if skipped:
        parts.append(f"Not installed where this ran: {', '.join(skipped)}.\n\n")
    parts += ["### Layers without a prior\n\n", _reasons(networks)]
    parts += ["## Situations\n\nThe number is better where it is smaller.\n\n", _situations(situations)]
    packages = sorted({package for row in rows for package in row["packages"].split(", ")})
    return _wrapped("".join([*parts, f"With {', '.join(packages)}.\n"]))


def _wrapped(text):
    """Prose in lines of at most 100 characters."""
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
    parts = text.strip().split("\n\n")
    return "\n\n".join(part if part.startswith(("#", "|")) else wrapper.fill(part) for part in parts) + "\n"


def _summary(networks):
    names = {(row["library"], row["name"]) for row in networks}
    layers = {(row["library"], row["name"]): (int(row["with_prior"] or 0), int(row["layers"] or 0)) for row in networks}
    priors, total = (sum(pair[i] for pair in layers.values()) for i in (0, 1))
    both = [row for row in networks if row["batchnorm_last"] and row["kalman_last"]]
    raised = {row["name"] for row in networks if row["batchnorm_error"]}
    failed = {row["name"] for row in networks if row["kalman_error"]}
    yield f"**{len(names)} networks: {priors:,} of {total:,} layers have a prior.** "
    yield f"BatchNorm raised an error in {len(raised)} of them, a converted network in {len(failed)}. "
    yield f"Of {len(both)} trainings that both sides finished, "
    yield f"the converted network's loss was the smaller one at the end (the mean of {LAST} steps) in "
    yield f"{sum(float(r['kalman_last']) < float(r['batchnorm_last']) for r in both)}, in `eval()` on new samples in "
    yield f"{sum(float(r['kalman_eval']) < float(r['batchnorm_eval']) for r in both)}; its largest loss on the way was "
    yield f"the larger one in {sum(float(r['kalman_largest']) > float(r['batchnorm_largest']) for r in both)}. "
    yield "Where a network was trained on single samples, *alone* was smaller than `eval()` in "
    ones = [row for row in networks if row["samples"] == "1" and row["kalman_last"]]
    yield f"{sum(float(r['kalman_alone']) < float(r['kalman_eval']) for r in ones)} of {len(ones)} converted ones.\n\n"


def _above(row, times, measure="eval"):
    """Whether Kalman's loss exceeds ``times`` BatchNorm's, or 1, the loss of a constant 0, if BatchNorm raised."""
    theirs = row[f"batchnorm_{measure}"] or (measure in ("eval", "recalibrated") and 1)
    return bool(row[f"kalman_{measure}"] and theirs) and float(row[f"kalman_{measure}"]) > times * float(theirs)


def _failures(networks):
    failed = {}
    for row in networks:
        if _above(row, FAILED):
            failed.setdefault(row["name"], []).append(row["samples"])
    named = ", ".join(f"{name} at {' and '.join(samples)}" for name, samples in failed.items())
    still = sum(_above(row, FAILED, "recalibrated") for row in networks) or "none"
    text = f"After training at 1 or 2 samples, these fail in `eval()`: {named}. Recalibrated, {still} of them fails."
    return f"**{text}** " if failed else ""


def _filters(networks):
    """Text on the failures that remain with standardized filters."""
    yield f"The same networks with standardized filters on both sides. {sum(_above(r, FAILED) for r in networks)} of "
    yield f"{len(networks)} trainings fail. {_smaller(networks, STANDARDIZED)}{_recalibrated(networks)}.\n\n"


def _recalibrated(networks):
    """Text on how often Kalman's loss is the smaller one; BatchNorm may have raised."""
    pairs = [(row["kalman_recalibrated"], row["batchnorm_recalibrated"]) for row in networks]
    smaller = sum(not theirs or float(ours) < float(theirs) for ours, theirs in pairs)
    text = "Recalibrated on both sides, Kalman's loss is smaller than BatchNorm's in"
    return f"{text} {smaller} of {len(pairs)} trainings"


def _smaller(networks, suffix):
    """Text on the trainings in which BatchNorm's loss is the smaller one."""
    worse = [
        f"{row['name'].removesuffix(suffix)} at {row['samples']} ({row['kalman_eval']}, BatchNorm "
        f"{row['batchnorm_eval']})"
        for row in networks if row["batchnorm_eval"] and float(row["kalman_eval"]) > float(row["batchnorm_eval"])
    ]  # fmt: skip
    text = f"BatchNorm's loss in `eval()` is still the smaller one in {len(worse)}"
    return f"{text}: {', '.join(worse)}.\n\n" if worse else f"{text}.\n\n"


def _frozen(longer, frozen):
    """Text and table on the failures that remain in a longer training, with and without layers frozen at its end."""
    yield "The same networks with plain filters, trained for 100 steps at a rate that falls to 0 by a cosine: as they "
    yield "are, and with their layers frozen (`kn.freeze`) for the last 30 of these steps, on both sides; and with 8 "
    yield "groups of GroupNorm. Listed is the loss in `eval()`, also once recalibrated. As they are, "
    yield f"{sum(_above(r, FAILED) for r in longer)} of {len(longer)} trainings fail; recalibrated, "
    yield f"{sum(_above(r, FAILED, 'recalibrated') for r in longer)}; frozen, "
    yield f"{sum(_above(r, FAILED) for r in frozen)}. {_smaller(frozen, FROZEN)}"
    ahead = sum(float(r["kalman_recalibrated"]) < float(r["groupnorm_eval"]) for r in longer)
    yield f"{_recalibrated(longer)}, and than GroupNorm's in {ahead}.\n\n"
    late = {(row["name"].removesuffix(FROZEN), row["samples"]): row for row in frozen}
    head = ["network", "samples", "BatchNorm", "recalibrated", "frozen", "Kalman", "recalibrated", "frozen", "alone",
            "GroupNorm"]  # fmt: skip
    lines, better = [], 0
    for row in longer:
        name, groupnorm = row["name"].removesuffix(LONGER), row["groupnorm_eval"]
        then = late[name, row["samples"]]
        losses = [
            each[f"{side}_{what}"] or "raises" for side in ("batchnorm", "kalman")
            for each, what in ((row, "eval"), (row, "recalibrated"), (then, "eval"))
        ]  # fmt: skip
        lines.append([f"{name} ({row['library']})", row["samples"], *losses, row["kalman_alone"], groupnorm])
        better += float(groupnorm) < float(then["kalman_eval"])
    yield f"{table(head, lines)}\n\nGroupNorm's loss is smaller than that of frozen Kalman layers in {better}.\n\n"


def _worse(networks):
    names = {"eval": "in `eval()`", "last": "at the end", "largest": "largest"}
    lines = [
        [f"{row['name']} ({row['library']})", row["samples"], name, row[f"batchnorm_{measure}"] or "raises",
         row[f"kalman_{measure}"],
         *([row["kalman_recalibrated"], row["kalman_alone"]] if measure == "eval" else ["", ""])]
        for measure, name in names.items() for row in networks if _above(row, TIMES[measure], measure)
    ]  # fmt: skip
    head = ["network", "samples", "loss", "BatchNorm", "Kalman", "Kalman, recalibrated", "Kalman, alone"]
    return table(head, lines) + "\n\n" if lines else "Nowhere.\n\n"


def _networks(networks, whole=True):
    head = ["network", "samples", "with a prior", "loss: first, last, largest; in `eval()`, alone: BatchNorm", "Kalman",
            "save and load, `to_batchnorm`"]  # fmt: skip
    lines = []
    for row in networks:
        # The stock network would standardize filters again that were stored standardized.
        saved = [row[name] for name in ("reloaded", "deployed", *(["in_stock"] if whole else []))]
        lines.append([
            f"{row['name']} ({row['library']})", row["samples"],
            f"{row['with_prior'] or '-'} of {row['layers'] or '-'}",
            _side(row, "batchnorm"), _side(row, "kalman"),
            "-" if not all(saved) else "equal" if not any(map(float, saved)) else f"{max(map(float, saved)):.1e}",
        ])  # fmt: skip
    note = "Detectors give other numbers in `eval()` than in training: boxes, say.\n\n" if whole else ""
    return f"{table(head, lines)}\n\n{note}"


def _side(row, side):
    if row[f"{side}_error"]:
        return row[f"{side}_error"].split(", got")[0]
    first, last, largest, in_eval, alone = (
        row[f"{side}_{measure}"].replace("nan", "-") for measure in ("first", "last", "largest", "eval", "alone")
    )
    return f"{first}, {last}, {largest}; {in_eval}, {alone}"


def _reasons(networks):
    found = Counter((row["library"], row["name"], row["reasons"]) for row in networks if row["reasons"])
    lines = [[f"{name} ({library})", reasons] for library, name, reasons in found]
    return f"{table(['network', 'reason (layers)'], lines)}\n\n" if lines else "None.\n\n"


def _situations(situations):
    head = ["situation", "threads", "measured", "BatchNorm", "Kalman", ""]
    lines = [[row["name"], row["library"], row["measures"], row["batchnorm"], row["kalman"], row["happened"]]
             for row in situations]  # fmt: skip
    return table(head, lines) + "\n\n"
