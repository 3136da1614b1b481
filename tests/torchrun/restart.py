"""Two processes train and write a checkpoint after each step; one is killed on the way."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from network import adam, build, join, leave, state_of, train_step
from torch.nn.parallel import DistributedDataParallel

import kalmannorm as kn

STEPS = 6
KILLED_AT = 3


def save(path, **state):
    """All or nothing."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def resume(path, model, optimizer):
    """Load the last checkpoint, if there is one; the step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(folder, rank, *, kill):
    model = kn.convert(build(), process_group=dist.group.WORLD)
    optimizer, parallel = adam(model), DistributedDataParallel(model)
    path = Path(folder) / "last_checkpoint.pt"
    began = resume(path, model, optimizer)
    for step in range(began, STEPS):
        if kill and step == KILLED_AT and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(parallel, optimizer, step, (slice(0, 3), slice(3, 4))[rank], weight=(1.5, 0.5)[rank])
        if rank == 0:
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
        dist.barrier()
    return {"state": state_of(model), "began": began}


def main(folder):
    rank = join()
    torch.save(train(folder, rank, kill=True), f"{folder}/{rank}.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
