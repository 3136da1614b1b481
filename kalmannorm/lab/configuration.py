"""A run's configuration: jsonargparse parses, completes and checks it, and builds the objects."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from kalmannorm.lab.experiments import load
from kalmannorm.lab.training import quiet

# Runs are counted in steps, not epochs, and our own callbacks write the files of a run.
_TRAINER: dict[str, Any] = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
# The base class of each of the other parts.
BASES = {"model": lightning.LightningModule, "data": lightning.LightningDataModule}


class _Parser(ArgumentParser):
    """Accepts overrides if a function makes the network: jsonargparse 4.53 then passes it an unknown argument."""

    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **kwargs: Any) -> list[str]:
        return super().add_function_arguments(*args, **kwargs)


def _parser() -> ArgumentParser:
    """The parser of a configuration, with the settings that follow from others."""
    parser = _Parser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_class_arguments(lightning.Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    parser.set_defaults({f"trainer.{name}": value for name, value in _TRAINER.items()})
    for part, kind in BASES.items():
        parser.add_subclass_arguments(kind, part, fail_untyped=False, required=True)
    parser.add_argument("--checkpoint_every", type=int, default=1000, help="Steps between two checkpoints.")
    parser.link_arguments("trainer.max_steps", "model.init_args.steps")
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


class Run:
    """A complete, checked configuration; `build` makes the objects."""

    def __init__(self, config: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
        quiet()
        self.parser = _parser()
        try:
            self.config = self.parser.parse_object(dict(config))
            if overrides:
                self.config = self.parser.parse_args(list(overrides), namespace=self.config)
        except ArgumentError as error:
            raise ValueError(reason(error)) from error
        if self.config.trainer.max_steps < 1:
            raise ValueError(f"trainer.max_steps must be at least 1; got {self.config.trainer.max_steps}")

    def build(self, *callbacks: lightning.Callback) -> tuple[lightning.Trainer, Any, Any]:
        """The trainer, the module and the data."""
        lightning.seed_everything(self.config.seed_everything, workers=True, verbose=False)
        try:
            made = self.parser.instantiate(self.config)
            given = made.trainer.callbacks or []
            own = given if isinstance(given, list) else [given]
            trainer = lightning.Trainer(**{**made.trainer, "callbacks": [*own, *callbacks]})
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(reason(error)) from error
        return trainer, made.model, made.data

    def complete(self) -> dict[str, Any]:
        """All settings, as plain types."""
        whole: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))
        return whole


def reason(error: Exception) -> str:
    """The error of a module or its data, without jsonargparse's list of the types that it tried."""
    found = re.search(r"Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>", str(error), re.DOTALL)
    about_a_module = re.search(r"class 'lightning\.\S+Module'>, <class 'NoneType'>", str(error))
    return " ".join((found[1] if found and about_a_module else str(error)).split())


def check_same(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError if the folder holds a run of another configuration.

    ``stored`` is by default read from the folder's ``config.yaml``; a folder without one passes.
    """
    path = folder / "config.yaml"
    if stored is None:
        stored = load(path) if path.is_file() else config
        if difference(stored, config):  # options may have been added since the run
            stored = Run(stored).complete()
    if found := difference(stored, config):
        key, before, now = found
        raise ValueError(f"{folder} holds a run with another configuration: {key} is {before} there; got {now}")


def difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs between two configurations, with both values; None if they are equal."""
    before, now = flat(stored), flat(given)
    both = ((key, before.get(key, "nothing"), now.get(key, "nothing")) for key in dict.fromkeys([*now, *before]))
    return next((each for each in both if not _are_equal(*each[1:])), None)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal, or paths of the same file."""
    both = isinstance(one, str) and isinstance(other, str)
    return one == other or (both and Path(one).resolve() == Path(other).resolve())


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one from dotted names to values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
