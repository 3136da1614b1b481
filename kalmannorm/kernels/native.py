"""Compiles ``native.c`` when it is first needed, and keeps the library for later processes.

A C compiler is all it takes: no headers of Python's or torch's. Where there is none, or
``KALMANNORM_NATIVE=0`` is set, torch functions do the same work, several times more slowly at small batches.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared",
    "-fPIC",
)  # fmt: skip
_SECONDS = 120


def _compiler() -> str | None:
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS).stdout


def _folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("KALMANNORM_CACHE") or os.path.join(home, "kalmannorm"))


def _built(compiler: str) -> Path:
    """The compiled library, of this source, by this compiler, for this processor."""
    # The macros that the compiler defines name its version and the processor's instructions: machines may share a home.
    features = _run(compiler, *_FLAGS[:3], "-dM", "-E", "-x", "c", os.devnull)
    key = hashlib.sha256(_SOURCE.read_bytes() + features + " ".join(_FLAGS).encode()).hexdigest()[:16]
    path = _folder() / f"native-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at once: each puts a whole file in its place.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            _run(compiler, *_FLAGS, "-o", str(new), str(_SOURCE), "-lm")
            os.replace(new, path)
    return path


@functools.cache
def library() -> Any:
    """The compiled kernels, a ``ctypes.CDLL``, or None where they cannot be had. The first call compiles them."""
    if os.environ.get("KALMANNORM_NATIVE", "1") == "0" or not torch.backends.openmp.is_available():
        return None
    if (compiler := _compiler()) is None:
        return None
    try:
        native = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name in ("layer_forward", "layer_backward", "link_forward", "link_backward", "activation"):
        function = getattr(native, name)
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return native
