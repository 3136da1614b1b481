"""Regions of the forward pass that run again in the backward pass."""


import pytest
import torch
from networks import Checkpointed, Residual
from torch import nn
from torch.utils.checkpoint import checkpoint

import kalmannorm as kn


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_a_checkpoint_changes_no_bit(estimator):
    plain, saving = (kn.convert(Checkpointed(use), estimator=estimator) for use in (False, True))
    x = torch.randn(2, 3, 10, 10)
    outputs = []
    for model in (plain, saving):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_belief_asked_for_inside_a_checkpoint_and_after_it():
    """``norm(x + block(x))``: both ask for the belief of ``x``, the block twice."""

    class Both(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.block, self.norm, self.use = Residual(4), nn.BatchNorm2d(4), use

        def forward(self, x):
            x = self.stem(x)
            y = checkpoint(self.block, x, use_reentrant=False) if self.use else self.block(x)
            return self.norm(x + y)

    plain, saving = (kn.convert(Both(use)).double() for use in (False, True))
    x = torch.randn(2, 3, 10, 10).double()
    for model in (plain, saving):
        model(x).square().mul(torch.arange(64).view(8, 8)).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_network_in_a_hook_of_a_backward_pass_is_no_checkpoint():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    y = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = []
    y.register_hook(lambda gradient: found.append(model(gradient)))
    y.square().sum().backward()
    assert found[0].shape == (2, 4, 4, 4)
