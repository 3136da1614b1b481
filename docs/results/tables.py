"""Makes the tables of results that no study makes: ``python docs/results/tables.py [FILE]`` writes tables.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kalmannorm.lab.formatting import as_markdown, format_value

HERE = Path(__file__).parent
BOTH = ("accuracy_running", "accuracy_online")
RATE = "model.init_args.rate"


class Means(NamedTuple):
    """A table of the means of a file."""

    title: str
    says: str
    file: str
    keys: Sequence[str]
    """Columns by whose values the rows of the file go together."""
    shares: Sequence[str]
    """Columns that are shown in per cent."""
    others: Sequence[str] = ()


MEANS = (
    Means("The demo", "Test images.", "demo.csv", ["method"], BOTH),
    Means(
        "One image: the last 30 % of a training",
        "Validation images; arms `kn-1` and `kn-1-late` of `annealed-cpu` have the other two ways.",
        "priors/settled.csv",
        ["how", "rate"],
        BOTH,
    ),
    Means(
        "Signals, handed on",
        "Test samples (the search: validation samples).",
        "priors/signals-carry/runs.csv",
        ["arm", "kind", RATE],
        BOTH,
    ),
    Means(
        "Batch Renorm, its schedule shortened and nothing else",
        "Test images (the search: validation images). In the studies its averages have forgotten their start.",
        "priors/renorm-shortened.csv",
        ["study", "kind", RATE],
        BOTH,
    ),
    Means("Looks", "One or two seeds each, validation.", "priors/looks.csv", ["task", "what"], ["running", "online"]),
    *(
        Means(
            title,
            "Validation images.",
            f"priors/{file}",
            ["variant", "statistics_batch"],
            ["validation_running", "validation_online"],
            ["last_loss"],
        )
        for title, file in (("Priors inflated, or remembered", "inflated.csv"), ("Handed on", "handed-on.csv"))
    ),
    Means(
        "The screen of priors",
        "One seed, 3,000 validation images; `run` and `online` are accuracies in per cent.",
        "priors/screen.jsonl",
        ["name"],
        [],
        ["run", "online", "loss"],
    ),
    Means(
        "A deeper network, with a search",
        "ResNet-26; the search is of half of the steps, on validation images, one seed; the others of test images.",
        "priors/deeper-search.csv",
        ["arm", "kind", RATE],
        BOTH,
    ),
    Means(
        "Detection, GroupNorm at a lower rate",
        "The search, one seed, had preferred it by 0.8 points of boxes. Validation images.",
        "priors/detection-lower-rate.csv",
        ["arm", "kind", RATE],
        ["box_ap", "mask_ap", "box_ap50", "mask_ap50"],
    ),
)


def read(file: str) -> pd.DataFrame:
    """A file of results."""
    path = HERE / file
    return pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_csv(path)


def means(runs: pd.DataFrame, keys: Sequence[str], shares: Sequence[str], others: Sequence[str] = ()) -> str:
    """A table with a row for each value of the keys, in their order in the file."""
    rows = [[*(key.rpartition(".")[2].replace("_", " ") for key in keys), "runs"]]
    rows[0] += [score.replace("_", " ") for score in (*shares, *others)]
    for found, group in runs.groupby(list(keys), sort=False):
        named = [f"{key:g}" if isinstance(key, float) else str(key) for key in found]
        scores = [format_value(score, list(100 * group[score].dropna())) for score in shares]
        rows.append([*named, str(len(group)), *scores, *(format_value(score, list(group[score])) for score in others)])
    return as_markdown(rows)


def figure5() -> pd.DataFrame:
    """Of each run, the mean over the layers of the relative gap between a batch's variance and the running one."""
    rows = []
    for path in sorted((HERE / "figure5-cpu").glob("*.csv")):
        arm = path.stem.rpartition("-seed-")[0]
        # By what a layer normalizes: BatchNorm by what it sees, KN by its posterior.
        estimate = "observation" if arm.startswith("bn") else "posterior"
        layers = pd.read_csv(path)
        gaps = layers.variance_gap[(layers.reference == "population") & (layers.estimate == estimate)]
        rows.append([arm, len(gaps), gaps.mean(), gaps.median()])
    return pd.DataFrame(rows, columns=["arm", "layers", "variance_gap", "variance_gap_median"])


def pairs(one: str, other: str, file: str, other_file: str | None = None) -> list[str]:
    """Seed by seed, by how much the first arm's `eval()` is better, in points."""
    scores = []
    for arm, path in ((one, file), (other, other_file or file)):
        runs = read(path)
        counted = runs[(runs.kind == "final") & (runs.arm == arm)]
        scores.append(100 * counted.set_index("seed").accuracy_running)
    gained = (scores[0] - scores[1]).dropna()
    study = Path(file).parent.name
    return [one, other, study, str(len(gained)), format_value("gained", list(gained)), f"{gained.sem():.2f}"]


def sections() -> Iterator[tuple[str, str, str]]:
    """Title, a sentence, and table of each."""
    yield (
        "Figure 5 of the paper, of the small Inception",
        "How far the variance that a batch of 2 is normalized by is from the running one, over the running one: of a "
        "network the mean and the median over its layers; then mean and deviation over the seeds. From `figure5-cpu`.",
        means(figure5(), ["arm", "layers"], [], ["variance_gap", "variance_gap_median"]),
    )
    for title, says, file, keys, shares, others in MEANS:
        yield title, f"{says} Scores in per cent. From `{file}`.", means(read(file), keys, shares, others)
    handed, carry, first = "priors/handed-on-cpu/runs.csv", "kn-2-carry-03", "priors/batch-sizes-carry/runs.csv"
    yield (
        "Seed by seed",
        "By how many points `eval()` of the one is better than that of the other: mean, deviation, standard error.",
        as_markdown(
            [
                ["one", "other", "study", "pairs", "gained", "standard error"],
                pairs("no-spread", "default", "studies/choose-cpu/runs.csv"),
                pairs(carry, "kn-2", handed),
                pairs(carry, "kn-2", handed.replace("cpu", "longer-cpu")),
                pairs("kn-2", "kn-2", first, "studies/batch-sizes-cpu/runs.csv"),
            ]
        ),
    )


def main(page: Path) -> None:
    """Write the page."""
    text = "# Tables that no study makes\n\nMade by `python docs/results/tables.py`, from the files beside it.\n"
    for title, says, table in sections():
        text += f"\n## {title}\n\n{says}\n\n{table}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tables.md")
