"""EvalNorm (Singh and Shrivastava, 2019): does a blend of an image's own and the running statistics score better?

``python -m benchmarks.evalnorm --output docs/results/evalnorm.csv`` trains arms of the study `batch-sizes-cpu` at the
rates that its search chose, and scores each network with several shares of the image's own statistics;
``python -m benchmarks.evalnorm --summary docs/results/evalnorm.csv`` prints the page ``docs/results/evalnorm.md``.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from kalmannorm.inference import tracking_layers
from kalmannorm.lab import experiments, fitting

STUDY = "batch-sizes-cpu"
ARMS = ("kn-1", "kn-1-ws-fixed", "bn-2", "bn-128")
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7)
SEEDS = 3


@contextmanager
def evalnorm(network: nn.Module, alpha: float) -> Iterator[None]:
    """Normalize each image by a blend of its own and the running statistics: EvalNorm (Singh and Shrivastava, 2019).

    With an image's mean ``m`` and variance ``v`` in a channel, and the running ones ``M`` and ``V``, the blend is a
    mixture of both:

        mean = alpha m + (1 - alpha) M        var = alpha v + (1 - alpha) V + alpha (1 - alpha) (m - M)^2

    The paper (arXiv:1904.06031) estimates a share of the mean and one of the variance for each layer. Here one share
    serves for both in all layers, and is to be chosen on validation images. 0 is plain ``eval()``.

    Args:
        network: In ``eval()``, with BatchNorm or Kalman layers that have running statistics.
        alpha: From 0 to 1.

    Raises:
        ValueError: ``alpha`` is out of range, or the network is in training or has no running statistics.
    """
    layers = tracking_layers(network).values()
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1; got {alpha}")
    if not layers or any(layer.training for layer in layers):
        raise ValueError(f"evalnorm expects a network in eval() with running statistics; got {type(network).__name__}")
    hooks = [layer.register_forward_pre_hook(partial(_blended, alpha)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blended(alpha: float, layer: Any, args: tuple[Tensor, ...]) -> Tensor:
    """Forward pre-hook: change the input so that running statistics normalize it as the blend would the original."""
    x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
    shape = (-1, x.shape[1], *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(x.reshape(*x.shape[:2], -1), 2, correction=0)
    shift = mean - layer.running_mean
    blend = alpha * var + (1 - alpha) * layer.running_var + alpha * (1 - alpha) * shift.square()
    scale = ((layer.running_var + layer.eps) / (blend + layer.eps)).sqrt().view(shape)
    centre = layer.running_mean.view(shape)
    moved: Tensor = (x - centre - alpha * shift.view(shape)) * scale + centre
    return moved.to(args[0].dtype)


def accuracy(network: nn.Module, loader: object, share: float) -> float:
    """The accuracy of a network in ``eval()``, on all images of a loader."""
    right = total = 0
    with torch.no_grad(), evalnorm(network, share):
        for images, labels in loader:  # type: ignore[attr-defined]
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def trial(arm: str, rate: float, seed: int, folder: Path) -> list[dict[str, object]]:
    """Train one network, and score it with every share on both splits."""
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
    """The rate of each arm's final runs."""
    rows = pd.read_csv(f"docs/results/studies/{STUDY}/runs.csv", low_memory=False)
    final = rows[(rows.kind == "final") & rows.arm.isin(ARMS)]
    rates = final.groupby("arm")["model.init_args.rate"].first()
    return {arm: float(rates[arm]) for arm in ARMS}


def summary(rows: pd.DataFrame) -> str:
    """A page with a row for each arm: plain ``eval()``, and EvalNorm with the best share on validation images."""
    lines = [
        "# EvalNorm",
        "",
        "Each image is normalized by a blend of its own and the running statistics",
        "(`benchmarks.evalnorm.evalnorm`).",
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
