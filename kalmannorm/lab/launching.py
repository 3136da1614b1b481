"""A training on several devices, as a command of its own: Lightning starts a process for each device from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kalmannorm.lab.recipes import merge
from kalmannorm.lab.results import Result

__all__ = ["fit_on_devices"]


def fit_on_devices(devices: int, config: Mapping[str, Any], folder: Path) -> Result:
    """`fitting.fit` on several devices; what it prints goes into a file beside ``folder``.

    Args:
        devices: How many.
        config: What ``fit`` takes.
        folder: Of the run.

    Raises:
        RuntimeError: The command failed; with its last line.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    spread = merge(config, {"trainer": {"devices": devices, "strategy": "ddp"}})
    file, log = folder.with_name(f"{folder.name}.yaml"), folder.with_name(f"{folder.name}.log")
    file.write_text(yaml.safe_dump(spread, sort_keys=False), encoding="utf-8")
    line = [sys.executable, "-m", "kalmannorm.lab.cli", "fit", "--config", str(file), "--output", str(folder)]
    with (
        log.open("w", encoding="utf-8") as output,
        # A group of its own, so that all of its processes can be ended together.
        subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        said = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip()]
        raise RuntimeError(f"{said[-1] if said else 'it said nothing'} (exit code {code}; all of it is in {log.name})")
    return Result.read(folder)
