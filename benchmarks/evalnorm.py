"""EvalNorm (Singh and Shrivastava, 2019): does a blend of an image's own and the running statistics score better?

``python -m benchmarks.evalnorm --output docs/results/evalnorm.csv`` trains arms of the study `batch-sizes-cpu` at the
rates that its search chose, and scores each network by every share of the image's own statistics;
``python -m benchmarks.evalnorm --summary docs/results/evalnorm.csv`` prints the page ``docs/results/evalnorm.md``.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
import torch

from kalmannorm.lab import experiments, fitting
from kalmannorm.lab.scoring import evalnorm

STUDY = "batch-sizes-cpu"
ARMS = ("kn-1", "kn-1-ws-fixed", "bn-2", "bn-128")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7)
SEEDS = 3


def accuracy(network: torch.nn.Module, loader: object, share: float) -> float:
    """Of a network in ``eval()``, on all images of a loader."""
    right = total = 0
    with torch.no_grad(), evalnorm(network, share):
        for images, labels in loader:  # type: ignore[attr-defined]
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def trial(arm: str, rate: float, seed: int, folder: Path) -> list[dict[str, object]]:
    """Train one network, and score it by every share on both splits."""
    settings = [f"--model.init_args.rate={rate}", f"--seed_everything={seed}", "--model.init_args.score_online=false"]
    fitting.fit(experiments.config_of(f"{STUDY}/{arm}"), folder, overrides=settings, split="validation")
    module, data = fitting.load_with_data(folder)
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    return [
        {"arm": arm, "rate": rate, "seed": seed, "split": split, "share": share,
         "accuracy": accuracy(module.network, loader, share)}
        for split, loader in loaders.items() for share in SHARES
    ]  # fmt: skip


def chosen_rates() -> dict[str, float]:
    """The rate of each arm's runs that count."""
    rows = pd.read_csv(f"docs/results/studies/{STUDY}/runs.csv", low_memory=False)
    final = rows[(rows.kind == "final") & rows.arm.isin(ARMS)]
    rates = final.groupby("arm")["model.init_args.rate"].first()
    return {arm: float(rates[arm]) for arm in ARMS}


def summary(rows: pd.DataFrame) -> str:
    """A page with a row an arm: plain ``eval()``, and EvalNorm by the share that is best on validation images."""
    lines = [
        "# EvalNorm",
        "",
        "Each image is normalized by a blend of its own and the running statistics",
        "(`kalmannorm.lab.scoring.evalnorm`).",
        f"The networks are arms of [batch-sizes-cpu](studies/{STUDY}/table.md), trained again. The share of an image's",
        "own statistics is the one that is best on validation images, in the mean over seeds. Accuracy in per cent on",
        f"test images; mean ± deviation over {SEEDS} seeds.",
        "",
        "| arm | plain `eval()` | EvalNorm | share |",
        "|---|---|---|---|",
    ]
    for arm, of_arm in rows.groupby("arm", sort=False):
        scores = of_arm.groupby(["split", "share"]).accuracy.agg(["mean", "std"]) * 100
        best = scores.loc["validation"]["mean"].idxmax()
        plain, blend = ("{:.1f} ± {:.1f}".format(*scores.loc["test", share]) for share in (0.0, best))
        lines.append(f"| {arm} | {plain} | {blend} | {best:g} |")
    return "\n".join(lines)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--summary", type=Path)
    given = parser.parse_args()
    if given.summary:
        print(summary(pd.read_csv(given.summary)))
    if given.output:
        rows: list[dict[str, object]] = []
        for arm, rate in chosen_rates().items():
            for seed in range(SEEDS):
                with tempfile.TemporaryDirectory() as folder:
                    rows += trial(arm, rate, seed, Path(folder) / "run")
                pd.DataFrame(rows).to_csv(given.output, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
