"""Recurrent layers and cells, against draws through torch's."""

import copy

import pytest
import torch
from drawing import agree, believe, check_unknown, covers, values
from torch import nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES

LAYERS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
GATES = dict(zip((*LAYERS, *CELLS), (4, 3, 1, 1) * 2, strict=True))
HIDDEN = 3


def _independent(function, state_weight):
    """Weights of a cell each gate of which has an input of its own, so that all factors are independent."""
    gates = GATES[function]
    w_ih = torch.diag(values(gates * HIDDEN))
    w_hh = torch.zeros(gates * HIDDEN, HIDDEN, dtype=torch.float64)
    w_hh[:HIDDEN] = state_weight * torch.eye(HIDDEN)
    return w_ih, w_hh, values(gates * HIDDEN, seed=1), values(gates * HIDDEN, seed=2)


@covers(*CELLS)
@pytest.mark.parametrize("groups", [1, 2])
def test_cells(function, groups):
    gates, n = GATES[function], 200_000
    # The state enters a GRU's new state twice, so not by its gates here.
    weights = _independent(function, 0.0 if gates == 3 else 0.7)
    x = believe((n, gates * HIDDEN), 0, groups)
    before = [believe((n, HIDDEN), 1 + k, groups) for k in range(2 if gates == 4 else 1)]
    generator = torch.Generator().manual_seed(0)
    drawn = [each.draw(each.shape, generator) for each in (x, *before)]
    if gates != 4:
        y, belief = function(drawn[0], drawn[1], *weights), RULES[function](x, before[0], *weights)
        agree(belief.of(y.shape), y, groups)
        return
    _, cell = function(drawn[0], drawn[1:], *weights)
    agree(RULES[function](x, before, *weights)[1].of(cell.shape), cell, groups)
    # A cell that nothing new enters, and of which a known share stays, is Gaussian.
    w_ih, _, bias, _ = weights
    w_ih[: 2 * HIDDEN] = 0
    bias[:HIDDEN] = -1e3
    hidden, _ = function(drawn[0], drawn[1:], *weights)
    agree(RULES[function](x, before, *weights)[0].of(hidden.shape), hidden, groups)


@covers(*LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("has_biases", [False, True])
def test_a_layer_is_its_cell_at_each_time(function, batch_first, has_biases):
    cell = CELLS[LAYERS.index(function)]
    weights = _independent(function, 0.5)[: 4 if has_biases else 2]
    x = believe((6, 5, weights[0].shape[1]), axes=(2,))
    if not batch_first:
        x = x.map(lambda t: t.transpose(0, 1)).of((5, 6, x.shape[2]))
    many = GATES[function] == 4
    zeros = torch.zeros(1, 6, HIDDEN, dtype=torch.float64)
    output, *last = RULES[function](
        x, [zeros, zeros] if many else zeros, list(weights), has_biases, 1, 0.0, True, False, batch_first
    )
    start = Gaussian(zeros[:1, 0], zeros[:1, 0])
    state = [start] * len(last)
    for _ in range(5):
        state = RULES[cell](x.map(lambda t: t[:, 0]), state if many else state[0], *weights)
        state = list(state) if many else [state]
    for got, want in zip(last, state, strict=True):
        torch.testing.assert_close((got.mean[0], got.var[0]), (want.mean, want.var))
    time = 1 if batch_first else 0
    assert output.mean.shape == (1, 1, HIDDEN)
    torch.testing.assert_close((output.mean.squeeze(time), output.var.squeeze(time)), (state[0].mean, state[0].var))


def _drawn(layer, x, n=2000):
    sample = x.draw((n, *x.shape[1:]), torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        return layer(sample)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("length", [1, 40])
def test_layers_and_directions_are_in_torchs_order(kind, length):
    """Each has a bias of its own, so that no two means are alike."""
    torch.manual_seed(0)
    layer = kind(64, 16, num_layers=2, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for k, bias in enumerate(p for name, p in layer.named_parameters() if name.startswith("bias_ih")):
            bias.copy_(torch.full_like(bias, 0.25 * (-1) ** k * (1 + k)))
    x = believe((4, length, 64), axes=(2,), dtype=torch.float32)
    output, last = _drawn(layer, x)
    last = last if isinstance(last, tuple) else (last,)
    function = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}[kind]
    zeros = torch.zeros(4, 4, 16)
    given = (zeros, zeros) if kind is nn.LSTM else zeros
    beliefs = RULES[function](x, given, layer._flat_weights, True, 2, 0.0, True, True, True)
    # The belief about outputs is that of each direction's last one.
    output = torch.cat([output[:, -1, :16], output[:, 0, 16:]], 1)
    for belief, drawn in zip(beliefs, (output, *last), strict=True):
        var, mean = torch.var_mean(drawn, 0 if drawn is output else 1, correction=0)
        got_mean, got_var = belief.mean.reshape(mean.shape), belief.var.reshape(mean.shape)
        # Gates share their inputs, so the moments are no exact ones.
        assert ((got_mean - mean).unflatten(-1, (-1, 16)).mean(-1).abs() < 0.2).all()
        assert 0.5 < (got_var.sum() / var.sum()) < 2


def test_a_projection_of_the_hidden_state():
    torch.manual_seed(0)
    layer = nn.LSTM(64, 32, proj_size=8)
    x = believe((5, 4, 64), axes=(2,), dtype=torch.float32)
    zeros = torch.zeros(1, 4, 8), torch.zeros(1, 4, 32)
    output, hidden, cell = RULES[torch.lstm](x, zeros, layer._flat_weights, True, 1, 0.0, True, False, False)
    assert [b.mean.shape for b in (output, hidden, cell)] == [(1, 1, 8), (1, 1, 8), (1, 1, 32)]
    with torch.no_grad():
        drawn, _ = layer(x.draw((5, 2000, 64), torch.Generator().manual_seed(0)))
    var = drawn.var((0, 1))
    assert 0.5 < output.var.sum() / var.sum() < 2


def test_dropout_between_layers():
    x, zeros = believe((4, 3, 6), axes=(2,)), torch.zeros(2, 4, 3, dtype=torch.float64)
    weights = [values(3, 6), values(3, 3), values(3, 3, seed=1), values(3, 3, seed=2)]
    found = [RULES[torch.rnn_tanh](x, zeros, weights, False, 2, 0.5, training, False, True)[0].var.sum()
             for training in (False, True)]  # fmt: skip
    assert found[1] > 1.1 * found[0]
    one = (x, zeros[:1], weights[:2], False, 1, 0.5)
    alike = [RULES[torch.rnn_tanh](*one, training, False, True)[0].var for training in (False, True)]
    assert torch.equal(*alike)


def test_states_that_are_given():
    """A state that is computed from the input, and a known one, of which the mean over samples counts."""
    x, weights = torch.zeros(3, 2, 4), [values(2, 4).float(), values(2, 2).float()]
    known = torch.tensor([[[1.0, 2.0]] * 2])
    nothing = Gaussian(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), (3, 2, 4))
    of_known = RULES[torch.rnn_tanh](nothing, known, weights, False, 1, 0.0, True, False, False)
    expected = known[0, 0]
    for _ in range(3):
        expected = torch.tanh(weights[1] @ expected)
    torch.testing.assert_close(of_known[1].mean[0, 0], expected)
    belief = Gaussian(known[:, :1], 0.1 * torch.ones(1, 1, 2), (1, 2, 2))
    of_belief = RULES[torch.rnn_tanh](x, belief, weights, False, 1, 0.0, True, False, False)
    assert (of_belief[1].var > 0).all()
    halves = [RULES[torch.rnn_tanh](nothing, each, weights, False, 1, 0.0, True, False, False)[1].mean
              for each in ((known / 3).half(), (known / 3).half().float())]  # fmt: skip
    assert torch.equal(*halves)
    # One belief for both layers, and for all of their channels.
    deep = [*weights, values(2, 2, seed=1).float(), values(2, 2, seed=2).float()]
    for sizes in ((1, 1, 1), (2, 1, 2)):
        state = Gaussian(torch.full(sizes, 0.5), torch.full(sizes, 0.1), (2, 2, 2))
        found = RULES[torch.rnn_tanh](x, state, deep, False, 2, 0.0, True, False, False)[1]
        assert found.mean.shape == (2, 1, 2)
        if sizes == (1, 1, 1):
            expected = found
    torch.testing.assert_close((found.mean, found.var), (expected.mean, expected.var))


def test_what_has_no_batch_axis_or_is_packed():
    weights = [values(2, 4), values(2, 2)]
    x = believe((5, 4))
    check_unknown("packed sequence", torch.rnn_tanh, x, torch.zeros(1, 2), weights, False, 1, 0.0, True, False, False)
    sizes = torch.tensor([2, 2, 1])
    more = (torch.zeros(1, 2, 2), weights, False, 1, 0.0, True, False)
    check_unknown("packed sequence", torch.rnn_tanh, x, sizes, *more)
    check_unknown("batch axis", torch.rnn_tanh_cell, believe((4,), axes=()), torch.zeros(2), *weights)


class Reader(nn.Module):
    """Convolution, recurrence over columns, and normalization of the last state, as in readers of text and video."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.recurrent, self.last = kind(32, 8, batch_first=True), nn.BatchNorm1d(8)

    def forward(self, x):
        columns = self.norm(self.conv(x)).flatten(1, 2).transpose(1, 2)
        _, state = self.recurrent(columns)
        return self.last((state[0] if isinstance(state, tuple) else state)[-1])


def test_a_compiled_network_where_torch_breaks_the_graph():
    model = kn.convert(Reader(nn.LSTM), input_stats=(0.0, 1.0))
    images = torch.randn(2, 3, 8, 1)
    alone = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images), alone(images))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_network(kind):
    torch.manual_seed(0)
    model = kn.convert(Reader(kind), input_stats=(0.0, 1.0))
    images = torch.randn(2, 3, 8, 5)
    assert kn.describe(model, images).with_prior == 2
    out = model(images)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
