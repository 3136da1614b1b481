"""What all tests share."""

import gc
import multiprocessing
import os

import pytest
import torch
from hypothesis import Phase, settings

pytest.register_assert_rewrite("browser", "drawing", "networks", "short_trainings")

# A draw of a million is one core's work; the other cores have other tests.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
# Those that a fork server starts have the imports done, which take ten seconds, and none of this process's threads.
multiprocessing.set_forkserver_preload(["kalmannorm.lab.fitting", "kalmannorm.lab.data.classification"])

# The same examples in every run: what passes here passes on the next machine. A failure is shown as
# it was found: to look for a simpler one would take minutes, at a million draws a try.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=8,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("repeatable")


def pytest_collection_finish():
    """What was imported stays: each look for garbage, as before a CUDA graph, would take half a second for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
