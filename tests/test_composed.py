"""Functions of one activation that are written as several calls, against draws."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import prior_of
from torch import nn

import kalmannorm as kn
from kalmannorm.composed import _LONGEST, _chain
from kalmannorm.gaussian import Gaussian
from kalmannorm.recording import Recorder, attach
from kalmannorm.rules import RULES
from kalmannorm.rules.pointwise import quadrature
from kalmannorm.steps import step_of

_ONE, _EACH = nn.Parameter(torch.tensor(1.7)), nn.Parameter(torch.tensor([0.5, 0.8, 1.1, 1.4, 1.7])[:, None, None])


def _squared(y):
    return y * y


def _clipped(x):
    y = x.clone()
    y[y < 0] = 0
    return y
_MAP = torch.ones(5, 8, 8)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x >= 1).float()

    @staticmethod
    def backward(ctx, g):
        return g


def prior_and_draws(activation):
    """The belief about an activation's output, and its moments of draws a channel."""
    generator = torch.Generator().manual_seed(0)
    x = Gaussian(0.7 * torch.randn(1, 5, 1, 1, generator=generator), torch.full((1, 5, 1, 1), 1.69), (2000, 5, 8, 8))
    h = x.draw(x.shape, generator)
    with Recorder():
        attach(h, x, "layer")
        output = activation(h)
        belief = prior_of(output, 1)
    var, mean = torch.var_mean(output.transpose(0, 1).flatten(1), 1)
    return belief, mean, var


@pytest.mark.parametrize("activation", {
    "a radial basis": lambda x: torch.exp(-(3 * x).square()),
    "a Gaussian's slope": lambda x: x * torch.exp(-x * x),
    "squared ReLU": lambda x: F.relu(x) ** 2,
    "StarReLU": lambda x: 0.89 * F.relu(x).square() - 0.45,
    "a broken power": lambda x: F.relu(x).pow(1.5),
    "a root": lambda x: torch.sqrt(F.relu(x) + 1e-3),
    "a number to a power": lambda x: torch.pow(2.0, F.relu(x)),
    "a capped ReLU": lambda x: F.relu(x).clamp(max=1.0),
    "ReLU twice": lambda x: F.relu(F.relu(x)),
    "swish of one slope": lambda x: x * torch.sigmoid(_ONE * x),
    "swish of a slope a channel": lambda x: x * torch.sigmoid(_EACH * x),
    "ACON-C": lambda x: _ONE * x * torch.sigmoid(_EACH * _ONE * x) + 0.3 * x,
    "PReLU as a gate": lambda x: x * F.prelu(x, torch.tensor([0.3])),
    "a copy": lambda x: x.clone() * torch.sigmoid(x.contiguous()),
    "a gate without gradients": lambda x: x * torch.sigmoid(x).detach(),
    "in place": lambda x: x.clone().mul_(torch.sigmoid(x)),
    "a cube": lambda x: x * x * x,
    "three factors": lambda x: torch.sigmoid(x) * torch.tanh(x) * x,
    "GELU by tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.0447 * torch.pow(x, 3)))),
    "Snake": lambda x: x + torch.sin(2 * x) ** 2 / 2,
    "softsign by hand": lambda x: x / (1 + x.abs()),
    "swish by hand": lambda x: x / (1 + torch.exp(-x)),
    "a sigmoid by hand": lambda x: 1 / (1 + torch.exp(-x)),
    "an inverse": lambda x: (2 + torch.tanh(x)).reciprocal(),
    "an inverse root": lambda x: (1 + x * x).rsqrt(),
    "a negative power": lambda x: (1 + x * x) ** -1.5,
    "a product inside": lambda x: torch.exp(-x * torch.sigmoid(x)),
    "a square by itself": lambda x: torch.exp(-(x * x)),
    "a square of a ReLU": lambda x: _squared(F.relu(x)),
    "an exponent in a tensor": lambda x: torch.tanh(x) ** torch.tensor(2.0),
    "a ReLU of a gate": lambda x: F.relu(x * torch.sigmoid(x)),
    "types between": lambda x: x * torch.sigmoid(x.double()).float(),
    "a number of numpy's": lambda x: torch.tanh(x * np.float64(0.8)) ** 2,
    "a number on another device": lambda x: x * torch.sigmoid(torch.tensor(1.7) * x),
    "a sum": lambda x: x + F.silu(x),
    "a hand-written leaky ReLU": lambda x: torch.where(x > 0, x, 0.1 * x),
    "ELU by a mask": lambda x: torch.where(x < 0, torch.exp(x) - 1, x),
    "a gate by a comparison": lambda x: x * (x > 0.3),
    "the rest of a band": lambda x: x * ~((x > -0.5) & (x < 1)),
    "negative elements set to zero": _clipped,
    "what a ReLU left": lambda x: (F.relu(x) != 0) * x,
    "a logarithm": lambda x: torch.log1p(F.relu(x)),
    "a logarithm of a softplus": lambda x: torch.log2(F.softplus(x) + 0.1),
    "a mask of a type": lambda x: (x > 0).to(x.dtype) * x,
    "a mask of its type": lambda x: x * (x > 0).type_as(x),
    "types of several kinds": lambda x: x * torch.sigmoid(x.to(torch.float64)).to(x),
    "a gate in numbers": lambda x: x * torch.where(x > 0, 1.0, 0.5),
    "after a map": lambda x: _squared(F.relu(x + 0 * _MAP)),
    "a mask for all": lambda x: torch.where(torch.tensor(True), x, F.relu(x)),
    "a mask a channel": lambda x: F.relu(x).where(_EACH > 1, x),
    "what a mask a channel fills": lambda x: (2 * x).masked_fill(_EACH > 1, 0.5) + x,
    "a comparison and a mask": lambda x: torch.where((x > 0) & (_EACH > 1), x, 0.1 * x),
    "a moving average": lambda x: torch.lerp(x, torch.tanh(x), 0.3),
    "a sum of products": lambda x: torch.addcmul(x, x, torch.tanh(x), value=0.5),
    "a sum of quotients": lambda x: torch.addcdiv(x, x, 1 + x.abs(), value=2),
    "a difference": lambda x: F.softplus(x) - torch.tanh(x),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_one_function(activation):
    belief, mean, var = prior_and_draws(activation[1])
    assert ((belief.mean[0] - mean).abs() < 0.015 * var.sqrt()).all()
    assert ((belief.var[0] / var).log().abs() < 0.06).all()


def test_a_spiking_neuron():
    """Two steps of leaky integrate-and-fire. The mean is that of draws; steps count as independent, though they are of
    one input: the variance is up to two times too small."""

    def neuron(x):
        first = _Spike.apply(0.8 * x)
        left = 0.8 * x * (1 - first.detach())
        return (first + _Spike.apply(0.4 * left + 0.8 * x)) / 2

    belief, mean, var = prior_and_draws(neuron)
    torch.testing.assert_close(belief.mean[0], mean, rtol=0, atol=0.05)
    assert ((belief.var[0] / var > 0.4) & (belief.var[0] / var < 1.2)).all()


@pytest.mark.parametrize("removed", [-math.inf, -1e9, torch.tensor(-math.inf)])
def test_scores_that_a_threshold_removes(removed):
    """Before a softmax: the belief stays finite."""
    belief, *_ = prior_and_draws(lambda x: torch.where(x > 0.2, x, removed).clamp(min=-1e6))
    assert belief.mean.isfinite().all()
    assert (belief.var < 10).all()


@pytest.mark.parametrize("activation", [
    lambda x: torch.sign(x).detach() + (x.clamp(-1, 1) - x.clamp(-1, 1).detach()),
    lambda x: x + (torch.round(2 * x) / 2 - x).detach(),
    lambda x: x.masked_fill(x < 0.4, 0.0),
    lambda x: x * ((x > -0.5) & (x < 1)),
], ids=["a sign", "rounding", "a threshold", "a band"])  # fmt: skip
def test_jumps(activation):
    """Of binary and quantized networks with a straight-through gradient, within what 65 nodes see of a jump."""
    belief, mean, var = prior_and_draws(activation)
    torch.testing.assert_close(belief.mean[0], mean, rtol=0, atol=0.06)
    torch.testing.assert_close(belief.var[0], var, rtol=0, atol=0.1)


def test_a_line_before_a_rule_keeps_its_closed_form():
    """Lines leave a Gaussian one: nothing is integrated."""
    x = Gaussian(torch.randn(1, 5), torch.rand(1, 5), (4, 5))
    h = torch.randn(4, 5)
    with Recorder():
        attach(h, x, "layer")
        found = prior_of(F.relu(2 * h - 1), 1)
    expected = RULES[F.relu](Gaussian(2 * x.mean - 1, 4 * x.var))
    torch.testing.assert_close((found.mean, found.var), (expected.mean, expected.var), rtol=1e-6, atol=1e-7)


def test_many_sums_of_one_activation_take_no_time():
    """Of 26 the paths from the top to the bottom are 2^26."""
    h = torch.randn(4, 5)
    with Recorder():
        attach(h, Gaussian(torch.zeros(1, 5), torch.ones(1, 5)), "layer")
        for _ in range(26):
            h = h + 0.1 * torch.tanh(h)
        began = time.perf_counter()
        assert prior_of(h, 1).mean.isfinite().all()
    assert time.perf_counter() - began < 20


def test_a_long_chain_is_cut():
    """The time to find the calls of one function grows with the square of their number."""
    h = torch.randn(4, 5)
    with Recorder():
        attach(h, Gaussian(torch.zeros(1, 5), torch.ones(1, 5)), "layer")
        for _ in range(30):
            h = 0.5 * h
        assert len(_chain(step_of(h), 2)) == _LONGEST + 1


@pytest.mark.parametrize("activation", [
    lambda h: h.abs() ** -1, lambda h: torch.tanh(h) ** -1, lambda h: h.abs() ** -0.5, lambda h: 1 / torch.tanh(h),
    lambda h: torch.tanh(h).reciprocal(), lambda h: h.square().rsqrt(), lambda h: h / torch.tanh(h - 0.1),
])  # fmt: skip
def test_what_divides_by_zero_at_a_node_has_finite_gradients(activation):
    model = between(activation)
    with torch.no_grad():
        model[1].bias.zero_()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_an_output_that_was_given_is_not_written_again():
    h, out = torch.randn(1, 5), torch.empty(1, 5)
    with Recorder(), torch.no_grad():
        attach(h, Gaussian(torch.zeros(1, 5), torch.ones(1, 5)), "layer")
        product = torch.mul(h, torch.sigmoid(h), out=out)
        before = product.clone()
        prior_of(product, 1)
    assert torch.equal(out, before)


def test_slopes_of_channels_in_a_chain_lie_along_channels():
    """Also where the last axis is as long."""
    slopes = torch.linspace(0, 1, 5)
    h = torch.randn(2, 5, 4, 5)
    with Recorder():
        attach(h, Gaussian(torch.zeros(1, 1, 1, 5), torch.ones(1, 1, 1, 5)), "layer")
        belief = prior_of(F.prelu(torch.tanh(h), slopes) + 1, 1)
    assert (belief.var[0].diff() > 0).all()


def test_a_network_of_radial_bases_lives():
    """Call by call, its prior would be of what no Gaussian reaches, and would shut it off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), RadialBasis(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    output = kn.convert(model)(torch.randn(256, 4))
    assert (output.std(0) > 0.5).all()


class RadialBasis(nn.Module):
    def forward(self, x):
        return torch.exp(-(3 * x).square())


@pytest.mark.parametrize(
    ("by_hand", "function"),
    [
        (lambda x: x * torch.sigmoid(x), F.silu),
        (lambda x: x.mul_(x.sigmoid()), F.silu),
        (lambda x: torch.mul(input=torch.sigmoid(x), other=x), F.silu),
        (lambda x: x * F.relu6(x + 3, inplace=True) / 6, F.hardswish),
        (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
        (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    ],
)
def test_a_gate_by_hand_is_as_torchs_own_function(by_hand, function):
    """The factors of ``x * sigmoid(x)`` are one activation's functions, and no independent ones."""
    x = torch.randn(2, 3, 8, 8)
    found = []
    for activation in (by_hand, function):
        torch.manual_seed(0)
        model = between(activation)
        y = model(x)
        y.square().sum().backward()
        found.append((y, [model[0].weight.grad, model[1].weight.grad]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-3, atol=2e-3)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=0.01 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("by_hand", "function"),
    [
        (lambda x: torch.max(x, 0.2 * x), lambda x: F.leaky_relu(x, 0.2)),
        (lambda x: torch.maximum(-x, x), torch.abs),
        (lambda x: torch.minimum(x, torch.zeros(())), lambda x: -F.relu(-x)),
    ],
)
def test_a_corner_by_hand_is_as_torchs_own_function(by_hand, function):
    """Within what 65 nodes see of a corner."""
    ours, torchs = (between(each) for each in (by_hand, function))
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), torchs(x), rtol=0.02, atol=0.02)


def between(activation):
    """A function of an activation, between two layers."""
    function = nn.Module()
    function.forward = activation
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), function, nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    return kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))


@pytest.mark.parametrize(
    "gate",
    [lambda h: torch.sigmoid(F.conv2d(h, torch.ones(3, 3, 1, 1))), F.dropout, lambda h: h * torch.ones(1, 4, 4),
     lambda h: torch.sigmoid(h.max(1, keepdim=True)[0]), lambda h: torch.sigmoid(h.roll(1, 2))],
)  # fmt: skip
def test_a_gate_of_more_than_the_activation_counts_as_independent(gate):
    h = torch.randn(2, 3, 4, 4)
    with Recorder():
        attach(h, Gaussian(torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), "layer")
        factor = gate(h)
        product = h * factor
    expected = RULES[torch.mul](prior_of(h, 1), prior_of(factor, 1))
    found = prior_of(product, 1)
    torch.testing.assert_close((found.mean, found.var), (expected.mean, expected.var))


@pytest.mark.parametrize("gate", [lambda h: h.abs().sqrt(), lambda h: torch.exp(7 * h), lambda h: F.relu(h) ** 1.5])
def test_gates_whose_slopes_or_values_may_be_infinite_have_finite_gradients(gate):
    model = between(lambda h: h * gate(h))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_gate_without_gradients_gives_none():
    def gated(h):
        with torch.no_grad():
            gate = torch.sigmoid(h)
        return h * gate

    x = torch.randn(1, 5, 1, 1).requires_grad_()
    with Recorder():
        h = torch.zeros(2, 5, 4, 4)
        attach(h, Gaussian(x, torch.ones(1, 5, 1, 1)), "layer")
        found = prior_of(gated(h), 1)
    slope, = torch.autograd.grad(found.mean.sum(), x)
    torch.testing.assert_close(slope, quadrature(Gaussian(x, torch.ones_like(x)), torch.sigmoid).mean)


@pytest.mark.parametrize("activation", [
    lambda h: h * torch.sigmoid(_ONE * h),
    lambda h: F.relu(h) ** 2,
    lambda h: torch.max(h, 0.2 * h),
    lambda h: h.flatten(1).unflatten(1, (5, 6, 6)),
    lambda h: h.flatten(1).unflatten(dim=1, sizes=(5, 6, 6)),
    lambda h: torch.maximum(h, h.max(1, keepdim=True)[0] - 1),
    lambda h: h.tile(1, 1, 2, 1) * h.std((2, 3), keepdim=True),
    lambda h: h * (h.std() + 1) + h.max(),
    lambda h: torch.where(torch.arange(6) > 2, h, h.amin((2, 3), keepdim=True)),
    lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
])  # fmt: skip
def test_a_compiled_activation_by_hand(activation):
    torch.compiler.reset()  # each case is another code of one module's name
    torch.manual_seed(0)
    model, x = between(activation), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("logarithm", [lambda x: torch.log(x.abs()), lambda x: torch.log10(x * x + 1e-6)])
def test_a_logarithm_of_what_is_zero_at_a_node(logarithm):
    x = Gaussian(torch.tensor([0.0, 0.3, 2.0]).view(1, 3), torch.ones(1, 3), (10_000, 3))
    h = x.draw(x.shape, torch.Generator().manual_seed(0))
    with Recorder():
        attach(h, x, "layer")
        belief = prior_of(output := logarithm(h), 1)
    var, mean = torch.var_mean(output, 0)
    assert ((belief.mean[0] - mean).abs() < 0.15 * var.sqrt()).all()
    assert ((belief.var[0] / var).log().abs() < 0.5).all()
