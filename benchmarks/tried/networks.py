"""Small networks that are usually copied, not installed."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d

import kalmannorm as kn
from benchmarks.coverage_networks import NETWORKS as OF_PACKAGES
from benchmarks.coverage_networks import Network


def generator():
    """DCGAN's generator: transposed convolutions from noise ``(N, 16, 1, 1)`` to images of 32 pixels a side."""
    layers = [nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU(True)]
    for below, above in ((32, 16), (16, 8)):
        layers += [nn.ConvTranspose2d(below, above, 4, 2, 1), nn.BatchNorm2d(above), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh())


def discriminator(size=32):
    """DCGAN's discriminator: strided convolutions to one number for each image."""
    layers = [nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for below, above in ((8, 16), (16, 32)):
        layers += [nn.Conv2d(below, above, 4, 2, 1), nn.BatchNorm2d(above), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(32, 1, size // 8), nn.Flatten())


class PointNet(nn.Module):
    """Point clouds ``(N, 3, points)``, multiplied by a matrix that the network computes, and max-pooled."""

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
    """Layers that map each point separately."""
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


class Warped(nn.Module):
    """A spatial transformer: the network computes an affine transform of its feature maps."""

    def __init__(self):
        super().__init__()
        self.look = nn.Sequential(_block(3, 8), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 6))
        self.body = nn.Sequential(_block(8, 16), _block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.stem, self.head = _block(3, 8), nn.Linear(16, 2)

    def forward(self, images):
        maps = self.stem(images)
        turn = 0.3 * self.look(images).view(-1, 2, 3) + torch.eye(2, 3, device=images.device)
        grid = F.affine_grid(turn, maps.shape, align_corners=False)
        return self.head(self.body(F.grid_sample(maps, grid, align_corners=False)))


def _block(below, above):
    return nn.Sequential(nn.Conv2d(below, above, 3, 2, 1), nn.BatchNorm2d(above), nn.ReLU())


class Deformable(nn.Module):
    """Deformable convolutions with masks, whose offsets begin at zero."""

    def __init__(self):
        super().__init__()
        self.stem = _block(3, 16)
        self.places = nn.ModuleList(nn.Conv2d(16, 27, 3, padding=1) for _ in range(2))
        self.convs = nn.ModuleList(DeformConv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.head = nn.Linear(16, 2)
        for conv in self.places:
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, images):
        x = self.stem(images)
        for places, conv, norm in zip(self.places, self.convs, self.norms, strict=True):
            offsets, mask = places(x).split([18, 9], 1)
            x = x + F.relu(norm(conv(x, offsets, 2 * mask.sigmoid())))
        return self.head(x.mean((2, 3)))


class Spike(torch.autograd.Function):
    """A step function of a neuron's charge; its gradient is that of an arc tangent."""

    @staticmethod
    def forward(ctx, charge):
        ctx.save_for_backward(charge)
        return (charge >= 0).float()

    @staticmethod
    def backward(ctx, gradient):
        (charge,) = ctx.saved_tensors
        return gradient / (1 + (torch.pi * charge).square())


class Spiking(nn.Module):
    """Leaky integrate-and-fire neurons, for three steps of one image."""

    def __init__(self, steps=3):
        super().__init__()
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in ((3, 16), (16, 16), (16, 16)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in self.convs)
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        charges, outputs = [0.0] * len(self.convs), []
        for _ in range(self.steps):
            x = images
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                charge = charges[i] + (norm(conv(x)) - charges[i]) / 2
                x = Spike.apply(charge - 0.5)
                charges[i] = charge * (1 - x.detach())
            outputs.append(self.head(x.mean((2, 3))))
        return torch.stack(outputs).mean(0)


class Columns(nn.Module):
    """Text recognition: convolutions, an LSTM over an image's columns, and a norm of its last state."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(_block(3, 8), _block(8, 16))
        self.recurrent = nn.LSTM(128, 32, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, images):
        _, (state, _) = self.recurrent(self.maps(images).flatten(1, 2).transpose(1, 2))
        return self.head(state.transpose(0, 1).flatten(1))


class Conditional(nn.Module):
    """Convolutions whose filters are a mixture of four, different for each image (CondConv)."""

    def __init__(self):
        super().__init__()
        self.stem = _block(3, 16)
        self.routes = nn.ModuleList(nn.Linear(16, 4) for _ in range(2))
        self.filters = nn.ParameterList(0.1 * torch.randn(4, 16 * 16 * 9) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        x = self.stem(images)
        for route, filters, norm in zip(self.routes, self.filters, self.norms, strict=True):
            weight = (route(x.mean((2, 3))).sigmoid() @ filters).view(-1, 16, 3, 3)
            y = F.conv2d(x.flatten(0, 1).unsqueeze(0), weight, padding=1, groups=len(x))
            x = x + F.relu(norm(y.view(x.shape)))
        return self.head(x.mean((2, 3)))


class Tracker(nn.Module):
    """Cross-correlation of a template with an image, channel by channel (SiamRPN++)."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(_block(3, 16), _block(16, 16))
        self.head = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1))
        self.between = nn.BatchNorm2d(16)

    def forward(self, images):
        search, template = self.maps(images), self.maps(images[..., 8:24, 8:24])
        weight = template.flatten(0, 1).unsqueeze(1)
        found = F.conv2d(search.flatten(0, 1).unsqueeze(0), weight, groups=len(weight))
        found = found.view(*search.shape[:2], *found.shape[2:])
        return self.head(self.between(found)).mean((2, 3))


class Conformer(nn.Module):
    """Padded sequences: attention with a padding mask, then convolutions with a norm."""

    def __init__(self, width=16, blocks=2):
        super().__init__()
        self.stem, self.head = nn.Linear(12, width), nn.Linear(width, 2)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(blocks))
        self.before = nn.ModuleList(nn.ModuleList(nn.LayerNorm(width) for _ in range(2)) for _ in range(blocks))
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(1),
                          nn.Conv1d(width, width, 5, padding=2, groups=width),
                          nn.BatchNorm1d(width), nn.SiLU(), nn.Conv1d(width, width, 1))
            for _ in range(blocks)
        )  # fmt: skip

    def forward(self, sequences):
        x = self.stem(sequences.transpose(1, 2))
        lengths = x.shape[1] - 4 * torch.arange(len(x), device=x.device) % x.shape[1]
        padded = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        for attention, (first, second), convs in zip(self.attention, self.before, self.convs, strict=True):
            y = first(x)
            x = x + attention(y, y, y, key_padding_mask=padded, need_weights=False)[0]
            x = x + convs(second(x).transpose(1, 2)).transpose(1, 2)
        return self.head(x.mean(1))


COPIED = {
    "DCGAN generator": Network("generation", generator, (16, 1, 1)),
    "DCGAN discriminator": Network("generation", discriminator, (3, 32, 32)),
    "PointNet": Network("points", PointNet, (3, 64)),
    "RetinaNet head, shared over levels": Network("detection", SharedHead, (3, 64, 64)),
    "recurrent, unrolled": Network("sequences", Unrolled, (6, 4)),
    "spatial transformer": Network("classification", Warped, (3, 32, 32)),
    "deformable convolutions": Network("classification", Deformable, (3, 32, 32)),
    "spiking neurons": Network("classification", Spiking, (3, 32, 32)),
    "convolutions and an LSTM": Network("classification", Columns, (3, 32, 32)),
    "conditional convolutions": Network("classification", Conditional, (3, 32, 32)),
    "conformer": Network("sequences", Conformer, (12, 32)),
    "tracker": Network("classification", Tracker, (3, 32, 32)),
}

# Suffix of a network's name if its filters are standardized, on both sides.
STANDARDIZED = ", standardized filters"


def standardized(network):
    """The same network with filters of zero mean and unit norm."""
    inputs = network.call(torch.zeros(2, *network.shape))
    build = lambda: kn.standardize_weights(network.build(), inputs=inputs)  # noqa: E731
    return Network(network.task, build, network.shape, network.call)


# Suffixes if it is trained for longer, and if its layers are also frozen for the last steps, on both sides.
LONGER = ", 100 steps"
FROZEN = f"{LONGER}, frozen late"


@dataclass(frozen=True)
class Longer(Network):
    """A network that is trained for more steps, at a rate that falls to 0 along a cosine."""

    steps: int = 100
    frozen: int = 0
    """Number of last steps with frozen normalization layers."""


def _longer(network, frozen=0):
    return Longer(network.task, network.build, network.shape, network.call, frozen=frozen)


_SEGMENTATION = OF_PACKAGES["segmentation_models_pytorch"]
NETWORKS = {
    "copied": COPIED,
    **OF_PACKAGES,
    "segmentation_models_pytorch": {
        **_SEGMENTATION, **{name + STANDARDIZED: standardized(network) for name, network in _SEGMENTATION.items()},
        **{name + LONGER: _longer(network) for name, network in _SEGMENTATION.items()},
        **{name + FROZEN: _longer(network, frozen=30) for name, network in _SEGMENTATION.items()},
    },
}  # fmt: skip
