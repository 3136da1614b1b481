"""Which arm of an experiment is best, in words: whether anything differs by more than its seeds do."""

import math
from collections.abc import Mapping, Sequence

from kalmannorm.lab.formatting import mean_and_deviation, with_spread

# A difference of means counts where it is more than so many times the deviation between seeds.
BEYOND = 2.0


def verdict(
    accuracies: Mapping[str, Sequence[float]], seconds: Mapping[str, float], guessing: float, images: int
) -> str:
    """Which method to use, in words, by accuracies over seeds, 0 to 1, and seconds a step of each.

    ``guessing`` is the share of the largest class among the images that were scored.
    """
    found = {label: mean_and_deviation(values) for label, values in accuracies.items()}
    means, deviations = ({label: pair[place] for label, pair in found.items()} for place in (0, 1))
    best, *others = sorted(means, key=lambda label: -means[label])
    per_cent = with_spread([100 * value for value in accuracies[best]], 1)
    said = f"{best} has the highest accuracy, {per_cent} % of {images} test images"
    # The mean over seeds is surer than one of them.
    error = deviations[best] / math.sqrt(len(accuracies[best]))
    if means[best] <= guessing + max(BEYOND * error, 1 / images):
        return f"No method learned anything in these runs: {said}, and guessing gives {100 * guessing:.1f} %."
    if min(len(values) for values in accuracies.values()) < 2:
        ahead = [f"{100 * (means[best] - means[o]):.1f} points above {o}" for o in others]
        more = f", {listed(ahead)}" if ahead else ""
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
        parts.append(f"It beats {listed(beaten)}.")
    if even:
        parts.append(f"There is no difference beyond the spread to {listed(even)}.")
    choice = [best, *(other for other in others if any(each.startswith(f"{other} (") for each in even))]
    cheapest = min(choice, key=lambda label: seconds[label])
    if len(choice) > 1 and cheapest != best:
        parts.append(f"Of these, a step of {cheapest} takes the least time.")
    return " ".join([*parts, _cost(best, others, seconds)]).strip()


def _cost(best: str, others: Sequence[str], seconds: Mapping[str, float]) -> str:
    ratios = [f"{seconds[best] / seconds[other]:.2f} times {other}'s" for other in others]
    return f"A step of {best} takes {1000 * seconds[best]:.1f} ms, {listed(ratios)}." if ratios else ""


def listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
