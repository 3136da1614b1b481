"""How beliefs travel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Checkpointed, prior_after
from torch import nn

import kalmannorm as kn
from kalmannorm.evaluation import exact
from kalmannorm.gaussian import Gaussian
from kalmannorm.propagation import is_open
from kalmannorm.steps import Step


def assign(net, y):
    z = torch.zeros(y.shape)
    z[:, :2] = y[:, :2]
    return z


def assign_through_a_view(net, y):
    y[:, :2][:, 1:] = y[:, 2:3]
    return y


def relu_on_a_view(net, y):
    y.view(2, 4, 36).relu_()
    return y


def overwrite_in_place(net, y):
    y *= 2
    return y.add_(1)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda net, y: y + net.constant, "Tensor.add"),
        (overwrite_in_place, "Tensor.add_"),
        (lambda net, y: F.interpolate(y, scale_factor=2), "nn.functional.interpolate"),
        (lambda net, y: torch.cat([y[:, 2:], y[:, :2]], 1), "cat"),
        (lambda net, y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "Tensor.permute"),
        (lambda net, y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)), "Tensor.mul"),
        (lambda net, y: F.channel_shuffle(y, 2), "nn.functional.channel_shuffle"),
        (lambda net, y: y.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6), "Tensor.reshape"),
    ],
)
def test_a_belief_crosses(between, expected):
    row = prior_after(between)
    assert row.prior_from == ("first",)
    assert row.through[-1].endswith(expected)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda net, y: torch.cumsum(y, 1), "no rule for torch.cumsum"),
        (lambda net, y: 1 / y, "no rule for torch.Tensor.__rtruediv__"),
        (assign, "assigned in place"),
        (assign_through_a_view, "assigned in place"),
        (relu_on_a_view, "a view of it was changed in place"),
        (lambda net, y: torch.ones(2, 4, 6, 6), "does not depend on the network's input"),
        (lambda net, y: y + (y.cumsum(1) > 0), "no rule for torch.Tensor.cumsum"),
    ],
)
def test_what_cannot_be_followed_says_why(between, reason):
    row = prior_after(between)
    assert row.prior_from == ()
    assert reason in row.reason


def test_an_unknown_activation_is_not_taken_for_a_constant():
    """x + y with y of unknown belief: no prior, although y carries none."""
    row = prior_after(lambda net, y: y + torch.cumsum(y, 1))
    assert row.reason.startswith("no rule for")


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["output", "posterior"])
def test_compiles_as_one_graph_without_recompiling(carry):
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager = kn.convert(Checkpointed(False), carry=carry).double()
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 3, 10, 10, dtype=torch.float64)  # in double: rounding adds up over layers
        a, b = eager(x), fast(x)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for model, y in ((eager, a), (compiled, b)):
            model.zero_grad()
            y.square().sum().backward()
        for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
    assert counters["stats"]["unique_graphs"] == 1
    for p, q in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert not is_open()


def test_what_does_not_depend_on_values_is_a_constant():
    """Stochastic depth draws its mask by ``x.new_empty``."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.first(x)
            mask = x.new_empty((2, 1, 1, 1)).fill_(1.0)
            mask[0] = 0.0
            return self.second(x * mask + torch.zeros_like(x))

    model = kn.convert(Dropped())
    assert kn.describe(model, torch.randn(2, 4, 5, 5)).rows[1].through == (
        "torch.Tensor.mul", "torch.Tensor.add",
    )  # fmt: skip


def test_a_known_tensor_in_an_activations_shape_is_a_constant():
    """torchvision's RPN expands constants to an activation's shape."""
    row = prior_after(lambda net, y: y + net.constant.expand_as(y).type_as(y).to(y))
    assert row.through == ("torch.Tensor.add",)
    row = prior_after(lambda net, y: y + torch.index_select(net.constant, 0, y[0, :, 0, 0].argsort()))
    assert row.reason == "no rule for torch.Tensor.argsort"
    chosen = Step(torch.index_select, (torch.ones(4), 0, Step(None, (), {}, (4,), belief=_a_belief())), {}, (4,))
    assert exact(chosen).reason == "torch.index_select of a known tensor, by an activation"


def _a_belief():
    return Gaussian(torch.zeros(4), torch.ones(4), (4,))
