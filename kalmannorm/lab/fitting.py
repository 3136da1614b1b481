"""Train and score a configuration, in a folder from which an interrupted run resumes."""

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
    """Writes a run's configuration and checkpoints."""

    def __init__(self, folder: Path, config: Mapping[str, Any], every: int) -> None:
        self.folder, self.config, self.every = folder, config, every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not (self.folder / "config.yaml").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # If Lightning validates after this call, a run that resumed from a checkpoint written here would skip that.
        every = trainer.val_check_batch if trainer.enable_validation else None
        validates = every is not None and (trainer.fit_loop.total_batch_idx + 1) % every == 0
        if self._is_due(trainer) and not validates:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._is_due(trainer):
            self.save(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        # A checkpoint between accumulated batches would lose their gradients.
        whole = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        return whole and (trainer.global_step % self.every == 0 or trainer.global_step >= trainer.max_steps)

    def save(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` atomically."""
        part = self.folder / "last.ckpt.part"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.folder / "last.ckpt")

    def finish(self, trainer: Trainer) -> None:
        """Store the final weights, such as recalibrated statistics, in ``last.ckpt``; the rest of it stays as of the
        last step, for a longer run to continue from.
        """
        last, part = self.folder / "last.ckpt", self.folder / "last.ckpt.part"
        is_there = trainer.is_global_zero and last.exists()
        kept = torch.load(last, map_location="cpu", weights_only=True) if is_there else {}
        # Saving needs all processes, so all follow what the first one reads.
        if not trainer.strategy.broadcast(kept.get("global_step") == trainer.global_step):
            self.save(trainer)  # training stopped before its last step
            return
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save({**kept, "state_dict": weights}, part)
            os.replace(part, last)


def fit(
    config: Mapping[str, Any],
    folder: Path,
    on_progress: Callable[[int], None] = lambda step: None,
    overrides: Sequence[str] = (),
    split: Split | None = None,
    *,
    longer: bool = False,
) -> Result:
    """Train and score; an interrupted run resumes, a finished one is read.

    Args:
        config: As for LightningCLI in subclass mode: ``model``, ``data``, ``trainer``,
            ``seed_everything``, and ``checkpoint_every``, in steps. The module's ``steps`` follow
            from ``trainer.max_steps``.
        folder: Gets ``config.yaml``, ``last.ckpt``, ``curve.csv``, ``validations.csv`` and
            ``result.json``.
        on_progress: Called from time to time with the number of steps done.
        overrides: More settings, as on a command line: ``["--trainer.max_steps=10"]``.
        split: Images to score at the end. By default the test images, or the validation images if
            the data have no test split.
        longer: If the folder holds a run of the same configuration but fewer steps, continue it. The
            rate, and all else that follows from the number of steps, is then as in the longer run.

    Raises:
        ValueError: The configuration is wrong; or the folder holds another configuration, a run
            that was scored on another split, or another module's checkpoint.
        MissingDataError: The data set was not found.
    """
    folder = Path(folder)
    run = Run(config, overrides)
    whole = run.complete()
    if longer:
        _make_longer(folder, whole)
    check_same(folder, whole)
    if finished(folder):
        return _read_result(folder, split)
    if run.config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1; got {run.config.checkpoint_every}")
    curve = Curve(on_progress)
    checkpoints = _Folder(folder, whole, run.config.checkpoint_every)
    trainer, module, data = run.build(curve, RandomState(), checkpoints)
    chosen: Split = split or ("test" if _has_loader(data, "test_dataloader") else "validation")
    if split is not None:
        _check_split(data, split)
    last = folder / "last.ckpt"
    if last.exists():
        _load_weights(module, last)  # Lightning's own error, later, would not name the file
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    except SystemExit as ended:  # Lightning raises it after Ctrl-C
        raise KeyboardInterrupt from ended
    checkpoints.finish(trainer)
    result = Result(
        config=whole,
        scores=scores_of(trainer, module, data, chosen, may_be_none=split is None),
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
    """Turn a finished run into an interrupted run of this longer configuration."""
    before = _stored_run(folder).complete()
    length = whole["trainer"]["max_steps"]
    if before["trainer"]["max_steps"] < length:
        check_same(folder, whole, merge(before, {"trainer": {"max_steps": length}}))
        # The result is removed first: without it the run resumes, even if this is interrupted here.
        (folder / "result.json").unlink(missing_ok=True)
        write_atomically(folder / "config.yaml", yaml.safe_dump(whole, sort_keys=False))


def finished_result(config: Mapping[str, Any], folder: Path, split: Split | None = None) -> Result | None:
    """The result of `fit` for this configuration in this folder; None if it has not finished."""
    if not finished(folder):
        return None
    check_same(folder, Run(config).complete())
    return _read_result(folder, split)


def steps(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> int:
    return int(Run(config, overrides).config.trainer.max_steps)


def load_parts(folder: Path, overrides: Sequence[str] = ()) -> tuple[Trainer, Any, Any]:
    """A run's trainer, trained module and data, optionally with other settings."""
    trainer, module, data = _stored_run(folder, overrides).build()
    _load_weights(module, Path(folder) / "last.ckpt")
    return trainer, module, data


def load(folder: Path) -> LightningModule:
    """A run's trained module, on the CPU and in ``eval()``, from its configuration and last checkpoint."""
    module: LightningModule = load_parts(folder)[1]
    return module.eval()


def load_with_data(folder: Path) -> tuple[LightningModule, Any]:
    """As `load`, with the run's data, set up."""
    _, module, data = load_parts(folder)
    data.setup()
    return module.eval(), data


def score(folder: Path, split: Split, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Score a run's last checkpoint, optionally with other settings; its folder does not change."""
    trainer, module, data = load_parts(folder, overrides)
    _check_split(data, split)
    return scores_of(trainer, module, data, split)


def scores_of(trainer: Trainer, module: Any, data: Any, split: str, *, may_be_none: bool = False) -> dict[str, float]:
    """Score a module on the data's split."""
    found = (trainer.test if split == "test" else trainer.validate)(module, datamodule=data, verbose=False)
    scores = {name: float(value) for each in found for name, value in each.items()}
    if not scores and not may_be_none:
        raise ValueError(f"{type(data).__name__} is configured without {split} images")
    return scores


def _read_result(folder: Path, split: Split | None) -> Result:
    result = Result.read(folder)
    if split is not None and result.split not in ("", split):
        raise ValueError(f"{folder} holds a run that was scored on {result.split} images; got split={split!r}")
    return result


def _stored_run(folder: Path, overrides: Sequence[str] = ()) -> Run:
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: expected a config.yaml")
    return Run(read(path), overrides)


def _has_loader(data: Any, loader: str) -> bool:
    return getattr(type(data), loader) is not getattr(LightningDataModule, loader)


def _check_split(data: Any, split: str) -> None:
    if not _has_loader(data, "test_dataloader" if split == "test" else "val_dataloader"):
        raise ValueError(f"{type(data).__name__} has no {split} split")


def _load_weights(module: LightningModule, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a module; a ValueError names the checkpoint."""
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
    """Whether this process prints and writes; of several, the first does."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]
