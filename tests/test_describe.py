"""The table of who gets a prior."""

import pytest
import torch
import torchvision
from networks import made_of
from torch import nn

import kalmannorm as kn


def test_resnet50():
    model = kn.convert(torchvision.models.resnet50())
    description = kn.describe(model, torch.randn(2, 3, 64, 64))
    assert len(description.rows) == 53
    assert description.with_prior == 52
    first = description.rows[0]
    assert (first.name, first.kind, first.prior_from) == ("bn1", "KalmanNorm2d", ())
    assert first.reason == "the network's input 'x'"
    rows = {row.name: row for row in description.rows}
    assert rows["layer1.0.bn1"].prior_from == ("bn1",)
    assert [f.split(".")[-1] for f in rows["layer1.0.bn1"].through] == ["relu", "max_pool2d", "conv2d"]
    assert rows["layer1.1.bn1"].prior_from == ("layer1.0.bn3", "layer1.0.downsample.1")
    assert all(row.gain == pytest.approx(0.1) for row in description.rows[1:])
    text = str(description)
    assert "52 of 53 layers have a prior" in text
    assert "no prior: the network's input" in text
    assert text.count("\n") == 54


def test_input_stats_complete_resnet50():
    model = kn.convert(torchvision.models.resnet50(), input_stats=([0.0] * 3, [1.0] * 3))
    description = kn.describe(model, torch.randn(2, 3, 64, 64))
    assert description.with_prior == 53


def test_nothing_is_left_changed():
    model = kn.convert(torchvision.models.resnet18(num_classes=3))
    model.layer1.eval()
    flags = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    kn.describe(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.rand(1) == expected
    assert [m.training for m in model.modules()] == flags
    for before, after in zip(buffers, model.buffers(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, kn.KalmanNorm))


def test_reasons():
    model = made_of(
        lambda self, x: self.fixed(self.first(x)),
        unused=kn.KalmanNorm2d(3), first=kn.KalmanNorm2d(3), fixed=kn.KalmanNorm2d(3, gain=1.0),
    )  # fmt: skip
    rows = kn.describe(kn.connect(model), torch.randn(2, 3, 4, 4)).rows
    assert {row.name: row.reason for row in rows} == {
        "first": "the network's input 'x'",
        "fixed": "its gain is 1",
        "unused": "the layer was not called",
    }
    alone = nn.Sequential(kn.KalmanNorm2d(3), kn.KalmanNorm2d(3))
    with pytest.warns(UserWarning, match="no connected module was called around it"):
        rows = kn.describe(alone, torch.randn(2, 3, 4, 4)).rows
    assert rows[1].reason == "no module above it is connected"
    with pytest.raises(ValueError, match="Linear has no Kalman layer to describe"):
        kn.describe(nn.Linear(2, 2), torch.randn(2, 2))


def test_first_nonfinite_needs_a_layer():
    with pytest.raises(ValueError, match="has no KalmanNorm layer"):
        kn.first_nonfinite(nn.BatchNorm2d(3))


def test_frozen_layers_use_no_prior():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    kn.freeze(model[3])
    rows = kn.describe(model, torch.randn(2, 3, 6, 6)).rows
    assert rows[1].reason == "it is frozen"


def test_a_network_whose_layers_all_use_running_statistics_says_so():
    class Eval(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    network = kn.convert(Eval(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert kn.describe(network, torch.randn(2, 3, 8, 8)).rows[0].reason == "it stays in eval()"
    kn.freeze(network)
    assert kn.describe(network, torch.randn(2, 3, 8, 8)).rows[0].reason == "it is frozen"


def test_a_buffer_that_the_call_makes_is_no_trouble():
    def forward(self, x):
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(2))
        return self.norm(x * self.cache)

    assert len(kn.describe(kn.convert(made_of(forward, norm=nn.BatchNorm1d(2))), torch.randn(4, 2)).rows) == 1


def test_a_compiled_network_is_not_compiled_again():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), input_stats=(0.0, 1.0))
    compiled, x = torch.compile(model, backend=backend), torch.randn(2, 3, 8, 8)
    compiled(x)
    assert len(graphs) == 1
    kn.describe(compiled, x)
    assert len(graphs) == 1


def test_described_between_a_forward_and_its_backward_pass():
    """Autograd has saved running statistics, which it must find as they were."""
    model, x = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval(), torch.randn(2, 3, 6, 6)
    y = model(x)
    kn.describe(model, x)
    y.sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_a_hook_before_the_network_comes_after_the_belief_about_its_input():
    """`input_stats` tell of what the network is called with."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    row = kn.describe(kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3)), torch.randn(2, 3, 6, 6)).rows[0]
    assert row.through[0] == "torch.Tensor.mul"


def test_a_part_by_itself_has_no_belief_about_the_networks_input():
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = kn.convert(nn.Sequential(part, nn.Flatten()), input_stats=([0.0] * 3, [1.0] * 3))
    x = torch.randn(2, 3, 6, 6)
    assert kn.describe(model, x).rows[0].prior_from == ("input",)
    assert kn.describe(model[0], x).rows[0].reason.startswith("the network's input")


class Keeps(nn.Module):
    """A network whose buffers become its input, its weight and a longer one; and one that is expanded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("last", torch.zeros(2, 3, 6, 6))
        self.register_buffer("weight", torch.zeros(4, 3, 3, 3))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("same", torch.ones(1).expand(5))

    def forward(self, x):
        self.last, self.weight, self.seen = x, self.conv.weight.detach(), torch.cat([self.seen, torch.ones(3)])
        return self.norm(self.conv(x))


@pytest.mark.parametrize("run", [kn.describe, kn.calibrate, lambda model, x: kn.recalibrate(model, [x])])
def test_buffers_that_forward_replaces_come_back_and_nothing_is_written_over(run):
    model, x = kn.convert(Keeps()), torch.randn(2, 3, 6, 6)
    kept, weight = x.clone(), model.conv.weight.detach().clone()
    run(model, x)
    assert torch.equal(x, kept)
    assert torch.equal(model.conv.weight, weight)
    assert not model.last.any()
    assert not model.weight.any()
    assert model.seen.tolist() == [0]
    assert model.same.tolist() == [1] * 5
