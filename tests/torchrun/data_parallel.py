"""Two processes train under DistributedDataParallel, each on its part of every batch."""

from contextlib import nullcontext

import restart
import torch.distributed as dist
import torch.nn.functional as F
from network import batch, build, layers_with_prior, pretrained, sgd, state_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kalmannorm as kn
from kalmannorm.traversal import kalman_layers


def train(model, parts, micro_batches=1, steps=3):
    """Train on this process's part of each batch; mean loss over all, whatever the parts' sizes."""
    parallel = DistributedDataParallel(model)
    optimizer, names = sgd(model), layers_with_prior(model)
    for step in range(steps):
        images, labels = batch(step)
        share = 2 * (parts.stop - parts.start) / len(images) / micro_batches
        optimizer.zero_grad()
        pairs = zip(images[parts].chunk(micro_batches), labels[parts].chunk(micro_batches), strict=True)
        for i, (x, label) in enumerate(pairs):
            with parallel.no_sync() if i < micro_batches - 1 else nullcontext():
                (share * F.cross_entropy(parallel(x), label)).backward()
        optimizer.step()
    shared = {name: layer.process_group is not None for name, layer in kalman_layers(model)}
    return {"state": state_of(model), "with_prior": names, "shared": shared}


def with_layers_of(model, kind):
    """The model with its norms replaced by another class's."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            new = kind(layer.num_features, dtype=layer.weight.dtype)
            new.load_state_dict(layer.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def in_each_way(rank, folder):
    halves, uneven = (slice(0, 2), slice(2, 4))[rank], (slice(0, 3), slice(3, 4))[rank]
    return {
        "each for itself": train(kn.convert(build()), halves),
        "pretrained": train(kn.convert(pretrained()), halves),
        "accumulated": train(kn.convert(build()), halves, micro_batches=2),
        "process_group": train(kn.convert(build(), process_group=dist.group.WORLD), uneven),
        "SyncBatchNorm": train(kn.convert(with_layers_of(build(), nn.SyncBatchNorm)), halves),
        "spared": restart.train(folder, rank, kill=False),
        "convert_sync_batchnorm": train(kn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(build())), uneven),
    }
