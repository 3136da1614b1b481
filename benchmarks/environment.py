"""Environment variables that must be set before torch is imported."""

import os
import sys

# glibc gives a freed block of more than 128 KiB back to the system, and takes a page fault for every 4 KiB when it asks
# again: of a step of small layers that is the larger part, differs from run to run and says nothing of either side.
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

# The profiler, which reads the peak of memory, tells of each start and of blocks that are older than it.
QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def keep_memory():
    """Start this process again with an allocator that keeps what it has; glibc reads that at the start only.

    Whoever has set one of the two, to glibc's own 131072 for instance, keeps that.
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
