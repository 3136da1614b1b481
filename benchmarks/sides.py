"""The normalizations that are compared: each turns a network built with BatchNorm into its own, in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as synchronized_batch_norm

import kalmannorm as kn
from benchmarks.networks import UnavailableError
from kalmannorm.lab.baselines.replacing import replace_batchnorm
from kalmannorm.lab.baselines.stock import to_ghost, to_groupnorm


class Side(NamedTuple):
    """How a method changes the network, and whether it takes the batch piece by piece."""

    convert: Callable
    """From the network and its case to the network."""
    in_pieces: bool = False
    """A forward and a backward pass for each `stats_batch` samples, then one step of the optimizer."""


def keep(model, case):
    return model


class SynchronizedBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that takes its own way with one process too, where torch's is BatchNorm.

    Its kernels and an all-gather, with no other device to wait for: the least that it costs.
    """

    def forward(self, x):
        group = torch.distributed.group.WORLD
        return synchronized_batch_norm.apply(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum, group, 1
        )


def sync_batch_norm(model, case):
    if not next(model.parameters()).is_cuda:
        raise UnavailableError("torch's SyncBatchNorm is for GPUs")
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    return replace_batchnorm(model, lambda norm: SynchronizedBatchNorm(norm.num_features))


def kalman_norm(model, case, **options):
    return kn.convert(model, input_stats=input_stats(model, case), **options)


def kalman_norm_by_groups(model, case):
    return kalman_norm(model, case, stats_batch_size=case.stats_batch or None)


def kalman_norm_monte_carlo(model, case):
    return kalman_norm(model, case, estimator="monte_carlo")


def kalman_norm_act(model, case):
    """The layer that does its ReLU itself, for the case of one layer."""
    device = next(model.parameters()).device
    layer = kn.KalmanNormAct2d(case.channels, act=nn.ReLU(inplace=True)).to(device)
    return kn.connect(nn.Sequential(layer), input_stats=input_stats(model, case))


def to_batchnorm(model, case):
    """As deployed: converted, run once in training, and turned back."""
    model = kn.convert(model)
    weight = next(model.parameters())
    model(torch.randn(2, 3, case.size, case.size, device=weight.device))
    return kn.to_batchnorm(model)


def input_stats(model, case):
    """A layer alone gets its prior from what is said of the input; in a network, from the layers below.

    On the layer's device: to copy it there in each step is not the layer's cost.
    """
    if case.network != "layer":
        return None
    device = next(model.parameters()).device
    return torch.zeros(case.channels, device=device), torch.ones(case.channels, device=device)


def one_by_one(model, case):
    """Each sample by itself, in ``eval()`` too."""
    return kn.convert(model, track_running_stats=False)


def kalman_norm_standardized(model, case):
    return kalman_norm(model, case, weight_standardization=True)


def captured(model, case):
    """Replayed as CUDA graphs; of a detector, the part whose shapes are static."""
    kn.capture(getattr(model, "static_part", model))
    return model


SIDES = {
    "batch_norm": Side(keep),
    "group_norm": Side(lambda model, case: to_groupnorm(model)),
    "sync_batch_norm": Side(sync_batch_norm),
    "ghost_batch_norm": Side(lambda model, case: to_ghost(model, case.stats_batch)),
    "kalman_norm": Side(kalman_norm_by_groups),
    "kalman_norm_act": Side(kalman_norm_act),
    "kalman_norm_monte_carlo": Side(kalman_norm_monte_carlo),
    "batch_norm_loop": Side(keep, in_pieces=True),
    "kalman_norm_loop": Side(kalman_norm, in_pieces=True),
    "to_batchnorm": Side(to_batchnorm),
    "one_by_one": Side(one_by_one),
    "kalman_norm_standardized": Side(kalman_norm_standardized),
    "batch_norm_captured": Side(captured),
    "kalman_norm_captured": Side(lambda model, case: captured(kalman_norm(model, case), case)),
}
