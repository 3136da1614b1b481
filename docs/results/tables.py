"""Makes the tables of results that no study makes: ``python docs/results/tables.py [FILE]`` writes tables.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
BOTH = ("accuracy_running", "accuracy_online")


def mean(values: pd.Series, digits: int = 2) -> str:
    """Mean, and standard deviation where there are several values."""
    known = values.dropna()
    if known.empty:
        return ""
    spread = f" ± {known.std():.{digits}f}" if len(known) > 1 else ""
    return f"{known.mean():.{digits}f}{spread}"


def by(runs: pd.DataFrame, keys: Sequence[str], scores: Sequence[str], scale: float = 100, digits: int = 2) -> str:
    """A table with a row for each value of the keys, in their order in the file."""
    rows = [
        [*(f"{key:g}" if isinstance(key, float) else str(key) for key in found), str(len(group))]
        + [mean(scale * group[score], digits) for score in scores]
        for found, group in runs.groupby(list(keys), sort=False)
    ]
    return markdown([*keys, "runs", *scores], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('_', ' ') for cell in line)} |" for line in lines)


def final(path: Path) -> pd.DataFrame:
    """A study's runs that count."""
    runs = pd.read_csv(path)
    return runs[runs.kind == "final"]


def pairs(one: str, other: str, file: str, other_file: str | None = None) -> list[str]:
    """Seed by seed, by how much the first arm's `eval()` is better, in points."""
    scores = []
    for arm, path in ((one, file), (other, other_file or file)):
        runs = final(HERE / path)
        scores.append(100 * runs[runs.arm == arm].set_index("seed").accuracy_running)
    gained = (scores[0] - scores[1]).dropna()
    return [one, other, Path(file).parent.name, str(len(gained)), mean(gained), f"{gained.sem():.2f}"]


def figure5() -> pd.DataFrame:
    """Of each run, the mean over the layers of the relative gap between a batch's variance and the running one."""
    rows = []
    for path in sorted((HERE / "figure5-cpu").glob("*.csv")):
        arm, seed = path.stem.rsplit("-seed-", 1)
        # By what a layer normalizes: BatchNorm by what it sees, KN by its posterior.
        estimate = "observation" if arm.startswith("bn") else "posterior"
        layers = pd.read_csv(path)
        gaps = layers.variance_gap[(layers.reference == "population") & (layers.estimate == estimate)]
        rows.append({"arm": arm, "seed": int(seed), "layers": len(gaps), "mean": gaps.mean(), "median": gaps.median()})
    return pd.DataFrame(rows)


def sections() -> Iterator[tuple[str, str, str]]:
    """Title, a sentence, and table of each."""
    yield (
        "Figure 5 of the paper, of the small Inception",
        "How far the variance that a batch of 2 is normalized by is from the running one, over the running one: of a "
        "network the mean and the median over its layers; then mean and deviation over the seeds. From `figure5-cpu`.",
        by(figure5(), ["arm", "layers"], ["mean", "median"], scale=1, digits=3),
    )
    yield (
        "The demo",
        "Test images, in per cent. From `demo.csv`.",
        by(pd.read_csv(HERE / "demo.csv"), ["method"], BOTH),
    )
    yield (
        "One image: the last 30 % of a training",
        "Validation images, in per cent. From `priors/settled.csv`; arms `kn-1` and `kn-1-late` of `annealed-cpu` have "
        "the other two ways.",
        by(pd.read_csv(HERE / "priors/settled.csv"), ["how", "rate"], BOTH),
    )
    yield (
        "Signals, handed on",
        "Test samples, in per cent. From `priors/signals-carry`.",
        by(final(HERE / "priors/signals-carry/runs.csv"), ["arm"], BOTH),
    )
    yield (
        "Looks, one or two seeds each",
        "Validation, in per cent. From `priors/looks.csv`.",
        by(pd.read_csv(HERE / "priors/looks.csv"), ["task", "what"], ["running", "online"]),
    )
    for title, file in (("Priors inflated, or remembered", "inflated.csv"), ("Handed on", "handed-on.csv")):
        runs = pd.read_csv(HERE / "priors" / file)
        runs["loss"] = runs.last_loss / 100
        yield (
            title,
            f"Validation images, accuracy in per cent. From `priors/{file}`.",
            by(runs, ["variant", "statistics_batch"], ["loss", "validation_running", "validation_online"]),
        )
    screen = pd.read_json(HERE / "priors/screen.jsonl", lines=True)
    yield (
        "The screen of priors",
        "One seed, 3,000 validation images, accuracy in per cent. From `priors/screen.jsonl`.",
        by(screen, ["name"], ["loss", "run", "online"], scale=1),
    )
    search = pd.read_csv(HERE / "priors/deeper-search.csv")
    yield (
        "A deeper network, with a search",
        "ResNet-26; the search is of half of the steps, on validation images, one seed; the others of test images. "
        "In per cent. From `priors/deeper-search.csv`.",
        by(search.rename(columns={"model.init_args.rate": "rate"}), ["arm", "kind", "rate"], BOTH),
    )
    detected = ["box_ap", "mask_ap", "box_ap50", "mask_ap50"]
    lower = pd.read_csv(HERE / "priors/detection-lower-rate.csv")
    yield (
        "Detection, GroupNorm at a lower rate",
        "The study's search (seed 100) had preferred it by 0.8 points of boxes. Validation images, in per cent. From "
        "`priors/detection-lower-rate.csv`.",
        by(lower.rename(columns={"model.init_args.rate": "rate"}), ["arm", "kind", "rate"], detected),
    )
    handed, carry, first = "priors/handed-on-cpu/runs.csv", "kn-2-carry-03", "priors/batch-sizes-carry/runs.csv"
    yield (
        "Seed by seed",
        "By how many points `eval()` of the one is better than that of the other: mean, deviation, standard error.",
        markdown(
            ["one", "other", "study", "pairs", "gained", "standard error"],
            [
                pairs("no-spread", "default", "studies/choose-cpu/runs.csv"),
                pairs(carry, "kn-2", handed),
                pairs(carry, "kn-2", handed.replace("cpu", "longer-cpu")),
                pairs("kn-2", "kn-2", first, "studies/batch-sizes-cpu/runs.csv"),
            ],
        ),
    )


def main(page: Path) -> None:
    """Write the page."""
    text = "# Tables that no study makes\n\nMade by `python docs/results/tables.py`, from the files beside it.\n"
    for title, says, table in sections():
        text += f"\n## {title}\n\n{says}\n\n{table}\n"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tables.md")
