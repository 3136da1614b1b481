"""A verdict in words on an experiment's arms: which is best, and which differ by more than seeds do."""

import math
from collections.abc import Mapping, Sequence

from kalmannorm.lab.formatting import mean_and_deviation, two_digits, with_spread

# Means differ if their difference is more than this many standard deviations between seeds.
BEYOND = 2.0


def verdict(
    accuracies: Mapping[str, Sequence[float]],
    seconds: Mapping[str, float],
    guessing: float,
    images: int,
    split: str = "test",
) -> str:
    """The best method in words, given each method's accuracies over seeds, 0 to 1, and seconds a step.

    ``guessing`` is the share of the largest class among the scored images, which are ``images`` of the split.
    """
    found = {label: mean_and_deviation(values) for label, values in accuracies.items()}
    means, deviations = ({label: pair[place] for label, pair in found.items()} for place in (0, 1))
    best, *others = sorted(means, key=lambda label: -means[label])
    per_cent = with_spread([100 * value for value in accuracies[best]], 1)
    accuracy = f"{best} has the highest accuracy, {per_cent} % of {images} {split} images"
    # The standard error of the mean over seeds.
    error = deviations[best] / math.sqrt(len(accuracies[best]))
    if means[best] <= guessing + max(BEYOND * error, 1 / images):
        return f"No method learned anything in these runs: {accuracy}, and guessing gives {100 * guessing:.1f} %."
    if min(len(values) for values in accuracies.values()) < 2:
        ahead = [f"{100 * (means[best] - means[o]):.1f} points above {o}" for o in others]
        more = f", {joined(ahead)}" if ahead else ""
        return f"{accuracy}{more}. A single seed does not show how much of that is chance: use --seeds 3 or more."
    beaten, even = [], []
    for other in others:
        points = 100 * (means[best] - means[other])
        spread = 100 * math.sqrt((deviations[best] ** 2 + deviations[other] ** 2) / 2)
        if points > max(BEYOND * spread, 100 / images):
            times = f"{two_digits(points / spread)} times the deviation between seeds" if spread else "all seeds alike"
            beaten.append(f"{other} by {points:.1f} points ({times})")
        else:
            even.append(f"{other} ({points:.1f} points, where seeds deviate by {spread:.1f})")
    parts = [f"{accuracy}."]
    if beaten:
        parts.append(f"It beats {joined(beaten)}.")
    if even:
        parts.append(f"There is no difference beyond the spread to {joined(even)}.")
    choice = [best, *(other for other in others if any(each.startswith(f"{other} (") for each in even))]
    cheapest = min(choice, key=lambda label: seconds[label])
    if len(choice) > 1 and cheapest != best:
        parts.append(f"Of these, a step of {cheapest} takes the least time.")
    return " ".join([*parts, _cost(best, others, seconds)]).strip()


def _cost(best: str, others: Sequence[str], seconds: Mapping[str, float]) -> str:
    ratios = [f"{seconds[best] / seconds[other]:.2f} times {other}'s" for other in others]
    return f"A step of {best} takes {1000 * seconds[best]:.1f} ms, {joined(ratios)}." if ratios else ""


def joined(texts: Sequence[str]) -> str:
    """Texts as ``a, b and c``."""
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
