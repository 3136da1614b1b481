"""The compared normalizations: each converts a network with BatchNorm, in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as synchronized_batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

import kalmannorm as kn
from benchmarks import networks
from benchmarks.networks import UnavailableError
from kalmannorm.lab.baselines.replacing import replace_batchnorm
from kalmannorm.lab.baselines.stock import to_ghost, to_groupnorm


class Side(NamedTuple):
    """A method's conversion of the network, and whether it splits the batch."""

    convert: Callable
    """From the network and its case to the converted network."""
    in_pieces: bool = False
    """Forward and backward pass for each `stats_batch` samples, then one optimizer step."""


def keep(model, case):
    return model


class SynchronizedBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that uses its own kernels with one process too, where torch falls back to BatchNorm.

    It runs the kernels and an all-gather without waiting for other devices: a lower bound of its cost.
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
    """The layer with a built-in ReLU, for the case of one layer."""
    device = next(model.parameters()).device
    layer = kn.KalmanNormAct2d(case.channels, act=nn.ReLU(inplace=True)).to(device)
    return kn.connect(nn.Sequential(layer), input_stats=input_stats(model, case))


def to_batchnorm(model, case):
    """The deployed network: converted, run once in training, and converted back."""
    model = kn.convert(model)
    weight = next(model.parameters())
    model(torch.randn(2, 3, case.size, case.size, device=weight.device))
    return kn.to_batchnorm(model)


def frozen_batch_norm(model, case):
    """With the statistics of a batch, so that activations are as large as in a trained network."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(networks.batch(case, next(model.parameters()).device)[0])
    return kn.freeze(model)


def input_stats(model, case):
    """Statistics of the input for a single layer, whose prior has no layer below; None for networks.

    They are on the layer's device, so that steps do not copy them.
    """
    if case.network != "layer":
        return None
    device = next(model.parameters()).device
    return torch.zeros(case.channels, device=device), torch.ones(case.channels, device=device)


def one_by_one(model, case):
    """Normalize each sample by itself, in ``eval()`` too."""
    return kn.convert(model, track_running_stats=False)


def kalman_norm_standardized(model, case):
    return kalman_norm(model, case, weight_standardization=True)


def captured(model, case):
    """The network replayed as CUDA graphs; of a detector, only the part with static shapes."""
    kn.capture(getattr(model, "static_part", model))
    return model


SIDES = {
    "batch_norm": Side(keep),
    "frozen_batch_norm": Side(frozen_batch_norm),
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
