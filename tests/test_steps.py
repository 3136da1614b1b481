"""Steps live and die with their tensors."""

import copy
import gc

import torch
from networks import conv_net
from torch import nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.recording import attach
from kalmannorm.steps import Step, step_of


def test_no_memory_grows_over_200_steps():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(2, 3, 8, 8)

    def count():
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(o), torch.Tensor | Step | Gaussian) for o in objects)

    counts = []
    for step in range(200):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step in (20, 199):
            counts.append(count())
    assert counts[1] <= counts[0]


def test_a_tensor_with_a_belief_can_be_saved_and_copied(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    y = conv_net()(x).detach()
    attach(x, Unknown("a test"), "input")
    attach(y, Gaussian(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)), "layer")
    torch.save([x, y], tmp_path / "tensors.pt")
    loaded = torch.load(tmp_path / "tensors.pt", weights_only=True)
    torch.testing.assert_close(loaded[0], x)
    assert step_of(loaded[1]) is None
    torch.testing.assert_close(copy.deepcopy(x), x)


def test_a_state_that_feeds_itself_does_not_grow_without_end():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.state = torch.zeros(2, 4)

        def forward(self, x):
            y = self.norm(x)
            self.state = (self.state + y).detach()
            return y

    model = kn.convert(Recurrent())
    for _ in range(1500):  # two calls each
        model(torch.randn(2, 4))
    assert step_of(model.state).depth <= 2000
