"""Networks of a few lines that are usually copied, not installed."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.coverage_networks import NETWORKS as OF_PACKAGES
from benchmarks.coverage_networks import Network


def generator():
    """DCGAN's: transposed convolutions from noise ``(N, 16, 1, 1)`` to images of 32 pixels a side."""
    layers = [nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU(True)]
    for below, above in ((32, 16), (16, 8)):
        layers += [nn.ConvTranspose2d(below, above, 4, 2, 1), nn.BatchNorm2d(above), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())


def discriminator(size=32):
    """DCGAN's: strided convolutions to one number an image."""
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for below, above in ((8, 16), (16, 32)):
        layers += [nn.Conv2d(below, above, 4, 2, 1), nn.BatchNorm2d(above), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(32, 1, size // 8), nn.Flatten())


class PointNet(nn.Module):
    """Clouds ``(N, 3, points)`` turned by a matrix that the network computes, and pooled by their largest features."""

    def __init__(self):
        super().__init__()
        self.turn_points = _points(3, 16, 32)
        self.turn = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9))
        self.features = _points(3, 16, 32)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def forward(self, points):
        turn = self.turn(self.turn_points(points).amax(2)).view(-1, 3, 3) + torch.eye(3, device=points.device)
        return self.head(self.features(turn @ points).amax(2))


def _points(*widths):
    """The same map of every point."""
    blocks = [nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU())
              for a, b in itertools.pairwise(widths)]  # fmt: skip
    return nn.Sequential(*blocks)


class SharedHead(nn.Module):
    """RetinaNet's head with BatchNorm: one tower for three levels of a feature pyramid."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))
        tower = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
        self.tower = nn.Sequential(*tower, nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.classes = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, images):
        levels = [self.stem(images)]
        for down in self.down:
            levels.append(down(F.relu(levels[-1])))
        return [self.classes(self.tower(level)) for level in levels]


class Unrolled(nn.Module):
    """A recurrent network whose two BatchNorm layers are called at each time step: ``(N, time, 4)``."""

    def __init__(self, width=16):
        super().__init__()
        self.of_input, self.of_state = nn.Linear(4, width, bias=False), nn.Linear(width, width, bias=False)
        self.norm_input, self.norm_state = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, sequences):
        state = sequences.new_zeros(len(sequences), self.of_state.in_features)
        for x in sequences.unbind(1):
            state = torch.tanh(self.norm_input(self.of_input(x)) + self.norm_state(self.of_state(state)))
        return self.head(state)


COPIED = {
    "DCGAN generator": Network("generation", generator, (16, 1, 1)),
    "DCGAN discriminator": Network("generation", discriminator, (3, 32, 32)),
    "PointNet": Network("points", PointNet, (3, 64)),
    "RetinaNet head, shared over levels": Network("detection", SharedHead, (3, 64, 64)),
    "recurrent, unrolled": Network("sequences", Unrolled, (6, 4)),
}
NETWORKS = {"copied": COPIED, **OF_PACKAGES}
