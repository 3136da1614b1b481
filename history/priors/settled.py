"""At one image, what lets `eval()` score as online statistics do? Variants of the last 30 % of a training, on the CPU.

The network, images and seeds of the study `annealed-cpu`, scored on its validation images.

    KALMANNORM_DATA=../shared/data python docs/results/priors/settled.py --how corrected --rate 0.3 --seed 0

- ``constant``, ``late``: that study's arms `kn-1` and `kn-1-late`: a gain that stays, or falls to a thousandth.
- ``corrected``: as ``late``, but what the falling gain takes from the posterior is given to the prior. When it begins
  to fall, each layer notes its prior and its running statistics. From then on the prior's mean gets a shift and its
  variance a factor, each a channel, such that with these two the mean posterior stays what it was at any gain. Nothing
  is remembered after that moment, and gradients flow through the prior as ever.
- ``corrected variance``: the factor alone.
- ``frozen``: `kalmannorm.freeze`: from then on by running statistics, which stay, as does the affine map.
- ``frozen statistics``: the same, but the affine map is learned on.

A line of the CSV file is appended with each run.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.lab import study_file
from kalmannorm.lab.fitting import fit
from kalmannorm.lab.training import Classifier, quiet

WAYS = ("constant", "late", "corrected", "corrected variance", "frozen", "frozen statistics")


class Noted(NamedTuple):
    """What a layer notes when its gain begins to fall: the gain, its prior and the mean posterior, ``(C,)`` each."""

    gain: float
    prior: Gaussian
    posterior: Gaussian


class Layer(kn.KalmanNorm2d):
    """The default layer, whose prior may be corrected."""

    noted: Noted | None = None
    newest: Gaussian | None = None
    shifts = True

    def _prior_for_kernel(self, x: Tensor, groups: int) -> Gaussian | None:
        prior = super()._prior_for_kernel(x, groups)
        if prior is None:
            return None
        if self.training:
            self.newest = prior.map(lambda t: t.detach().flatten(1)[0].clone())
        return prior if self.noted is None else self._corrected(prior, self.noted)

    def _corrected(self, prior: Gaussian, noted: Noted) -> Gaussian:
        """The prior with which the mean posterior at today's gain is the noted one, were all else as then."""
        now = self.gain_of_one()
        shown_mean = (noted.posterior.mean - (1 - noted.gain) * noted.prior.mean) / noted.gain
        shown_var = (noted.posterior.var - (1 - noted.gain) * noted.prior.var) / noted.gain
        shift = (noted.posterior.mean - now * shown_mean) / (1 - now) - noted.prior.mean
        factor = ((noted.posterior.var - now * shown_var) / ((1 - now) * noted.prior.var)).clamp_min(0.05)
        shape = (1, -1, *[1] * (prior.mean.ndim - 2))
        mean = prior.mean + shift.view(shape) if self.shifts else prior.mean
        return Gaussian(mean, prior.var * factor.view(shape))

    def gain_of_one(self) -> float:
        """The gain that one image has."""
        return float(torch.as_tensor(self.kalman_gain(1)).detach())

    def note(self) -> None:
        """The gain begins to fall."""
        if self.newest is None:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        posterior = Gaussian(self.running_mean.clone(), self.running_var.clone())
        noise = self.process_variance()
        assert noise is not None
        prior = Gaussian(self.newest.mean, self.newest.var + noise.detach())
        self.noted = Noted(self.gain_of_one(), prior, posterior)


class Settling(Classifier):
    """A classifier that is settled late, in one of `WAYS`."""

    def __init__(self, *args: Any, how: str = "constant", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.how, self.begins = how, math.ceil(0.7 * self._optimization[1])
        for layer in self.layers():
            layer.__class__ = Layer
            layer.shifts = how == "corrected"  # type: ignore[assignment]

    def layers(self) -> list[Any]:
        """The normalization layers."""
        return [module for module in self.network.modules() if isinstance(module, kn.KalmanNorm2d)]

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Settle once, then lower the gains."""
        if self.global_step == self.begins:
            if self.how.startswith("corrected"):
                for layer in self.layers():
                    layer.note()
            elif self.how == "frozen":
                kn.freeze(self.network)
            elif self.how == "frozen statistics":
                for layer in self.layers():
                    layer.frozen = True
        super().on_before_optimizer_step(optimizer)


def main() -> None:
    """Train once, and append a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=WAYS, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, default=Path("settled.csv"))
    given = parser.parse_args()
    quiet()
    falls = given.how == "late" or given.how.startswith("corrected")
    arm = next(arm for arm in study_file.read("annealed-cpu").arms if arm.name == ("kn-1-late" if falls else "kn-1"))
    config = arm.config(1.0, {"model.init_args.rate": given.rate}, given.seed)
    given_to = config["model"]["init_args"]
    config["model"] = {"class_path": "settled.Settling", "init_args": given_to, "dict_kwargs": {"how": given.how}}
    with tempfile.TemporaryDirectory() as folder:
        result = fit(config, Path(folder), split="validation")
    row = {
        "how": given.how, "rate": given.rate, "seed": given.seed, "last_loss": f"{result.last_loss:.6g}",
        **{name: f"{value:.4f}" for name, value in result.scores.items()}, **result.environment,
    }  # fmt: skip
    anew = not given.output.is_file()
    with given.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if anew:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
