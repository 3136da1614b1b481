"""Studies: a question, and the arms of the experiment that answers it, written as one YAML file.

A file of ``studies`` has ``title``, ``question`` and ``arms``, and perhaps:

- ``of``: another study's file beside this one, that this one is merged onto: the same arms at another size.
- ``base``: a recipe's file, or several, relative to this one, that all configurations are merged onto.
- ``config``: what all arms have in common, as ``kalmannorm fit`` takes it.
- ``search``: from a setting, as ``model.init_args.rate``, to the values to try; a grid over several. Every arm is
  searched so, by its ``metric`` on validation images, from the seed ``search_seed``, in runs of the share
  ``search_scale`` of the steps (1).
- ``seeds``: how many trainings of each arm count, with seeds 0, 1, ..., of which ``search_seed`` is none; ``scored``:
  on which images, ``test`` or ``validation``. With ``validation``, no run looks at test images.
- ``start``: ``STUDY/ARM``, from another study's file beside this one: an arm without a search, whose weights (of seed
  0, at the same scale) all trainings start from, as ``model.init_args.weights``. It is trained first if it was not yet.
- ``tiny``: what to change so that a training takes seconds on a CPU, on generated images.

An arm has a ``config`` of its own and perhaps a ``label`` (its row in the table), a ``column``, a ``search`` or a
``start`` in place of the study's, a ``note`` to stand below the table, and a ``tiny``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmannorm.lab import recipes
from kalmannorm.lab.recipes import Recipe, Scale, merge

if TYPE_CHECKING:
    from kalmannorm.lab.fitting import Split

__all__ = ["STUDIES", "Arm", "Start", "Study", "check_search_seed", "names", "read", "shown"]

STUDIES = Path(__file__).parent / "studies"
_NEEDED = ("title", "question", "arms")
_OPTIONAL = (
    "of", "base", "config", "scored", "metric", "search", "search_seed", "search_scale", "seeds", "start", "tiny",
)  # fmt: skip
_KEYS = (*_NEEDED, *_OPTIONAL)
_KEYS_OF_ARM = ("label", "column", "config", "search", "start", "note", "tiny")


@dataclass(frozen=True)
class Start:
    """Whose weights trainings start from.

    Attributes:
        path: Of another study's file.
        arm: One of its arms.
        scored: Which images that study's runs are scored on.
    """

    path: Path
    arm: str
    scored: Split


@dataclass(frozen=True)
class Arm:
    """One of the things that a study compares.

    Attributes:
        name: In the file.
        label: Its row in the table.
        column: Its column in the table; the metric's name where the study has only one.
        note: What a reader of the table should know of it.
        search: From a setting to the values to try.
        recipe: What is trained, but for the searched settings.
        start: Whose weights it starts from; None for fresh ones.
    """

    name: str
    label: str
    column: str
    note: str
    search: dict[str, list[Any]]
    recipe: Recipe
    start: Start | None = None

    def points(self) -> list[dict[str, Any]]:
        """What to try: the searched settings, each with one of its values. Nothing where there is no search."""
        if not self.search:
            return []
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

    def config(self, scale: Scale, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """What `kalmannorm.lab.fitting.fit` takes.

        Args:
            scale: See `recipes.Recipe.scaled`.
            settings: Of the searched ones.
            seed: Of weights and order.
        """
        config = self.recipe.scaled(scale)
        for setting, value in settings.items():
            config = merge(config, _nested(setting, value))
        return merge(config, {"seed_everything": seed})


@dataclass(frozen=True)
class Study:
    """A question, and what is trained to answer it.

    Attributes:
        name: Of the file.
        title: Of the table.
        question: What is asked.
        scored: Which images the runs that count are scored on.
        metric: The score that the search maximizes, on validation images, and that the figure shows.
        search_seed: Of all runs of the search.
        search_scale: The share of the steps that these take.
        seeds: How many runs of each arm count.
        arms: In the order of the table.
    """

    name: str
    title: str
    question: str
    scored: Split
    metric: str
    search_seed: int
    search_scale: float
    seeds: int
    arms: tuple[Arm, ...]


def names() -> list[str]:
    """The studies that come with the laboratory."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read(name: str | Path) -> Study:
    """Read a study.

    Args:
        name: Such as ``"batch-sizes-cpu"``, or the path of a YAML file.

    Raises:
        ValueError: There is no such study or file, or the file is not of the form that is described above.

    Example:
        >>> [arm.name for arm in read("batch-sizes-cpu").arms]
        ['bn-128', 'bn-32', 'bn-8', 'bn-4', 'bn-2', 'bn-1', 'gn-2', 'brn-2',
         'kn-128', 'kn-32', 'kn-8', 'kn-4', 'kn-2', 'kn-1',
         'kn-1-annealed', 'kn-1-late',
         'bn-128-ws', 'gn-2-ws', 'gn-2-proxy', 'gn-2-ws-proxy',
         'kn-2-ws', 'kn-1-ws', 'kn-1-ws-fixed']
    """
    own = STUDIES / f"{name}.yaml"
    path = own if own.is_file() else Path(name)
    if not path.is_file():
        raise ValueError(f"no study or file {str(name)!r}; studies are {', '.join(names())}")
    content = _content(path)
    _check_keys(path, "", content, _KEYS)
    for key in _NEEDED:
        if not content.get(key):
            raise ValueError(f"{path}: a study needs {', '.join(_NEEDED)}; got no {key}")
    scored, metric = content.get("scored", "test"), content.get("metric", "accuracy_running")
    if scored not in ("test", "validation"):
        raise ValueError(f"{path}: scored must be 'test' or 'validation'; got {scored!r}")
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"{path}: metric must be the name of a score; got {metric!r}")
    seeds = {key: content.get(key, default) for key, default in (("seeds", 3), ("search_seed", 100))}
    for key, least in (("seeds", 1), ("search_seed", 0)):
        if isinstance(seeds[key], bool) or not isinstance(seeds[key], int) or seeds[key] < least:
            raise ValueError(f"{path}: {key} must be a whole number from {least} on; got {seeds[key]!r}")
    share = content.get("search_scale", 1)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{path}: search_scale must be a number above 0, up to 1; got {share!r}")
    arms = tuple(_arms(path, content, metric))
    for arm in arms:
        _check_data(path, arm, scored)
    title, question = (" ".join(str(content[key]).split()) for key in ("title", "question"))
    study = Study(path.stem, title, question, scored, metric, seeds["search_seed"], share, seeds["seeds"], arms)
    check_search_seed(str(path), study)
    return study


def check_search_seed(who: str, study: Study) -> None:
    """Refuse a search from a seed that counts: what it chose would be good by that seed's luck.

    Raises:
        ValueError: Seeds 0 to ``seeds - 1`` have it, and an arm is searched.
    """
    if study.search_seed < study.seeds and any(arm.search for arm in study.arms):
        raise ValueError(
            f"{who}: search_seed must not be one of the {study.seeds} seeds that count, 0 to {study.seeds - 1}; got "
            f"{study.search_seed}"
        )


def _content(path: Path) -> dict[str, Any]:
    """A file, on top of the study that it is of."""
    content: dict[str, Any] = recipes.load(path)
    if "of" not in content:
        return content
    whole = path.parent / f"{content['of']}.yaml"
    if not whole.is_file():
        raise ValueError(f"{path}: there is no file {whole} that it could be of")
    return merge(_content(whole), content)


def shown(value: Any) -> str:
    """A searched setting's value as tables and folders have it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _arms(path: Path, content: Mapping[str, Any], metric: str) -> list[Arm]:
    common, tiny = _common(path, content)
    found: dict[tuple[str, str], Arm] = {}
    for key, given in _mapping(path, "arms", content["arms"]).items():
        name, place = str(key), f"arms.{key}"
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{path}: an arm's name must be of letters, digits and '_.+-'; got {name!r}")
        arm = _mapping(path, place, given)
        _check_keys(path, place, arm, _KEYS_OF_ARM)
        config = merge(common, _mapping(path, f"{place}.config", arm.get("config")))
        for part in (("model", "class_path"), ("data", "class_path"), ("trainer", "max_steps")):
            if not isinstance(config.get(part[0]), Mapping) or part[1] not in config[part[0]]:
                raise ValueError(f"{path}: {place} must say {'.'.join(part)}, itself, in config or in a base; got none")
        small = merge(tiny, _mapping(path, f"{place}.tiny", arm.get("tiny")))
        searched = _search(path, f"{place}.search", arm["search"]) if "search" in arm else None
        if searched is None:
            searched = _search(path, "search", content.get("search"))
        label, column = str(arm.get("label", name)), str(arm.get("column", metric))
        note = " ".join(str(arm.get("note", "")).split())
        if (label, column) in found:
            other = found[label, column].name
            where = f"label {label!r}, column {column!r}"
            raise ValueError(f"{path}: {place} has the place of arms.{other} in the table: {where}")
        recipe = Recipe(f"{path.stem}/{name}", config, {}, small, f"{path.stem}/{name}")
        start = _start(path, place, arm.get("start", content.get("start")))
        found[label, column] = Arm(name, label, column, note, searched, recipe, start)
    return list(found.values())


def _common(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration that all arms start from, and what is changed of it for the scale ``"tiny"``."""
    bases = content.get("base", [])
    config: dict[str, Any] = {}
    tiny: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not (path.parent / base).is_file():
            raise ValueError(f"{path}: there is no file {path.parent / base} to base it on")
        recipe = recipes.read(path.parent / base)
        config, tiny = merge(config, recipe.config), merge(tiny, recipe.tiny)
    own = (_mapping(path, key, content.get(key)) for key in ("config", "tiny"))
    return merge(config, next(own)), merge(tiny, next(own))


def _search(path: Path, place: str, given: Any) -> dict[str, list[Any]]:
    search = _mapping(path, place, given)
    for setting, values in search.items():
        if not isinstance(setting, str) or not all(setting.split(".")) or setting == "seed_everything":
            raise ValueError(f"{path}: {place} must be of settings such as model.init_args.rate; got {setting!r}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: {place}.{setting} must be a list of values to try; got {values!r}")
        plain = all(isinstance(value, str | int | float | None) for value in values)
        if not plain or any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise ValueError(f"{path}: {place}.{setting} must be of plain, finite values; got {values!r}")
        if len({shown(value) for value in values}) < len(values):
            raise ValueError(f"{path}: {place}.{setting} must be of different values; got {values!r}")
    return search


def _start(path: Path, place: str, given: Any) -> Start | None:
    if given is None:
        return None
    name, _, arm_name = str(given).partition("/")
    other = path.parent / f"{name}.yaml"
    if not other.is_file():
        raise ValueError(f"{path}: {place}.start must be STUDY/ARM, of a study beside this one; got {given!r}")
    whole = read(other)
    arm = next((arm for arm in whole.arms if arm.name == arm_name), None)
    if arm is None or arm.search or arm.start:
        raise ValueError(
            f"{path}: {place}.start must be an arm of {name} that has no search and no start itself; got {given!r}"
        )
    return Start(other, arm_name, whole.scored)


def _check_data(path: Path, arm: Arm, scored: str) -> None:
    """Refuse what would choose by test images, or by none."""
    for config in (arm.recipe.config, arm.recipe.scaled("tiny")):
        held_out = config["data"].get("init_args", {}).get("validation")
        if (arm.search or scored == "validation") and held_out in ("test", 0):
            raise ValueError(
                f"{path}: arms.{arm.name} needs validation images: data.init_args.validation must be a number above 0; "
                f"got {held_out!r}"
            )


def _mapping(path: Path, place: str, given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {place} must hold keys and values; got {given!r}")
    return given


def _check_keys(path: Path, place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            where = f"{place}: " if place else ""
            raise ValueError(f"{path}: {where}unknown key {key!r}; known are {', '.join(known)}")


def _nested(setting: str, value: Any) -> dict[str, Any]:
    for key in reversed(setting.split(".")):
        value = {key: value}
    return dict(value)
