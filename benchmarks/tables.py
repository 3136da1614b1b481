"""Markdown tables from the rows of a CSV."""

from benchmarks.goals import GOALS, by_case, is_met, over, value

NAMES = {
    "batch_norm": "BatchNorm", "kalman_norm": "KN", "kalman_norm_act": "KN with its ReLU",
    "kalman_norm_monte_carlo": "KN, Monte-Carlo", "group_norm": "GroupNorm", "sync_batch_norm": "SyncBatchNorm",
    "ghost_batch_norm": "BatchNorm by groups", "batch_norm_loop": "BatchNorm, a loop", "kalman_norm_loop": "KN, a loop",
    "to_batchnorm": "after to_batchnorm", "copy": "copy", "one_by_one": "KN, each sample by itself",
    "kalman_norm_standardized": "KN, standardized filters", "kalman_norm_captured": "KN, kn.capture",
    "batch_norm_captured": "BN, kn.capture", "frozen_batch_norm": "BatchNorm, frozen",
}  # fmt: skip


def table(header, lines):
    """A markdown table; None is a dash."""
    text = [[("-" if cell is None else str(cell)) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *text])


def with_text(text, header, lines):
    """A table below a text; empty if it has no lines."""
    return f"{text}\n\n{table(header, lines)}" if lines else ""


def goals(rows):
    """A table of the goals and the measured numbers."""
    lines = []
    for goal in GOALS:
        number, case = value(goal, rows)
        verdict = "not measured" if number is None else "met" if is_met(goal, number) else "**missed**"
        name = f"`{case}`" if case else " or ".join(f"`{case}`" for case in goal.cases)
        lines.append([goal.device, goal.words, goal.wanted, number and f"{number:.3g}", verdict, name])
    return table(["device", "goal", "wanted", "measured", "", "case"], lines)


def of_device(rows):
    """All sections of one device: a heading, a sentence and a table each."""
    sections = (
        ("Whole training steps", steps(rows, "step")),
        ("(2, 128): groups in one pass, and a loop over batches of 2", groups(rows)),
        ("The layer alone, with its ReLU", layers(rows)),
        ("How it grows", chains(rows)),
        ("Inference", inference(rows)),
        ("Not measured", failures(rows)),
    )
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in sections if text)


def measured_by(rows):
    """The machine, in a sentence."""

    def all_of(column):
        return ", ".join(sorted({str(row[column]) for row in rows}))

    commits = ", ".join(sorted({f"{row['commit']}{' and changes' * (row['dirty'] == 'True')}" for row in rows}))
    dates = sorted(str(row["date"])[:10] for row in rows)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return (
        f"{all_of('processor')}; {all_of('threads')} threads, torch {all_of('torch')}, commit {commits}, {days}, "
        f"allocator: {all_of('allocator')}."
    )


def measured(rows, kind):
    """A kind's cases in their order, each with its rows by method; only those with a time."""
    table = by_case(row for row in rows if row["kind"] == kind and row["median_ms"] is not None)
    for case in dict.fromkeys(case for case, _ in table):
        yield case, {method: row for (name, method), row in table.items() if name == case}


def times(number):
    return None if number is None else f"{number:.2f}"


def ratio(row, quartiles=False):
    """The ratio to BatchNorm, optionally with its quartiles."""
    if row is None or row["ratio_to_batch_norm"] is None:
        return None
    text = times(row["ratio_to_batch_norm"])
    return f"{text} ({times(row['ratio_quartile_1'])} to {times(row['ratio_quartile_3'])})" if quartiles else text


def milliseconds(row):
    time = row and row["median_ms"]
    return row and (f"{time:,.0f} ms" if time >= 1000 else f"{time:.3g} ms")


def described(row):
    """The cells for a network, its input and its mode."""
    return [row["network"], row["batch"], row["size"], row["mode"], row["dtype"]]


def compare(ours, theirs, column):
    """The ratio of a column of both sides."""
    return times(over(ours.get(column), theirs.get(column))) if ours and theirs else None


def steps(rows, kind):
    others = ("kalman_norm_captured", "batch_norm_captured", "frozen_batch_norm", "kalman_norm_standardized",
              "kalman_norm_monte_carlo", "group_norm")  # fmt: skip
    lines = []
    for _, sides in measured(rows, kind):
        theirs, ours = sides.get("batch_norm"), sides.get("kalman_norm")
        compiled = [row["compile_s"] for row in (theirs, ours) if row]
        lines.append([
            *described(next(iter(sides.values()))), milliseconds(theirs), ratio(ours, quartiles=True),
            *(compare(ours, theirs, f"{part}_ms") for part in ("forward", "backward", "optimizer")),
            *(ratio(sides.get(method)) for method in others),
            *(compare(ours, theirs, column) for column in ("peak_bytes", "saved_bytes")),
            None if None in compiled else " / ".join(f"{seconds:.0f}" for seconds in compiled),
        ])  # fmt: skip
    header = ["network", "batch", "size", "mode", "type", "BatchNorm", "KN / BN (quartiles)", "forward", "backward",
              "optimizer", *(NAMES[method] for method in others), "peak memory", "kept for backward",
              "compile, s: BN / KN"]  # fmt: skip
    return with_text("Ratios to BatchNorm, of time and of bytes.", header, lines)


def groups(rows):
    methods = ("ghost_batch_norm", "kalman_norm", "batch_norm_loop", "kalman_norm_loop")
    lines = []
    for _, sides in measured(rows, "groups"):
        first = next(iter(sides.values()))
        ours, loop = sides.get("kalman_norm"), sides.get("kalman_norm_loop")
        faster = over(loop["median_ms"], ours["median_ms"]) if ours and loop else None
        lines.append([first["network"], f"({first['stats_batch']}, {first['batch']})", first["size"],
                      milliseconds(sides.get("batch_norm")), *(ratio(sides.get(method)) for method in methods),
                      times(faster)])  # fmt: skip
    header = ["network", "statistics, batch", "size", "BatchNorm of the whole batch",
              *(NAMES[method] for method in methods), "KN: loop / one pass"]  # fmt: skip
    return with_text("Ratios to BatchNorm of the whole batch, with the same activations.", header, lines)


def layers(rows):
    methods = ("kalman_norm", "kalman_norm_act", "kalman_norm_monte_carlo", "group_norm", "sync_batch_norm")
    lines = []
    for _, sides in measured(rows, "layer"):
        first = next(iter(sides.values()))
        shape = " x ".join(str(first[name]) for name in ("batch", "channels", "size", "size"))
        shares = [sides.get(method, {}).get("share_of_copy") for method in ("batch_norm", *methods[:2])]
        lines.append([
            shape, first["mode"], first["dtype"],
            milliseconds(sides.get("batch_norm")), *(ratio(sides.get(method)) for method in methods),
            " / ".join("-" if share is None else f"{100 * share:.0f} %" for share in shares),
            compare(sides.get("kalman_norm"), sides.get("batch_norm"), "saved_bytes"),
        ])  # fmt: skip
    header = ["input", "mode", "type", "BatchNorm, ReLU", *(NAMES[method] for method in methods),
              "of a copy's bandwidth: BN / KN / KN with its ReLU", "kept for backward"]  # fmt: skip
    copied = [row["gb_per_s"] for row in rows if row["kind"] == "copy" and row["gb_per_s"]]
    speed = f" A copy: {copied[-1]:.0f} GB/s, read and written." if copied else ""
    return with_text(f"Forward and backward; ratios to BatchNorm2d and ReLU.{speed}", header, lines)


def extra_a_layer(sides):
    """Microseconds that each Kalman layer adds to a chain's step."""
    theirs, ours = sides["batch_norm"], sides["kalman_norm"]
    # From the median ratio, which varies less than the ratio of the medians.
    return 1e3 * theirs["median_ms"] * (ours["ratio_to_batch_norm"] - 1) / ours["depth"]


def chains(rows):
    lines = []
    for _, sides in measured(rows, "chain"):
        if "batch_norm" not in sides or "kalman_norm" not in sides:
            continue
        ours = sides["kalman_norm"]
        shape = [ours[name] for name in ("depth", "channels", "batch", "mode")]
        lines.append([*shape, milliseconds(sides["batch_norm"]), ratio(ours), f"{extra_a_layer(sides):.0f}",
                      ratio(sides.get("kalman_norm_monte_carlo"))])  # fmt: skip
    header = ["layers", "width", "batch", "mode", "BatchNorm", "KN / BN", "extra µs a layer", "Monte-Carlo / BN"]
    return with_text("Chains of convolution, norm and ReLU on 16 x 16 maps.", header, lines)


def inference(rows):
    others = ("to_batchnorm", "kalman_norm", "one_by_one", "group_norm")
    lines = [
        [*described(next(iter(sides.values()))), milliseconds(sides.get("batch_norm")),
         *(ratio(sides.get(method), quartiles=True) for method in others)]
        for _, sides in measured(rows, "inference")
    ]  # fmt: skip
    header = ["network", "batch", "size", "mode", "type", "BatchNorm", "after to_batchnorm", "KN in eval()",
              "KN, each sample by itself", "GroupNorm"]  # fmt: skip
    return with_text("In `eval()`, ratios to BatchNorm.", header, lines)


def failures(rows):
    """The cases that could not be measured, with each error once for a case."""
    reasons = {}
    for row in rows:
        if row["error"]:
            reasons.setdefault((row["case"], row["error"]), []).append(NAMES.get(row["method"], row["method"]))
    return "\n".join(f"- `{case}`, {', '.join(methods)}: {error}" for (case, error), methods in reasons.items())
