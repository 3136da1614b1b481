"""What the programs of this folder, and the tests that start them, have in common."""

import datetime
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from kalmannorm.gaussian import Gaussian
from kalmannorm.recording import paused
from kalmannorm.traversal import kalman_layers

PATIENCE = datetime.timedelta(seconds=60)
CHANNELS = 5  # not a multiple of the two processes


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PreActivation(nn.Module):
    """It ends in a convolution: the next block's first layer asks what is believed of its output."""

    def __init__(self):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x):
        return self.conv(F.relu(self.bn(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        projection = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.blocks = nn.Sequential(Residual(), PreActivation(), PreActivation(), projection, Residual())
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


def build(dtype=torch.float64):
    torch.manual_seed(0)
    model = Network()
    with torch.no_grad():  # biases and weights that a belief can tell from zeros and ones
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
    return model.to(dtype)


def pretrained(dtype=torch.float64):
    """The same with running statistics, as a network that was trained with BatchNorm brings them."""
    model = build(dtype)
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(torch.randn(CHANNELS, generator=generator))
            layer.running_var.copy_(torch.rand(CHANNELS, generator=generator) + 0.5)
    return model


def batch(step, samples=4):
    """Images and labels of one optimizer step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images + torch.rand(samples, 1, 1, 1, generator=generator), torch.randint(3, (samples,), generator=generator)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train_step(model, optimizer, step, part=slice(None), weight=1.0):
    """One step on a part of the step's batch; ``weight`` times the mean loss, which it returns."""
    images, labels = (t[part] for t in batch(step))
    optimizer.zero_grad()
    loss = weight * F.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def layers_with_prior(model):
    """The names of the layers that get a prior, filled in while the model runs."""
    names = set()
    for name, layer in kalman_layers(model):

        def look(layer, args, name=name):
            with paused():
                if isinstance(layer.belief(args[0], layer.statistic_groups(len(args[0]))), Gaussian):
                    names.add(name)

        layer.register_forward_pre_hook(look)
    return names


def join():
    """Join the process group that torchrun has prepared; the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    return int(os.environ["RANK"])


def leave():
    """Leave the process group, and end the process: gloo's threads may outlive the group, and abort an interpreter that
    is cleaned up meanwhile (pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    os._exit(0)


def in_two_processes(work, folder):
    """What ``work(rank)`` gives in each of two processes that have a group."""
    mp.start_processes(_one_of_two, (work, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def _one_of_two(rank, work, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=PATIENCE)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    leave()


def state_of(model):
    """All parameters and buffers, whole, apart from the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: getattr(t, "full_tensor", t.clone)().detach() for name, t in tensors.items()}
