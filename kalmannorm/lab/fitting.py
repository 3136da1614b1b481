"""A run from a configuration to its result, in a folder that it can be resumed from."""

import os
import pickle
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from kalmannorm.lab.configuration import Run, check_same
from kalmannorm.lab.curve import Curve, RandomState
from kalmannorm.lab.experiments import Split, merge
from kalmannorm.lab.experiments import load as read
from kalmannorm.lab.results import Result, environment, finished, write_atomically


class _Folder(Callback):
    """Writes a run's configuration when it starts, and then its checkpoints."""

    def __init__(self, folder: Path, config: Mapping[str, Any], every: int) -> None:
        self.folder, self.config, self.every = folder, config, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not (self.folder / "config.yaml").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning calls this before a validation at the same step, which one that resumes from here would skip.
        if self._is_due(trainer) and not _validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._is_due(trainer):
            self.save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        # Between the batches that are accumulated to a step, gradients would be lost.
        whole = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        return whole and (trainer.global_step % self.every == 0 or trainer.global_step >= trainer.max_steps)

    def save(self, trainer: Trainer) -> None:
        """Write ``last.ckpt``, whole or not at all."""
        beside = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, self.folder / "last.ckpt")

    def finish(self, trainer: Trainer) -> None:
        """Keep what the end of training changed, such as recalibrated statistics; all else stays as after the last
        step, where a longer run goes on.
        """
        last, beside = self.folder / "last.ckpt", self.folder / "last.ckpt.part"
        is_there = trainer.is_global_zero and last.exists()
        kept = torch.load(last, map_location="cpu", weights_only=True) if is_there else {}
        # All processes do what the first one finds: to save is a step of all of them.
        if not trainer.strategy.broadcast(kept.get("global_step") == trainer.global_step):
            self.save(trainer)  # it was ended before its last step
            return
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save({**kept, "state_dict": weights}, beside)
            os.replace(beside, last)


def _validates_now(trainer: Trainer) -> bool:
    every = trainer.val_check_batch
    return trainer.enable_validation and every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0


def fit(
    config: Mapping[str, Any],
    folder: Path,
    tell: Callable[[int], None] = lambda step: None,
    overrides: Sequence[str] = (),
    split: Split | None = None,
    *,
    longer: bool = False,
) -> Result:
    """Train and score; go on with an interrupted run, and don't repeat a finished one.

    Args:
        config: What LightningCLI takes in subclass mode: ``model``, ``data``, ``trainer``,
            ``seed_everything``, and ``checkpoint_every``, in steps. The module's ``steps`` follow
            from ``trainer.max_steps``.
        folder: Where ``config.yaml``, ``last.ckpt``, ``curve.csv``, ``validations.csv`` and
            ``result.json`` go.
        tell: Called now and then with the number of steps done.
        overrides: More settings, as on a command line: ``["--trainer.max_steps=10"]``.
        split: Which images are scored at the end; with ``"validation"`` no test image is looked at.
            None for the test images, or those of validation where the data have no test split.
        longer: The folder may hold a run of the same configuration but fewer steps: it goes on from
            its end. From there on the rate and all else that follows from the number of steps is as
            in a training of so many steps.

    Raises:
        ValueError: Also where the folder holds another configuration, a run that was scored on
            another split, or another module's checkpoint.
        MissingDataError: The data set is not there.
    """
    folder = Path(folder)
    run = Run(config, overrides)
    whole = run.complete()
    if longer:
        _make_longer(folder, whole)
    check_same(folder, whole)
    if finished(folder):
        return _read(folder, split)
    if run.config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1; got {run.config.checkpoint_every}")
    curve = Curve(tell)
    checkpoints = _Folder(folder, whole, run.config.checkpoint_every)
    trainer, module, data = run.build(curve, RandomState(), checkpoints)
    chosen: Split = split or ("test" if _has(data, "test_dataloader") else "validation")
    if split is not None:
        _check_split(data, split)
    last = folder / "last.ckpt"
    if last.exists():
        _take_weights(module, last)  # Lightning's own error, later, would not say which file
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    except SystemExit as ended:  # so Lightning ends after Ctrl-C
        raise KeyboardInterrupt from ended
    checkpoints.finish(trainer)
    result = Result(
        config=whole,
        scores=_scored(trainer, module, data, chosen, may_be_none=split is None),
        seconds=curve.elapsed,
        seconds_per_step=statistics.median(curve.seconds),
        losses=curve.losses,
        validations=curve.validations,
        environment=environment(),
        split=chosen,
    )
    if trainer.is_global_zero:
        result.write(folder)
    return result


def _make_longer(folder: Path, whole: dict[str, Any]) -> None:
    """Make a run that has ended one that was interrupted at that step of this longer one."""
    before = _stored(folder).complete()
    length = whole["trainer"]["max_steps"]
    if before["trainer"]["max_steps"] < length:
        check_same(folder, whole, merge(before, {"trainer": {"max_steps": length}}))
        # In this order: what has no result goes on, whenever this is cut off.
        (folder / "result.json").unlink(missing_ok=True)
        write_atomically(folder / "config.yaml", yaml.safe_dump(whole, sort_keys=False))


def ended_run(config: Mapping[str, Any], folder: Path, split: Split | None = None) -> Result | None:
    """What `fit` gave of this configuration in this folder; None where it has not come to an end."""
    if not finished(folder):
        return None
    check_same(folder, Run(config).complete())
    return _read(folder, split)


def steps(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> int:
    return int(Run(config, overrides).config.trainer.max_steps)


def load(folder: Path) -> LightningModule:
    """The module that a run trained, on the CPU and in ``eval()``, from its configuration and last checkpoint."""
    module: LightningModule = _loaded(_stored(folder), folder)[1]
    return module.eval()


def load_with_data(folder: Path) -> tuple[LightningModule, Any]:
    """As `load`, and the data that it was trained on, set up."""
    _, module, data = _loaded(_stored(folder), folder)
    data.setup()
    return module.eval(), data


def score(folder: Path, split: Split, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Score a run's last checkpoint, perhaps with other settings; its folder does not change."""
    trainer, module, data = _loaded(_stored(folder, overrides), folder)
    _check_split(data, split)
    return _scored(trainer, module, data, split)


def _loaded(run: Run, folder: Path) -> tuple[Trainer, Any, Any]:
    trainer, module, data = run.build()
    _take_weights(module, Path(folder) / "last.ckpt")
    return trainer, module, data


def _read(folder: Path, split: Split | None) -> Result:
    result = Result.read(folder)
    if split is not None and result.split not in ("", split):
        raise ValueError(f"{folder} holds a run that was scored on {result.split} images; got split={split!r}")
    return result


def _stored(folder: Path, overrides: Sequence[str] = ()) -> Run:
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: expected a config.yaml")
    return Run(read(path), overrides)


def _scored(trainer: Trainer, module: Any, data: Any, split: str, *, may_be_none: bool = False) -> dict[str, float]:
    found = (trainer.test if split == "test" else trainer.validate)(module, datamodule=data, verbose=False)
    scores = {name: float(value) for each in found for name, value in each.items()}
    if not scores and not may_be_none:
        raise ValueError(f"{type(data).__name__} is configured without {split} images")
    return scores


def _has(data: Any, loader: str) -> bool:
    return getattr(type(data), loader) is not getattr(LightningDataModule, loader)


def _check_split(data: Any, split: str) -> None:
    if not _has(data, "test_dataloader" if split == "test" else "val_dataloader"):
        raise ValueError(f"{type(data).__name__} has no {split} split")


def _take_weights(module: LightningModule, checkpoint: Path) -> None:
    """Give a module the weights in a checkpoint, if they are its own."""
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint.parent} holds no checkpoint: expected a {checkpoint.name}")
    try:
        given: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of a run") from error
    try:
        module.load_state_dict(given)
    except RuntimeError as error:
        differs = textwrap.shorten(str(error).partition("\n")[2], 200)  # without the line that names the module
        raise ValueError(f"{checkpoint} is of another model: {differs}") from error


def is_first_process() -> bool:
    """Whether this is the process that speaks and writes, where there are several."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]
