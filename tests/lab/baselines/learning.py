"""What the tests of each method share: thirty steps on a small network."""

import math

import torch
from torch.nn import functional as F

from kalmannorm.lab.models.small import SmallConvNet


def stripes(count):
    """Images of stripes, and which of four directions they have: no contrast or brightness tells it."""
    labels = torch.randint(4, (count,))
    angle = (labels * math.pi / 4).view(-1, 1, 1, 1)
    grid = torch.arange(16.0)
    along = grid * angle.cos() + grid.view(-1, 1) * angle.sin()
    return (along * 1.5 + 6 * torch.rand(count, 1, 1, 1)).sin() + 0.1 * torch.randn(count, 1, 16, 16), labels


def losses(replace, steps=30, rate=0.05, batch=16):
    """Training losses of `SmallConvNet` with BatchNorm replaced."""
    torch.manual_seed(0)
    model = replace(SmallConvNet(((8, 2), (16, 2), (16, 1)), num_classes=4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    history = []
    for _ in range(steps):
        images, labels = stripes(batch)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def falls(replace, **options):
    """Whether the loss of the last steps is well below that of the first."""
    history = losses(replace, **options)
    return sum(history[-5:]) < 0.6 * sum(history[:5])
