"""What every network of the laboratory must do, with each kind of norm."""

import torch
from torch import nn


def group_norm(channels):
    """In two groups: each width of the networks here is a multiple of 2."""
    return nn.GroupNorm(2, channels)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model, stages, *shape):
    """Of inputs of this shape, what each of these parts of a network gives, and then the network, a sample."""
    found = []
    hooks = [
        stage.register_forward_hook(lambda _module, _args, out: found.append(tuple(out.shape[1:])))
        for stage in (*stages, model)
    ]
    with torch.no_grad():
        model(torch.randn(2, *shape))
    for hook in hooks:
        hook.remove()
    return found


def batch(shape, images=8, classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, *shape, generator=generator), torch.arange(images) % classes
