"""What every network of the laboratory must do, with each kind of norm."""

import torch
from torch import nn
from torch.nn import functional as F

import kalmannorm


def group_norm(channels):
    """Eight channels a group: each width of the networks here is a multiple of it."""
    return nn.GroupNorm(channels // 8, channels)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def losses(model, images, labels, steps=30, rate=0.05):
    """The loss before each step of SGD on one batch, and after the last."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    values.append(F.cross_entropy(model(images), labels).item())
    return values


def build(make, kind):
    """The network with BatchNorm, with GroupNorm, or with BatchNorm that is converted."""
    torch.manual_seed(0)
    if kind == "group":
        return make(norm_layer=group_norm)
    return kalmannorm.convert(make()) if kind == "kalman" else make()


def batch(size=32, images=8, classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, size, size, generator=generator), torch.arange(images) % classes


def check_one_step(make, kind, size=32):
    """A step gives every parameter a finite gradient and moves it."""
    model = build(make, kind)
    images, labels = batch(size, images=2)
    before = [parameter.clone() for parameter in model.parameters()]
    (first, last) = losses(model, images, labels, steps=1)
    assert torch.isfinite(torch.tensor([first, last])).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    moved = sum(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))
    assert moved >= 0.9 * len(before)


def check_learns(make, kind, size=32, rate=0.05):
    """The loss on one batch falls by half within 30 steps."""
    model = build(make, kind)
    values = losses(model, *batch(size), rate=rate)
    assert values[-1] < values[0] / 2, values


def check_priors(make, size=32):
    """Every Kalman layer but the first has a prior."""
    model = kalmannorm.convert(make())
    description = kalmannorm.describe(model, batch(size, images=2)[0])
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    without = [row.name for row in description.rows if row.reason]
    assert without == [description.rows[0].name], str(description)
    return description
