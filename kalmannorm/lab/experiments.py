"""Experiments: each a YAML file with a question, or a table of the paper, and its arms.

``docs/reproduce.md`` lists all keys of a file. Files that it names (``base``, ``of``, ``start``, ``run``) are searched
in its own folder, then among the experiments of this package.
"""

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIGS, STUDIES = Path(__file__).parent / "configs", Path(__file__).parent / "studies"
# The forms of Kalman Normalization, by the option --kalman: method, options, and suffixes of the arm's name and label.
# The paper's number is shown for the first two, as the paper does not say which of them it is of.
FORMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "paper": ("kn-paper", {}, "", ""),
    "released": ("kn-released", {}, "-released", ", released code"),
    "default": ("kn", {}, "-default", ", our default"),
    "standardized": ("kn", {"weight_standardization": True}, "-standardized", ", ours with standardized filters"),
}
# The forms that are run by default.
DEFAULT_FORMS = ("paper", "default", "standardized")
# Settings that a scale multiplies.
_LENGTHS = (("trainer", "max_steps"), ("trainer", "val_check_interval"), (None, "checkpoint_every"))
# Their values at the tiny scale, if `tiny` does not say others.
_TINY = {"trainer": {"max_steps": 6, "val_check_interval": 3}, "checkpoint_every": 3}
_NEEDED = ("title", "arms")
# libyaml's loader is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEYS = (
    *_NEEDED, "question", "of", "only", "base", "config", "scored", "metric", "search", "search_seed", "search_scale",
    "seeds", "start", "tiny", "rows", "label", "column", "columns", "model", "input_stats", "verdict",
)  # fmt: skip
_KEYS_OF_ARM = (
    "label", "column", "config", "model", "search", "start", "note", "tiny", "base", "reported", "baseline", "run",
    "analysis", "kalman",
)  # fmt: skip


def _is_verdict(value: Any) -> bool:
    numbers = [value.get(key) for key in ("guessing", "images")] if isinstance(value, dict) else []
    return not value or (len(numbers) == 2 and all(type(number) in (int, float) for number in numbers))


# Keys with plain values: the default, the check, and the expected value in words.
_RULES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "scored": ("test", lambda value: value in ("test", "validation"), "'test' or 'validation'"),
    "metric": ("accuracy_running", lambda value: isinstance(value, str) and value != "", "the name of a score"),
    "seeds": (3, lambda value: type(value) is int and value >= 1, "a whole number from 1 on"),
    "search_seed": (100, lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    "search_scale": (1, lambda value: type(value) in (int, float) and 0 < value <= 1, "a number above 0, up to 1"),
    "verdict": ({}, _is_verdict, "guessing and images, two numbers"),
    "rows": ([], lambda value: isinstance(value, list), "a list of labels"),
}
_ANALYSES = ("", "parameters", "speed", "variance_gap")
_KEYS_OF_BASE = ("base", "tiny", "note", "input_stats")

Scale = float | Literal["tiny"]
Split = Literal["validation", "test"]
Place = str | dict[str, str]


@dataclass(frozen=True)
class Start:
    """The arm whose weights trainings start from, and the split that its runs are scored on."""

    path: Path
    arm: str
    scored: Split


@dataclass(frozen=True)
class Arm:
    """One of the configurations that an experiment compares; for its keys in the file see ``docs/reproduce.md``.

    Attributes:
        config: The configuration for ``fit``, without the searched settings.
        note: A note for the table.
        notes: Notes for the page: each choice that the paper leaves open.
        reported: The paper's number by metric.
        baseline: The name of the arm whose final accuracy it is to reach; empty if there is none.
        run: The ``(experiment, arm)`` whose training it uses; itself by default.
        form: The form of Kalman Normalization, a key of `FORMS`; empty for another method.
    """

    name: str
    label: Place
    column: Place
    config: dict[str, Any]
    tiny: dict[str, Any]
    search: dict[str, list[Any]] = field(default_factory=dict)
    start: Start | None = None
    note: str = ""
    notes: tuple[str, ...] = ()
    reported: dict[str, float] = field(default_factory=dict)
    baseline: str = ""
    run: tuple[str, str] = ("", "")
    analysis: str = ""
    form: str = ""

    def points(self) -> list[dict[str, Any]]:
        """All combinations of the searched settings' values; empty without a search."""
        if not self.search:
            return []
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

    def scaled(self, scale: Scale, settings: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
        """The configuration for `kalmannorm.lab.fitting.fit`, with these searched settings and this seed.

        The scale multiplies steps and intervals; ``"tiny"`` merges in the settings of `tiny`.
        """
        if scale == "tiny":
            config = merge(self.config, self.tiny)
        elif 0 < scale < math.inf:
            config = copy.deepcopy(self.config)
            for section, key in _LENGTHS:
                place = config.get(section, {}) if section else config
                if key in place and scale != 1:
                    place[key] = max(1, round(place[key] * scale))
        else:
            raise ValueError(f"--scale: expected tiny, or a number above 0; got {scale:g}")
        for setting, value in (settings or {}).items():
            config = merge(config, nested(setting, value))
        return merge(config, {"seed_everything": seed})

    def places(self, metric: str) -> Iterator[tuple[str, str, str]]:
        """Metric, row and column of each of its numbers in a table of the paper.

        ``metric`` is used if neither row nor column names one.
        """
        named = next((each for each in (self.label, self.column) if isinstance(each, Mapping)), {metric: ""})
        for each in named:
            row, column = (place[each] if isinstance(place, Mapping) else place for place in (self.label, self.column))
            yield each, row, column


@dataclass(frozen=True)
class Experiment:
    """A question, and the arms that are trained to answer it; for the keys of its file see ``docs/reproduce.md``.

    Attributes:
        source: Its argument on the command line: the name of an experiment of this package, or a file.
        metric: The score that the search maximizes, on validation images; the figure shows it too.
    """

    name: str
    source: str
    title: str
    question: str
    scored: Split
    metric: str
    search_seed: int
    search_scale: float
    seeds: int
    arms: tuple[Arm, ...]
    rows: tuple[str, ...] = ()
    verdict: dict[str, float] = field(default_factory=dict)

    @property
    def is_table(self) -> bool:
        """Whether it is laid out as a table of the paper, each number in its own cell."""
        return any(arm.reported or isinstance(arm.label, dict) or isinstance(arm.column, dict) for arm in self.arms)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base``, updated by ``over``; mappings in both are merged, all else is replaced.

    A mapping with numbers as keys, such as milestones, is replaced.
    """
    merged = dict(copy.deepcopy(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        both = both and all(isinstance(name, str) for name in value)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def tables() -> list[str]:
    """Names of the tables and figures of the paper, and of experiments laid out like them."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def names() -> list[str]:
    return tables() + sorted(path.stem for path in STUDIES.glob("*.yaml"))


def read(name: str | Path) -> Experiment:
    """Read an experiment of this package, such as ``"table8"``, or of a YAML file.

    Example:
        >>> [arm.name for arm in read("table2").arms if arm.form == "paper"]
        ['inception-v2-kn', 'resnet101-kn', 'resnet50-kn']
    """
    places = (CONFIGS / f"{name}.yaml", STUDIES / f"{name}.yaml", Path(name))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"no experiment or file {str(name)!r}; experiments are {', '.join(names())}")
    try:
        # Files of this package do not change, so they are cached.
        return _known(path) if path.parent in (CONFIGS, STUDIES) else _parsed(path)
    except (TypeError, AttributeError, KeyError, RecursionError) as error:  # a value of the wrong type
        raise ValueError(f"{path} is no experiment's file: {type(error).__name__}: {error}") from error


def _parsed(path: Path) -> Experiment:
    content = _content(path)
    for key in _NEEDED:
        if not content.get(key):
            raise ValueError(f"{path}: an experiment needs {', '.join(_NEEDED)}; got no {key}")
    plain: dict[str, Any] = {}
    for key, (default, holds, words) in _RULES.items():
        plain[key] = content.get(key, default)
        if not holds(plain[key]):
            raise ValueError(f"{path}: {key} must be {words}; got {plain[key]!r}")
    scored, metric = plain["scored"], plain["metric"]
    arms = tuple(_arms(path, content, metric))
    for arm in arms:
        _check_data(path, arm, scored)
    plain |= {key: " ".join(str(content.get(key, "")).split()) for key in ("title", "question")}
    plain["rows"], plain["verdict"] = tuple(plain["rows"]), plain["verdict"] or {}
    source = path.stem if path.parent in (CONFIGS, STUDIES) else str(path)
    experiment = Experiment(path.stem, source, arms=arms, **plain)
    check_search_seed(str(path), experiment)
    return experiment


_known = functools.cache(_parsed)


def config_of(name: str | Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration for ``fit`` of an arm, or of a file of settings with its bases.

    If the arm starts from weights, the settings of the command line must name a file.

    Example:
        >>> config_of("table8/resnet32-kn-bs2")["model"]["init_args"]["normalization"]
        'kn-paper'
    """
    if Path(name).is_file():
        return {key: value for key, value in _based(Path(), str(name)).items() if key not in _KEYS_OF_BASE}
    experiment, _, arm = str(name).partition("/")
    if experiment not in names():
        raise ValueError(f"no arm or file {str(name)!r}; arms are NAME/ARM, with names {', '.join(names())}")
    found = {each.name: each for each in read(experiment).arms}
    if arm not in found:
        raise ValueError(f"no arm {str(name)!r}; those of {experiment} are {', '.join(found)}")
    start = found[arm].start
    if start and not any(word.startswith("--model.init_args.weights") for word in settings):
        where = f"{start.path.stem}/{start.arm}"
        raise ValueError(f"{name} starts from the weights of {where}: give --model.init_args.weights FILE")
    return found[arm].config


def check_search_seed(source: str, experiment: Experiment) -> None:
    """Raise a ValueError if the search has the seed of a final run: its settings would be fitted to that seed."""
    if experiment.search_seed < experiment.seeds and any(arm.search for arm in experiment.arms):
        raise ValueError(
            f"{source}: search_seed must not be one of the {experiment.seeds} seeds of the final runs, 0 to "
            f"{experiment.seeds - 1}; got {experiment.search_seed}"
        )


def load(path: Path) -> dict[str, Any]:
    """The content of a YAML file, without its bases."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values; got {type(content).__name__}")
    return content


def _content(path: Path) -> dict[str, Any]:
    """A file's content, merged over that of the file in its ``of``; each ``model`` is merged into its ``config``."""
    content = _with_config(path, "", load(path))
    for part in ("arms", "columns"):
        if part in content:
            content[part] = _named(path, part, content[part])
    columns = set(content.get("columns", ()))
    if "of" in content:
        whole = _file(path, f"{content['of']}.yaml")
        if not whole.is_file():
            raise ValueError(f"{path}: there is no file {whole} that it could be of")
        content = merge(_content(whole), content)
    if columns:
        of_arms = {str(arm.get("column", content.get("column"))) for arm in content.get("arms", {}).values()}
        if unknown := columns - of_arms:
            raise ValueError(f"{path}: columns has {', '.join(sorted(unknown))}, which is the column of no arm")
    if "only" in content:
        arms, only = _mapping(path, "arms", content.get("arms")), content.pop("only")
        if not isinstance(only, list) or not set(only) <= set(arms):
            raise ValueError(f"{path}: only must be a list of arms, of {', '.join(arms)}; got {only!r}")
        content["arms"] = {name: arms[name] for name in only}
    return content


def _named(path: Path, part: str, given: Any) -> dict[str, dict[str, Any]]:
    """The arms or columns of a file, by name; YAML reads some names as numbers."""
    named = {str(key): _with_config(path, f"{part}.{key}", keys) for key, keys in _mapping(path, part, given).items()}
    if len(named) < len(given or ()):
        raise ValueError(f"{path}: {part} has one name twice, as a number and as a text; got {list(given)}")
    return named


def _with_config(path: Path, place: str, given: Any) -> dict[str, Any]:
    """The keys of a file, a column or an arm, with the settings of ``model`` in ``config``."""
    keys = dict(_mapping(path, place, given, _KEYS_OF_ARM if place else _KEYS))
    if "model" in keys:
        prefix = f"{place}." if place else ""
        config, model = (_mapping(path, prefix + key, keys.pop(key, None)) for key in ("config", "model"))
        keys["config"] = merge(config, {"model": {"init_args": model}})
    return keys


def _file(path: Path, name: str) -> Path:
    """The path of a file that another one names: in its folder, or else in this package."""
    places = (path.parent, STUDIES, CONFIGS, CONFIGS / "bases")
    return next((place / name for place in places if (place / name).is_file()), path.parent / name)


def _based(path: Path, bases: str | Sequence[str]) -> dict[str, Any]:
    """The bases that a file names, merged in order."""
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        other = _file(path, base)
        if not other.is_file():
            raise ValueError(f"{path}: there is no file {other} to base it on")
        content = load(other)
        merged = merge(merge(merged, _based(other, content.pop("base", []))), content)
    return merged


def shown(value: Any) -> str:
    """A searched setting's value as text, for tables and folders."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _arms(path: Path, content: Mapping[str, Any], metric: str) -> Iterator[Arm]:
    whole = _based(path, content.get("base", []))
    own = {key: _mapping(path, key, content.get(key)) for key in ("config", "tiny")}
    own |= {key: content[key] for key in ("input_stats",) if key in content}
    taken: dict[tuple[str, str], str] = {}
    baseline = ""
    for key, given in _mapping(path, "arms", content["arms"]).items():
        name, place = str(key), f"arms.{key}"
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{path}: an arm's name must be of letters, digits and '_.+-'; got {name!r}")
        raw = _with_shared(content, given)
        baseline = name if raw.get("baseline") else baseline
        based = merge(merge(whole, _based(path, raw.get("base", []))), own)
        for form in FORMS if raw.get("kalman") else ("",):
            formed = _of_form(name, raw, form)
            arm = _arm(path, place, formed, based, metric, baseline)
            for _, row, column in arm.places(""):
                if (other := taken.setdefault((row, column), arm.name)) != arm.name:
                    where = f"label {row!r}, column {column!r}"
                    raise ValueError(f"{path}: {place} has the place of arms.{other} in the table: {where}")
            yield arm


def _with_shared(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's keys, with those of its column in ``columns`` and of the file for what it does not say."""
    shared = {part: content[part] for part in ("label", "column", "start", "search") if part in content}
    column = str(given.get("column", content.get("column")))
    own = {"search": given["search"]} if "search" in given else {}  # whole: `{}` is none
    return shared | merge(content.get("columns", {}).get(column, {}), given) | own


def _of_form(name: str, raw: Mapping[str, Any], form: str) -> dict[str, Any]:
    """An arm's keys in the file, with its name, and with a form of Kalman Normalization if it has one."""
    given = {**raw, "name": name, "form": form}
    if not form:
        return given
    method, options, ending, suffix = FORMS[form]
    given["name"] += ending
    normalization = {"normalization": method, "normalization_options": options}
    given["config"] = merge({"model": {"init_args": normalization}}, raw.get("config") or {})
    for key in ("run", "start"):  # the other arm has the same form
        if raw.get(key):
            given[key] += ending
    if form not in ("paper", "released"):
        given["reported"] = {}
    # If the columns are methods, the column gets the suffix.
    named = "column" if "KN" in str(raw.get("column", "")) else "label"
    place = raw.get(named, name)
    given[named] = {key: text + suffix for key, text in place.items()} if isinstance(place, Mapping) else place + suffix
    return given


def _arm(path: Path, place: str, raw: Mapping[str, Any], whole: Mapping[str, Any], metric: str, baseline: str) -> Arm:
    bare = {key: value for key, value in whole.items() if key not in (*_KEYS_OF_BASE, "config")}
    own = _mapping(path, f"{place}.config", raw.get("config"))
    config = _with_input_stats(merge(merge(bare, whole["config"]), own), whole.get("input_stats"))
    tiny = merge(merge(_TINY, whole.get("tiny", {})), _mapping(path, f"{place}.tiny", raw.get("tiny")))
    run, notes = (path.stem, raw["name"]), dict(whole.get("note", {}))
    if "run" in raw:
        other, _, arm_name = raw["run"].partition("/")
        arms = {arm.name: arm for arm in read(_file(path, f"{other}.yaml")).arms}
        if arm_name not in arms:
            raise ValueError(f"{path}: {place}.run must be NAME/ARM, of a file beside this one; got {raw['run']!r}")
        shared = arms[arm_name]
        config, tiny, run, notes = shared.config, shared.tiny, shared.run, dict(enumerate(shared.notes))
    for part in (("model", "class_path"), ("data", "class_path"), ("trainer", "max_steps")):
        if not isinstance(config.get(part[0]), Mapping) or part[1] not in config[part[0]]:
            raise ValueError(f"{path}: {place} must say {'.'.join(part)}, itself, in config or in a base; got none")
    if raw.get("analysis", "") not in _ANALYSES:
        raise ValueError(f"{path}: {place}.analysis must be one of {', '.join(_ANALYSES[1:])}; got {raw['analysis']!r}")
    note = raw.get("note", "")
    notes |= note if isinstance(note, Mapping) else {}
    label, column = _text(raw.get("label", raw["name"])), _text(raw.get("column", metric))
    reported = raw.get("reported", {})
    if not isinstance(reported, Mapping):
        named = next((each for each in (label, column) if isinstance(each, Mapping)), {metric: ""})
        reported = {next(iter(named)): reported}
    return Arm(
        raw["name"], label, column, config, tiny, _search(path, f"{place}.search", raw.get("search")),
        _start(path, place, raw.get("start")), "" if isinstance(note, Mapping) else " ".join(str(note).split()),
        tuple(notes.values()), dict(reported), baseline, run, raw.get("analysis", ""), raw["form"],
    )  # fmt: skip


def _with_input_stats(config: dict[str, Any], input_stats: Any) -> dict[str, Any]:
    """The configuration; Kalman Normalization gets the input's statistics, if its options do not say others."""
    given = config.get("model", {}).get("init_args", {})
    if input_stats is None or not str(given.get("normalization", "")).startswith("kn"):
        return config
    return merge({"model": {"init_args": {"normalization_options": {"input_stats": input_stats}}}}, config)


def _text(given: Any) -> Place:
    return dict(given) if isinstance(given, Mapping) else str(given)


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
    other = _file(path, f"{name}.yaml")
    if not other.is_file():
        raise ValueError(f"{path}: {place}.start must be NAME/ARM, of a file beside this one; got {given!r}")
    whole = read(other)
    arm = next((arm for arm in whole.arms if arm.name == arm_name), None)
    if arm is None or arm.search or arm.start:
        raise ValueError(
            f"{path}: {place}.start must be an arm of {name} that has no search and no start itself; got {given!r}"
        )
    if arm.run != (name, arm_name):  # the arm uses another one's training
        return _start(path, place, "/".join(arm.run))
    return Start(other, arm_name, whole.scored)


def _check_data(path: Path, arm: Arm, scored: str) -> None:
    """Raise a ValueError if settings would be chosen without validation images, or on test images."""
    for config in (arm.config, arm.scaled("tiny")):
        held_out = config["data"].get("init_args", {}).get("validation")
        if (arm.search or scored == "validation") and held_out in ("test", 0):
            raise ValueError(
                f"{path}: arms.{arm.name} needs validation images: data.init_args.validation must be a number above 0; "
                f"got {held_out!r}"
            )


def _mapping(path: Path, place: str, given: Any, known: Sequence[str] = ()) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {place} must hold keys and values; got {given!r}")
    for key in given if known else ():
        if key not in known:
            where = f"{place}: " if place else ""
            raise ValueError(f"{path}: {where}unknown key {key!r}; known are {', '.join(known)}")
    return given


def nested(setting: str, value: Any) -> dict[str, Any]:
    """A setting such as ``model.init_args.rate`` and its value, as a nested mapping."""
    for key in reversed(setting.split(".")):
        value = {key: value}
    return dict(value)
