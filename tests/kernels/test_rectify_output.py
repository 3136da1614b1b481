"""A layer whose output is rectified in place, against a ReLU of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kalmannorm as kn

RELUS = {
    "module": nn.ReLU(inplace=True),
    "function": lambda y: F.relu(y, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu_": torch.relu_,
    "method": lambda y: y.relu_(),
}


class Net(nn.Module):
    """Two norms; between them, whatever is done to the first one's output."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.between = [between]  # no submodule

    def forward(self, x):
        return self.second(self.between[0](self.first(x)))


def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def step(between, create_graph=False):
    """Output, input gradient and parameter gradients; and whether a ReLU was derived apart from its layer."""
    torch.manual_seed(0)
    model, seen = kn.convert(Net(between)), []
    inner = model.between[0]
    model.between[0] = lambda y: seen.append(inner(y)) or seen[0]
    x = images().requires_grad_()
    y = model(x)
    leaves = (x, *model.parameters())
    gradients = torch.autograd.grad(y.square().sum() + y.sin().sum(), leaves, create_graph=create_graph)
    if create_graph:
        gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, allow_unused=True)
    return [y, *gradients], type(seen[0].grad_fn).__name__ == "ReluBackward0"


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_the_same_numbers(relu):
    ours, apart = step(relu)
    theirs, theirs_apart = step(F.relu)
    assert not apart
    assert theirs_apart
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_a_gradient():
    ours, theirs = step(F.relu_, True)[0], step(F.relu, True)[0]
    largest = max(t.abs().max().item() for t in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


def add_before(y):
    return y + 1, F.relu_(y)


def look_before(y):
    mean = y.mean()
    return F.relu_(y) * mean.sigmoid()


def sum_before(y):
    before, after = add_before(y)
    return before + after


@pytest.mark.parametrize("between", [look_before, sum_before])
def test_not_where_something_was_computed_from_it_before(between):
    def apart(y):
        copied = y.clone()
        before = copied.mean() if between is look_before else copied + 1
        after = F.relu(copied)
        return after * before.sigmoid() if between is look_before else before + after

    torch.testing.assert_close(step(between)[0], step(apart)[0])


def test_not_where_somebody_asks_for_the_gradient_before_it():
    seen = []

    def watched(y):
        y.register_hook(seen.append)
        return F.relu_(y)

    def plain(y):
        y.register_hook(seen.append)
        return F.relu(y)

    torch.testing.assert_close(step(watched)[0], step(plain)[0])
    torch.testing.assert_close(*seen)

    def retained(y):
        y.retain_grad()
        return F.relu_(y)

    _, apart = step(retained)
    assert apart


def test_changed_twice_in_place():
    theirs = step(lambda y: F.relu(F.relu(y).mul(2)))[0]
    torch.testing.assert_close(step(lambda y: F.relu_(F.relu_(y).mul_(2)))[0], theirs, rtol=1e-5, atol=3e-5)


def test_an_operation_that_needs_the_value_before_still_raises():
    def saved(y):
        y.sin()
        return F.relu_(y)

    step(saved)

    def needed(y):
        sine = y.sin()
        return F.relu_(y) + sine

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(needed)


def test_without_gradients():
    model = kn.convert(Net(F.relu_))
    with torch.no_grad():
        y = copy.deepcopy(model)(images())
    torch.testing.assert_close(y, model(images()).detach())


def test_a_layer_with_its_activation_takes_one_step():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), kn.KalmanNormAct2d(4, act=nn.ReLU(inplace=True)), nn.Conv2d(4, 4, 3),
                          kn.KalmanNormAct2d(4, act=nn.ReLU()))  # fmt: skip
    apart = copy.deepcopy(stock)
    for layer in (apart[1], apart[3]):
        layer.act.register_forward_hook(lambda module, args, y: None)  # somebody listens: no fusing
    apart[3].act.inplace = False
    results = []
    for model in (kn.connect(stock), kn.connect(apart)):
        x = images().requires_grad_()
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters())), *model.buffers()])
    torch.testing.assert_close(*results)
    assert "ReluBackward" not in type(results[0][0].grad_fn).__name__
    rows = [kn.describe(model, images()).rows[1] for model in (stock, apart)]
    assert rows[0].through == rows[1].through
    assert rows[0].prior_from == rows[1].prior_from


@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                                    "register_full_backward_pre_hook"])  # fmt: skip
def test_an_activation_that_is_listened_to_is_called(listen):
    layer = kn.KalmanNormAct2d(4, act=nn.ReLU())
    heard = []
    getattr(layer.act, listen)(lambda *_: heard.append(1))
    kn.connect(nn.Sequential(nn.Conv2d(3, 4, 1), layer))(torch.randn(2, 3, 5, 5)).sum().backward()
    assert heard == [1]
