"""Recipes: what to train, written as short YAML files, one a cell of a table (or a curve of a figure).

A file is what ``kalmannorm fit`` takes (``seed_everything``, ``model``, ``data``, ``trainer``, ``checkpoint_every``)
and:

- ``base``: a file, or several, relative to this one, that it is merged onto; theirs may have bases of their own.
- ``run``: another recipe, whose training this is too: two tables that show one network train it once.
- ``cell``: its place in a table and the paper's number, see `Recipe.cell`. What cannot be trained (a count of
  parameters, a speed) is named by ``cell.analysis``.
- ``tiny``: what to change so that the training takes seconds on a CPU, on generated images.

Each folder of ``configs`` but ``bases`` is a table; its ``table.yaml`` gives its title and the order of its rows and
columns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

__all__ = ["CONFIGS", "Recipe", "Scale", "load", "merge", "names", "read", "tables"]

CONFIGS = Path(__file__).parent / "configs"
# Lengths of a training, which a scale multiplies.
_LENGTHS = (("trainer", "max_steps"), ("trainer", "val_check_interval"), (None, "checkpoint_every"))
_OURS = ("base", "run", "cell", "tiny")

Scale = float | Literal["tiny"]


@dataclass(frozen=True)
class Recipe:
    """A training and its place in a table.

    Attributes:
        name: Such as ``"table8/resnet32-kn-bs2"``.
        config: What ``fit`` takes; cells that train nothing have a model and data all the same.
        cell: ``table``; ``row`` and ``column``: a text, or one for each metric; ``reported``: the paper's number for
            each metric, in per cent where it is an accuracy or a precision; ``note``: a text, or several by subject,
            about what the paper leaves open; ``baseline``: the cell whose final accuracy this one is to reach;
            ``analysis``: what is computed instead of a training, or after it.
        tiny: What `scaled` merges onto ``config`` for the scale ``"tiny"``.
        run: Name of the recipe that this is a training of, for example its own.
    """

    name: str
    config: dict[str, Any]
    cell: dict[str, Any]
    tiny: dict[str, Any]
    run: str

    def scaled(self, scale: Scale = 1.0) -> dict[str, Any]:
        """The configuration of a shorter training.

        Args:
            scale: A share of the steps, schedules and intervals with them; or ``"tiny"``.

        Raises:
            ValueError: A share that is not above 0.
        """
        if scale == "tiny":
            return merge(self.config, self.tiny)
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale must be 'tiny' or a number above 0; got {scale}")
        config = copy.deepcopy(self.config)
        for section, key in _LENGTHS:
            place = config.get(section, {}) if section else config
            if key in place and scale != 1:
                place[key] = max(1, round(place[key] * scale))
        return config

    @property
    def notes(self) -> list[str]:
        """What the paper leaves open, and how it was chosen."""
        note = self.cell.get("note", {})
        return list(note.values()) if isinstance(note, Mapping) else [note]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with what ``over`` says; mappings in both are merged, all else is replaced."""
    merged = dict(copy.deepcopy(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def tables() -> list[str]:
    """The tables that there are recipes for."""
    folders = (folder for folder in CONFIGS.iterdir() if folder.is_dir() and folder.name != "bases")
    return sorted(folder.name for folder in folders if any(folder.glob("*.yaml")))


def names(table: str) -> list[str]:
    """The recipes of a table.

    Raises:
        ValueError: An unknown table.
    """
    if table not in tables():
        raise ValueError(f"no table {table!r}; known are {', '.join(tables())}")
    files = sorted((CONFIGS / table).glob("*.yaml"))
    return [f"{table}/{file.stem}" for file in files if file.stem != "table"]


def read(name: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        name: Such as ``"table8/resnet32-kn-bs2"``, or the path of a YAML file.

    Raises:
        ValueError: There is no such recipe or file, or the file is not of this form.

    Example:
        >>> read("table8/resnet32-kn-bs2").cell["column"]
        'ResNet-32, CIFAR-10'
    """
    own = CONFIGS / f"{name}.yaml"
    path = own if own.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(_unknown(str(name)))
    title = path.resolve().relative_to(CONFIGS).with_suffix("").as_posix() if _is_ours(path) else path.stem
    content = _merged(path)
    run = content.get("run", title)
    if run != title:
        trained = read(run)
        notes = {"note": trained.cell["note"]} if "note" in trained.cell else {}
        content = merge({**trained.config, "tiny": trained.tiny, "cell": notes}, content)
    config = {key: value for key, value in content.items() if key not in _OURS}
    return Recipe(title, config, content.get("cell", {}), content.get("tiny", {}), run)


def load(path: Path) -> dict[str, Any]:
    """The content of a YAML file, without its bases.

    Raises:
        ValueError: The file is not YAML, or not of keys and values.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(content).__name__}")
    return content


def _is_ours(path: Path) -> bool:
    return path.resolve().is_relative_to(CONFIGS)


def _merged(path: Path) -> dict[str, Any]:
    """A file's content on top of its bases'."""
    if not path.is_file():
        raise ValueError(f"there is no file {path} to base a recipe on")
    content = load(path)
    bases = content.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = merge(merged, _merged(path.parent / base))
    return merge(merged, content)


def _unknown(name: str) -> str:
    table = name.partition("/")[0]
    if table in tables():
        return f"no recipe {name!r}; those of {table} are {', '.join(names(table))}"
    return f"no recipe or file {name!r}; recipes are TABLE/CELL, with tables {', '.join(tables())}"
