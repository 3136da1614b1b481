"""``kalmannorm compare``: the same search and the same trainings with each normalization, on the user's images."""

import difflib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from PIL import Image
from rich.progress import track
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.lab.experiments import load, merge, nested
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.results import locked, write_atomically
from kalmannorm.lab.run import check_counts, run
from kalmannorm.lab.workers import available_cpus

if TYPE_CHECKING:
    from kalmannorm.lab.data.folders import FolderData

# Approximate statistics of images after `folders.image_transform`.
_INPUT_STATS = [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
# Settings of the configuration that have an option of their own.
_OPTIONS = {
    "model.init_args.rate": "rates", "model.init_args.normalization": "methods", "model.init_args.network": "network",
    "model.init_args.num_classes": "network", "model.init_args.statistics_batch": "statistics_batch",
    "model.init_args.weights": "weights", "data.init_args.folder": "folder", "data.init_args.size": "size",
    "data.init_args.gradient_batch": "gradient_batch", "trainer.max_steps": "steps",
}  # fmt: skip


def classifier(name: str, num_classes: int) -> nn.Module:
    """An untrained classifier with BatchNorm, from ``(N, 3, H, W)`` to ``(N, num_classes)``.

    Args:
        name: A model of torchvision, such as ``"resnet18"``, or of timm, such as ``"timm/resnet26d"``.
        num_classes: Number of logits.
    """
    return _classifier(name, num_classes, trained=False)


def _classifier(name: str, num_classes: int | None, *, trained: bool) -> nn.Module:
    """A classifier; ``num_classes=None`` keeps the library's number of classes, which trained weights need."""
    of_timm, own = name.startswith("timm/"), name.removeprefix("timm/")
    network: nn.Module
    if of_timm:
        import timm  # noqa: PLC0415 - slow

        known = timm.list_models()
    else:
        from torchvision import models  # noqa: PLC0415 - slow

        known = models.list_models(module=models)
    if own not in known:
        library = "timm" if of_timm else "torchvision"
        close = difflib.get_close_matches(own, known, 3) or ["resnet18", "mobilenet_v2", "efficientnet_b0"]
        raise ValueError(f"{library} has no classifier {own!r}; it has for example {', '.join(close)}")
    classes: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if of_timm:
        network = timm.create_model(own, pretrained=trained, **classes)
    else:
        # Without auxiliary heads, these two return logits alone.
        auxiliary = own in ("googlenet", "inception_v3") and not trained
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if auxiliary else {}
        network = models.get_model(own, weights="DEFAULT" if trained else None, **options, **classes)
    if not any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        raise ValueError(f"{name} has no BatchNorm, so there is nothing to compare")
    return network


def compare(
    folder: str,
    *,
    methods: str = "bn,gn,kn",
    statistics_batch: int = 2,
    gradient_batch: int | None = None,
    network: str = "resnet18",
    weights: str = "default",
    size: int = 64,
    steps: int = 1000,
    rates: str = "0.003,0.01,0.03,0.1",
    seeds: int = 3,
    workers: int | None = None,
    output: Path = Path("runs"),
    settings: Sequence[str] = (),
) -> int:
    """Find out which normalization to use on your images, at your batch size.

    Each method is trained in full at each rate and scored on validation images; then it is trained at its best rate
    from other seeds and scored on test images. The same command resumes an interrupted comparison, also with more
    methods, rates or seeds. The experiment is written to OUTPUT/compare.yaml, a file for `kalmannorm run`.

    Args:
        folder: Images, one folder for each class, optionally within train, val and test folders.
        methods: Methods to compare, separated by commas: some of bn, brn, gn, ln, in, wn, frozen, ghost, sync, mabn,
            cbn, evonorm, frn, kn, kn-paper, kn-released, gkn.
        statistics_batch: Images that are normalized together.
        gradient_batch: Images in a training step; by default as many as are normalized together.
        network: A classifier of torchvision with BatchNorm; or timm/NAME.
        weights: Initial weights: default for the library's trained weights, if they can be downloaded; none; or a file
            with a state dict.
        size: Side of the images, in pixels.
        steps: Training steps of each run.
        rates: Learning rates to search, separated by commas.
        seeds: Final runs of each method.
        workers: Processes that train at the same time; by default the number of GPUs, or else of CPUs.
        output: Folder for the runs, the table and the report.
        settings: Any setting of the configuration, such as --trainer.precision bf16-mixed.

    Returns:
        The exit code: 1 if a run failed. A run that diverged is a result.
    """
    check_counts(statistics_batch=statistics_batch, size=size, steps=steps, seeds=seeds, workers=workers)
    images = statistics_batch if gradient_batch is None else gradient_batch
    if images % statistics_batch or images < 1:
        raise ValueError(f"--gradient_batch: expected a multiple of statistics_batch={statistics_batch}; got {images}")
    keys = tuple(dict.fromkeys(name.strip() for name in methods.split(",")))
    for key in keys:
        if key not in METHODS:
            raise ValueError(f"--methods: unknown method {key!r}; expected some of {', '.join(METHODS)}")
    searched, more = _numbers(rates), _settings(settings)
    from kalmannorm.lab.configuration import Run, flat  # noqa: PLC0415 - slow, not needed for --help

    if Path(folder).is_dir():  # it goes before a folder of this name in KALMANNORM_DATA
        folder = str(Path(folder).resolve())
    data = _checked_data(folder, images, size, more.get("data", {}).get("init_args", {}))
    start = _start(network, weights, output)
    _check_methods(keys, network, data.num_classes, statistics_batch, size, start)
    _check_pictures(data)
    config = _config(network, data, statistics_batch, start, steps)
    question = _question(network, start, weights, images, statistics_batch, size, steps, flat(more))
    content: dict[str, Any] = {
        "title": f"Which normalization for {Path(folder).name}?",
        "question": question,
        "search": {"model.init_args.rate": searched},
        "seeds": seeds,
        "verdict": {"guessing": _largest_share(data), "images": len(data.test_set)},
        "input_stats": _INPUT_STATS,
        "config": merge(config, more),
        "arms": {key: {"label": METHODS[key].label, "model": {"normalization": key}} for key in keys},
    }
    Run(merge(content["config"], {"model": {"init_args": {"normalization": keys[0]}}}))  # raises if a setting is wrong
    with locked(output / "compare"):
        return run(str(_write_experiment(output, content)), seeds=seeds, workers=workers, output=output)


def _config(network: str, data: "FolderData", group: int, start: Path | None, steps: int) -> dict[str, Any]:
    """The configuration for `kalmannorm.lab.fitting.fit` that all methods share."""
    # On the CPU each training has one core, so data workers would only slow it down.
    workers = 4 if torch.cuda.is_available() else 0
    of_network = {"name": network, "num_classes": data.num_classes}
    model = {
        "network": {"class_path": "kalmannorm.lab.compare.classifier", "init_args": of_network},
        "num_classes": data.num_classes, "statistics_batch": group, "schedule": "warmup",
        **({} if start is None else {"weights": str(start)}),
    }  # fmt: skip
    of_data = {"folder": data.folder, "gradient_batch": data.gradient_batch, "size": data.size, "workers": workers,
               "pictures": data.found}  # fmt: skip
    return {
        "model": {"class_path": "kalmannorm.lab.training.Classifier", "init_args": model},
        "data": {"class_path": "kalmannorm.lab.data.folders.FolderData", "init_args": of_data},
        # Scored at the end only.
        "trainer": {"max_steps": steps, "val_check_interval": steps + 1},
        "checkpoint_every": min(1000, steps),
    }


def _question(
    network: str, start: Path | None, weights: str, images: int, group: int, size: int, steps: int, more: dict[str, Any]
) -> str:
    """The text below the title: how all methods are trained."""
    unavailable = "; its trained weights could not be had" if weights == "default" else ""
    begin = f"untrained{unavailable}" if start is None else "from trained weights"
    changes = f" But with {', '.join(f'{key} {value}' for key, value in more.items())}." if more else ""
    return (
        f"{network}, {begin}; {steps} steps of SGD with momentum 0.9, weight decay 0.0001 on weights alone, and a rate "
        f"that rises over the first tenth and falls to 0 along a cosine. {images} images a step, of which {group} at a "
        f"time are normalized together; random crops of {size} pixels, flipped or not. A seed fixes the order of the "
        f"images and the untrained weights, alike for all methods.{changes}"
    )


def _start(network: str, weights: str, output: Path) -> Path | None:
    """The file of initial weights; None to start untrained."""
    if weights == "none":
        return None
    if weights != "default":
        if not Path(weights).is_file():
            raise ValueError(f"--weights: expected default, none or a file; got {weights}")
        return Path(weights)
    kept = output / f"{network.replace('/', '-')}.pt"
    if kept.is_file():
        return kept
    try:
        state = _classifier(network, None, trained=True).state_dict()
    except (OSError, RuntimeError):  # no network, or the library has none
        return None
    own = set(classifier(network, 1000).state_dict())
    output.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in state.items() if name in own}, kept)  # without auxiliary heads
    return kept


def _numbers(rates: str) -> list[float]:
    try:
        numbers = [*dict.fromkeys(float(rate) for rate in rates.split(","))]
    except ValueError:
        raise ValueError(f"--rates: expected numbers separated by commas; got {rates!r}") from None
    if not all(0 < rate < math.inf for rate in numbers):
        raise ValueError(f"--rates: expected numbers above 0; got {rates!r}")
    return numbers


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """Settings from a command line: ``--trainer.precision bf16-mixed``, or with an equals sign."""
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    found: dict[str, Any] = {}
    for name, value in zip_longest(parts[::2], parts[1::2], fillvalue="--"):
        if "." not in name:
            raise ValueError(f"unknown option {name}")
        if value.startswith("--"):
            raise ValueError(f"{name}: expected a value")
        for setting, option in _OPTIONS.items():
            if f"{name}.".startswith(f"--{setting}."):
                raise ValueError(f"{name}: give {'FOLDER' if option == 'folder' else f'--{option}'} instead")
        found = merge(found, nested(name.removeprefix("--"), yaml.safe_load(value)))
    return found


def _checked_data(folder: str, images: int, size: int, more: dict[str, Any]) -> "FolderData":
    from kalmannorm.lab.data.folders import FolderData  # noqa: PLC0415

    try:
        data = FolderData(folder, images, size=size, **more)
    except TypeError as error:
        raise ValueError(f"--data.init_args: {error}") from error
    if data.validation == "test":
        raise ValueError("--data.init_args.validation: expected a share, as rates are chosen on validation images")
    data.setup()
    if data.num_classes < 2:
        raise ValueError(f"{folder}: expected images of at least 2 classes; got {data.classes}")
    if images > len(data.train_set):
        raise ValueError(f"--gradient_batch: expected at most the {len(data.train_set)} training images; got {images}")
    return data


def _check_pictures(data: "FolderData") -> None:
    """Decode every picture once, since a truncated one would end a training."""
    sets: list[Any] = [data.train_set, data.validation_set, data.test_set]
    sets = [part for part in sets if hasattr(part.dataset, "samples")]  # not Parquet files
    files = sorted({str(part.dataset.samples[index][0]) for part in sets for index in part.indices})
    with ThreadPoolExecutor(available_cpus()) as pool:
        found = pool.map(_broken, files)
        wrong = [text for text in track(found, "pictures", len(files), transient=True) if text]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: repair or remove it")


def _broken(file: str) -> str:
    try:
        with Image.open(file) as picture:
            picture.load()
            if picture.mode.startswith(("I", "F")):  # conversion to RGB would clip it to white or black
                return f"{file} has more than 8 bits a channel (mode {picture.mode}), expected 8"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{file} cannot be read as a picture ({error})"
    return ""


def _largest_share(data: "FolderData") -> float:
    """The share of the largest class among the test images, which is the accuracy of always guessing it."""
    for split, part in (("validation", data.validation_set), ("test", data.test_set)):
        if not len(part):
            raise ValueError(f"{data.folder}: no class has images enough to hold one out for {split}: expected 3")
    labels = torch.tensor(data.test_set.dataset.targets)[data.test_set.indices]  # type: ignore[attr-defined]
    return int(labels.bincount().max()) / len(labels)


def _check_methods(
    methods: Sequence[str], name: str, num_classes: int, statistics_batch: int, size: int, start: Path | None
) -> None:
    """Raise a ValueError for a size, weights or methods with which every run would fail."""
    network = classifier(name, num_classes).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"--size: {name} cannot take images of {size} pixels: {error}") from error
    if start is not None:
        from kalmannorm.lab.pretrained import load_trunk, trained_weights  # noqa: PLC0415 - slow

        load_trunk(network, trained_weights(start))
    for method in methods:
        if method == "frozen" and start is None:
            raise ValueError("--methods: 'frozen' keeps the statistics of a trained network: give --weights")
        try:
            normalize(classifier(name, num_classes), method, statistics_batch=statistics_batch)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--methods: {method} does not suit {name}: {error}") from error


def _write_experiment(output: Path, content: dict[str, Any]) -> Path:
    """Write the experiment's file; an existing one must have the same configuration, but may have other methods."""
    from kalmannorm.lab.configuration import difference  # noqa: PLC0415

    path = output / "compare.yaml"
    if path.exists():
        before = load(path)
        arms = before.get("arms", {}) | {key: arm for key, arm in content["arms"].items() if key not in before["arms"]}
        if found := difference(*({key: each[key] for key in ("config", "verdict")} for each in (before, content))):
            key, stored, given = found
            raise ValueError(f"--output: {output} holds a comparison with {key}={stored}; got {given}")
        content = content | {"arms": arms}
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, width=120))
    return path
