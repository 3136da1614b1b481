"""Environment variables that must be set before torch is imported."""

import os
import sys

# glibc returns freed blocks of more than 128 KiB to the system; allocating them again takes a page fault every 4 KiB.
# In a step of small layers this takes most of the time, varies between runs, and is the same for all sides.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

# The profiler, which measures peak memory, logs each start and blocks that were allocated before it.
QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def keep_memory():
    """Restart this process with an allocator that keeps freed memory; glibc reads the settings at start only.

    Does nothing if one of the two variables is already set, for example to glibc's default 131072.
    """
    if not any(name in os.environ for name in KEEPING):
        os.environ.update(KEEPING)
        for name, level in QUIET.items():
            os.environ.setdefault(name, level)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def allocator():
    """The allocator's settings, for the CSV."""
    thresholds = [os.environ.get(name, "default") for name in KEEPING]
    return f"glibc {'/'.join(thresholds)}"
