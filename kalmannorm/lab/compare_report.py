"""What a comparison of normalizations says: in words, in a table, and as a page."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.table import Table

from kalmannorm.lab import figures, report
from kalmannorm.lab.compare import Outcome, Plan, by_method
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.tables import mean_and_deviation, with_spread

__all__ = ["terminal_table", "verdict", "write_page"]

HEADER = ("", "rate", "accuracy, running stats", "accuracy, online stats", "last training loss", "ms a step")

# A difference of means counts where it is more than so many times the deviation between seeds.
BEYOND = 2.0


def verdict(
    accuracies: Mapping[str, Sequence[float]], seconds: Mapping[str, float], guessing: float, images: int
) -> str:
    """Which method to use, in words.

    Args:
        accuracies: For each method, by its label, a list over seeds, 0 to 1.
        seconds: For each, the seconds a step.
        guessing: Accuracy of a guess: the share of the largest class.
        images: Images that were scored.
    """
    found = {label: mean_and_deviation(values) for label, values in accuracies.items()}
    means, deviations = ({label: pair[place] for label, pair in found.items()} for place in (0, 1))
    best, *others = sorted(means, key=lambda label: -means[label])
    said = f"{best} has the highest accuracy, {_percent(accuracies[best])} % of {images} test images"
    # The mean over seeds is surer than one of them.
    error = deviations[best] / math.sqrt(len(accuracies[best]))
    if means[best] <= guessing + max(BEYOND * error, 1 / images):
        return f"No method learned anything in these runs: {said}, and guessing gives {100 * guessing:.1f} %."
    if min(len(values) for values in accuracies.values()) < 2:
        ahead = [f"{100 * (means[best] - means[o]):.1f} points above {o}" for o in others]
        more = f", {_listed(ahead)}" if ahead else ""
        return f"{said}{more}. With a single seed nothing says how much of that is chance: use --seeds 3 or more."
    beaten, even = [], []
    for other in others:
        points = 100 * (means[best] - means[other])
        spread = 100 * math.sqrt((deviations[best] ** 2 + deviations[other] ** 2) / 2)
        if points > max(BEYOND * spread, 100 / images):
            times = f"{points / spread:.2g} times the deviation between seeds" if spread else "all seeds alike"
            beaten.append(f"{other} by {points:.1f} points ({times})")
        else:
            even.append(f"{other} ({points:.1f} points, where seeds deviate by {spread:.1f})")
    parts = [f"{said}."]
    if beaten:
        parts.append(f"It beats {_listed(beaten)}.")
    if even:
        parts.append(f"There is no difference beyond the spread to {_listed(even)}.")
    choice = [best, *(other for other in others if any(each.startswith(f"{other} (") for each in even))]
    cheapest = min(choice, key=lambda label: seconds[label])
    if len(choice) > 1 and cheapest != best:
        parts.append(f"Of these, a step of {cheapest} takes the least time.")
    return " ".join([*parts, _cost(best, others, seconds)]).strip()


def _cost(best: str, others: Sequence[str], seconds: Mapping[str, float]) -> str:
    ratios = [f"{seconds[best] / seconds[other]:.2f} times {other}'s" for other in others]
    return f"A step of {best} takes {1000 * seconds[best]:.1f} ms, {_listed(ratios)}." if ratios else ""


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _percent(values: Sequence[float]) -> str:
    return with_spread([100 * value for value in values], 1)


def _rows(finished: Sequence[Outcome]) -> list[list[str]]:
    rows = []
    planned = Counter(outcome.method for outcome in finished)
    for key, own in by_method(finished).items():
        results = [outcome.result for outcome in own if outcome.result]
        if not results:
            continue
        losses = [outcome.last_loss for outcome in own]
        less = "" if len(own) == planned[key] else f" ({len(own)} of {planned[key]} runs)"
        rows.append([
            METHODS[key].label + less,
            f"{own[0].rate:g}",
            _percent([result.scores["accuracy_running"] for result in results]),
            _percent([result.scores["accuracy_online"] for result in results]),
            f"{mean_and_deviation(losses)[0]:.3f}",
            f"{1000 * statistics.median(result.seconds_per_step for result in results):.1f}",
        ])  # fmt: skip
    return rows


def _words(plan: Plan, finished: Sequence[Outcome]) -> str:
    groups = {METHODS[key].label: own for key, own in by_method(finished).items() if own}
    accuracies = {label: [outcome.accuracy for outcome in own] for label, own in groups.items()}
    seconds = {
        label: statistics.median(outcome.result.seconds_per_step for outcome in own if outcome.result)
        for label, own in groups.items()
    }
    said = verdict(accuracies, seconds, plan.guessing, plan.test_images)
    absent = [METHODS[key].label for key in plan.methods if METHODS[key].label not in groups]
    return f"{said} No run of {_listed(absent)} counts: each failed or diverged." if absent else said


def _warnings(plan: Plan, searched: Sequence[Outcome], finished: Sequence[Outcome]) -> list[str]:
    """What to know before trusting the numbers."""
    found = [f"Left out: {outcome.said}" for outcome in (*searched, *finished) if outcome.error]
    for key, own in by_method(finished).items():
        if own and len(plan.rates) > 1 and own[0].rate in (min(plan.rates), max(plan.rates)):
            found.append(
                f"{METHODS[key].label}: the best rate, {own[0].rate:g}, is at an end of those searched; "
                "a wider --rates may find a better one."
            )
    return found


def terminal_table(plan: Plan, finished: Sequence[Outcome]) -> Table:
    """The table, with the verdict under it."""
    title = f"{plan.network}, {plan.statistics_batch} images normalized together, {plan.gradient_batch} a step"
    table = Table(title=title, caption=_words(plan, finished), caption_justify="left")
    for name in HEADER:
        table.add_column(name, justify="right" if name else "left")
    for row in _rows(finished):
        table.add_row(*row)
    return table


def _command_line(plan: Plan) -> str:
    options = {
        "methods": ",".join(plan.methods), "statistics_batch": plan.statistics_batch,
        "gradient_batch": plan.gradient_batch, "network": plan.network, "size": plan.size, "steps": plan.steps,
        "rates": ",".join(f"{rate:g}" for rate in plan.rates), "seeds": plan.seeds,
    }  # fmt: skip
    return f"kalmannorm compare {plan.folder} " + " ".join(f"--{name} {value}" for name, value in options.items())


def write_page(
    path: Path, plan: Plan, searched: Sequence[Outcome], finished: Sequence[Outcome], processes: int
) -> Path:
    """Write the report to ``path``, and return it.

    Args:
        path: Of the HTML file.
        plan: What was compared.
        searched: The runs of the search, scored on validation images.
        finished: The runs that count, scored on test images.
        processes: How many trained at the same time.
    """
    groups = {key: own for key, own in by_method(finished).items() if own}
    runs = [
        figures.Runs(
            METHODS[key].label,
            METHODS[key].colour,
            [outcome.result.losses for outcome in own if outcome.result],
            {
                f"{kind} statistics": [100 * o.result.scores[f"accuracy_{kind}"] for o in own if o.result]
                for kind in ("running", "online")
            },
        )
        for key, own in groups.items()
    ]
    rates = {METHODS[key].label: [(o.rate, 100 * o.accuracy) for o in own] for key, own in by_method(searched).items()}
    first = next(outcome.result for own in groups.values() for outcome in own if outcome.result)
    warnings = [report.note(text) for text in _warnings(plan, searched, finished)]
    seeds = "1 seed" if plan.seeds == 1 else f"{plan.seeds} seeds"
    blocks = [
        report.verdict(_words(plan, finished)),
        *warnings,
        report.table(
            HEADER,
            _rows(finished),
            f"Accuracy in % on {plan.test_images} test images of {plan.num_classes} classes, an image being "
            f"{100 / plan.test_images:.2g} %; mean ± standard deviation over {seeds}. With running statistics, the "
            f"averages collected in training normalize, as in plain eval(); the verdict is on these. With online "
            f"statistics, each {plan.statistics_batch} test images normalize themselves; where a method keeps no "
            f"statistics the two are one. A step's time is the median; runs at the same time: {processes}.",
        ),
        report.heading("Learning curves"),
        report.figure(
            figures.learning(runs),
            "Left: training loss, mean over seeds and a band of one standard deviation. Right: test accuracy of each "
            "seed.",
        ),
        report.heading("The search for the rate"),
        report.figure(
            figures.search(rates, {method.label: method.colour for method in METHODS.values()}),
            "Accuracy on validation images by learning rate, with running statistics.",
        ),
        report.paragraph(
            f"Every method was trained at each of {len(plan.rates)} rates for all {plan.steps} steps from seed 0, and "
            f"scored on validation images, the test images out of sight. At its best rate it was then trained from "
            f"seeds 1 to {plan.seeds}, and scored on the test images once."
        ),
        report.heading("How it was made"),
        report.paragraph(
            f"torchvision's {plan.network}, untrained; {plan.steps} steps of SGD with momentum 0.9, weight decay "
            f"0.0001 on weights alone, and a rate that rises over the first tenth and falls to 0 along a cosine. "
            f"{plan.gradient_batch} images a step, of which {plan.statistics_batch} at a time are normalized together; "
            f"random crops of {plan.size} pixels, flipped or not. A seed fixes the initial weights and the order of "
            "the images, alike for all methods."
        ),
        report.command(_command_line(plan)),
        *(
            report.details(
                f"{METHODS[key].label}: configuration",
                [report.command(yaml.safe_dump(own[0].result.config, sort_keys=False))],
            )
            for key, own in groups.items()
            if own[0].result
        ),
        report.paragraph(", ".join(f"{name} {value}" for name, value in first.environment.items()) + "."),
    ]
    return report.write(path, f"Which normalization for {Path(plan.folder).name}?", blocks)
