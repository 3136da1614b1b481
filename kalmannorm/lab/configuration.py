"""A run's configuration: parsed, completed, checked, and made into objects by LightningCLI."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from kalmannorm.lab.experiments import load, merge, nested
from kalmannorm.lab.training import quiet

# A run is so many steps, whatever an epoch is; and what its folder keeps, the callbacks here write.
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


class Run(LightningCLI):
    """A configuration, complete and checked; `build` makes the objects."""

    def __init__(self, config: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
        quiet()
        self._given, self._overrides = dict(config), list(overrides)
        try:
            super().__init__(
                lightning.LightningModule,
                lightning.LightningDataModule,
                save_config_callback=None,
                trainer_defaults=dict(_TRAINER),
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False},
                subclass_mode_model=True,
                subclass_mode_data=True,
                run=False,
                auto_configure_optimizers=False,
            )
        except ArgumentError as error:
            raise ValueError(reason(error)) from error
        if self.config.trainer.max_steps < 1:
            raise ValueError(f"trainer.max_steps must be at least 1; got {self.config.trainer.max_steps}")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What is not the trainer's, the module's or the data's, and what follows from other settings."""
        parser.add_argument("--checkpoint_every", type=int, default=1000, help="Steps between two checkpoints.")
        parser.link_arguments("trainer.max_steps", "model.init_args.steps")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The configuration, and the overrides onto it."""
        given, rest = _merged(self._given, self._overrides)
        self.config = parser.parse_object(given)
        if rest:
            self.config = parser.parse_args(rest, namespace=self.config)
        self.config.pop("config", None)

    def instantiate_classes(self) -> None:
        """Nothing yet."""

    def build(self, *callbacks: lightning.Callback) -> tuple[lightning.Trainer, Any, Any]:
        """The trainer, the module and the data."""
        lightning.seed_everything(self.config.seed_everything, workers=True, verbose=False)
        self.trainer_defaults["callbacks"] = list(callbacks)
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(reason(error)) from error
        return self.trainer, self.model, self.datamodule

    def complete(self) -> dict[str, Any]:
        """All settings, as plain types."""
        whole: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, format="yaml"))
        return whole


def _merged(config: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """With the overrides of the module's arguments, and the others.

    jsonargparse 4.53 raises an error for these beside a network that a function makes, not a class.
    """
    merged, rest = dict(config), []
    words = iter([part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])])
    for name in words:
        value = next(words, None)
        if name.startswith("--model.init_args.") and not name.endswith(("+", ".class_path")) and value is not None:
            merged = merge(merged, nested(name.removeprefix("--"), yaml.safe_load(value)))
        else:
            rest += [name] if value is None else [name, value]
    return merged, rest


def reason(error: Exception) -> str:
    """What is wrong with a module or its data; jsonargparse says so between other types that they might have been."""
    found = re.search(r"Errors:\s+- (.*?)\s+- Expected a <class 'NoneType'>", str(error), re.DOTALL)
    about_a_module = re.search(r"class 'lightning\.\S+Module'>, <class 'NoneType'>", str(error))
    return " ".join((found[1] if found and about_a_module else str(error)).split())


def check_same(folder: Path, config: Mapping[str, Any], there: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder of another run than of this configuration.

    What is there is by default what its ``config.yaml`` says, if there is one.
    """
    path = folder / "config.yaml"
    if there is None:
        there = load(path) if path.is_file() else config
        if difference(there, config):  # perhaps by defaults of options that are newer than the run
            there = Run(there).complete()
    if found := difference(there, config):
        key, before, now = found
        raise ValueError(f"{folder} holds a run with another configuration: {key} is {before} there; got {now}")


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs between two configurations, and what it is in both; None where none does."""
    before, now = flat(there), flat(here)
    both = ((key, before.get(key, "nothing"), now.get(key, "nothing")) for key in dict.fromkeys([*now, *before]))
    return next((each for each in both if not _are_equal(*each[1:])), None)


def _are_equal(there: Any, here: Any) -> bool:
    """Whether two values are equal, or two spellings of one file."""
    both = isinstance(there, str) and isinstance(here, str)
    return there == here or (both and Path(there).resolve() == Path(here).resolve())


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one, from names with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found
