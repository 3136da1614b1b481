"""Small networks that several tests run."""

import io

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kalmannorm as kn
from kalmannorm.gaussian import Unknown
from kalmannorm.propagation import belief_for


def conv_net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    )  # fmt: skip
    return kn.convert(model, **options)


def conv_net_like(channels):
    return kn.convert(nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))


def made_of(forward, **parts):
    """A network with these parts, whose forward is a function of itself and its inputs."""
    network = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(network, name, part)
    return network


class Net(nn.Module):
    """Two norms with ``between`` applied in the middle."""

    def __init__(self, between, channels=4, rank=4):
        super().__init__()
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank]
        self.first, self.second = norm(channels), norm(channels)
        self.between = between
        self.constant = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def through_a_file(what, weights_only=False):
    """What torch.load gives of what torch.save has written."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def prior_of(tensor, groups):
    """What a layer believes of its input: mean and variance, ``(S, C)``, or why they are unknown."""
    belief = belief_for(tensor, groups)
    return belief if isinstance(belief, Unknown) else belief.per_channel(groups)


def prior_after(between, **kwargs):
    model = kn.convert(Net(between, **kwargs))
    return kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1]


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.side, self.side_norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.side_norm(self.side(x)))


class Checkpointed(nn.Module):
    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(4) for _ in range(3))
        self.use = use

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use else block(x)
        return x
