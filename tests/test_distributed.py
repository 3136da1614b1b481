"""Statistics shared between processes, on two gloo processes of this machine."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kalmannorm as kn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).double()
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)


def worker(rank, split, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = kn.convert(build(), process_group=dist.group.WORLD)
    parallel = DistributedDataParallel(model)
    x = batch().split(split)[rank].clone().requires_grad_()
    y = parallel(x)
    (y.square().sum() * 2).backward()  # DDP averages the gradients of the two processes
    state = {
        "y": y.detach(), "dx": x.grad / 2, "grads": {n: p.grad for n, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }  # fmt: skip
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("split", [[3, 3], [4, 2], [6, 0]], ids=str)
def test_two_processes_equal_one_with_the_whole_batch(split, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (split, port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    model = kn.convert(build())
    x = batch().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([first["dx"], second["dx"]]), x.grad, **close)
    for name, parameter in model.named_parameters():
        for state in (first, second):
            torch.testing.assert_close(state["grads"][name], parameter.grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in model.named_buffers():
        for state in (first, second):
            torch.testing.assert_close(state["buffers"][name], buffer, **close, msg=lambda m, n=name: f"{n}: {m}")
