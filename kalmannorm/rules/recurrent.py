"""Recurrent layers and cells: the gates by quadrature, step by step until the moments of the state settle.

A state counts as independent of the next input, and the factors of a product as independent of each other. Inputs at
different times share one belief, and outputs have that of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.kernels.formulas import at_least_float32
from kalmannorm.rules.arithmetic import add, dropout, mul
from kalmannorm.rules.linear import linear
from kalmannorm.rules.pointwise import quadrature, relu
from kalmannorm.rules.shape import cat, cut
from kalmannorm.rules.table import aliases, rule

# Of later steps the moments count as settled: a gate that forgets one half leaves 0.4 % of what was before.
_STEPS = 8
_NODES = 33
_State = tuple[Gaussian, ...]  # (S, hidden) each: the hidden state, and of an LSTM the cell
# From the input, through its matrix, and the state to the next state.
_Step = Callable[[Gaussian, _State, Sequence[Any]], _State]


def _sigmoid(x: Gaussian) -> Gaussian:
    return quadrature(x, torch.sigmoid, _NODES)


def _tanh(x: Gaussian) -> Gaussian:
    return quadrature(x, torch.tanh, _NODES)


def _through(x: Gaussian, which: int, weights: Sequence[Any]) -> Gaussian:
    """The input (0) or the state (1) through its matrix and bias."""
    return linear(x, weights[which], weights[2 + which] if len(weights) > 3 else None)


def _parts(x: Gaussian, count: int) -> Any:
    return cut(torch.chunk, x, 1, count, 1)


def _lstm(x: Gaussian, state: _State, weights: Sequence[Any]) -> _State:
    """``c' = f c + i g`` and ``h' = o tanh(c')``, and a projection of ``h'`` if there is one."""
    hidden, cell = state
    x = add(x, _through(hidden, 1, weights))
    enter, keep, _, leave = _parts(_sigmoid(x), 4)  # one call, although one part of it is not needed
    cell = add(mul(keep, cell), mul(enter, _tanh(_parts(x, 4)[2])))
    hidden = mul(leave, _tanh(cell))
    return linear(hidden, weights[-1]) if len(weights) % 2 else hidden, cell


def _gru(x: Gaussian, state: _State, weights: Sequence[Any]) -> _State:
    """``n = tanh(x_n + r h_n)`` and ``h' = n + z (h - n)``, with one ``z`` for both."""
    (h,) = state
    driven = _through(h, 1, weights)
    r, z, _ = _parts(_sigmoid(add(x, driven)), 3)
    n = _tanh(add(_parts(x, 3)[2], mul(r, _parts(driven, 3)[2])))
    stays, goes = z.mean.square() + z.var, (1 - z.mean).square() + z.var
    apart = h.mean - n.mean
    return (Gaussian(n.mean + z.mean * apart, goes * n.var + stays * h.var + z.var * apart.square()),)


def _plain(activation: Callable[[Gaussian], Gaussian]) -> _Step:
    """``h' = activation(x + h)``."""
    return lambda x, state, weights: (activation(add(x, _through(state[0], 1, weights))),)


def _believed(value: Gaussian | Tensor, samples: int) -> Gaussian:
    """A belief, or that about a known tensor, whose axis of samples this is."""
    if isinstance(value, Gaussian):
        return value
    known = at_least_float32(value)
    return Gaussian(known, torch.zeros_like(known)).pool([samples])


def _layers(step: _Step) -> Callable[..., Any]:
    def layers(x: Gaussian | Tensor, hx: Any, weights: Any, has_biases: Any, num_layers: int, drop: float,
               training: bool, bidirectional: bool, batch_first: bool) -> Any:  # fmt: skip
        """All layers and directions: the output ``(N, T, C)``, or by ``batch_first`` of another order, and states."""
        if not isinstance(has_biases, bool) or x.ndim != 3:
            return Unknown("a packed sequence, or one without a batch axis")
        time, directions = 1 if batch_first else 0, 2 if bidirectional else 1
        length = x.shape[time]
        x = _believed(x, 1 - time).full([2]).pool([time]).map(lambda t: t.squeeze(time))
        first = [_believed(each, 1).full([0, 2]) for each in (hx if isinstance(hx, list | tuple) else [hx])]
        last: list[_State] = []
        own = len(weights) // (num_layers * directions)
        for layer in range(num_layers):
            outputs = []
            for k in range(layer * directions, (layer + 1) * directions):
                state = tuple([Gaussian(each.mean[k], each.var[k]) for each in first])
                its = weights[k * own : (k + 1) * own]
                driven = _through(x, 0, its)
                for _ in range(min(length, _STEPS)):
                    state = step(driven, state, its)
                outputs.append(state[0])
                last.append(state)
            x = cat(outputs, 1)
            x = dropout(x, drop, training) if layer < num_layers - 1 else x
        states = [cat([each.map(lambda t: t.unsqueeze(0)) for each in states], 0) for states in zip(*last, strict=True)]
        return x.map(lambda t: t.unsqueeze(time)), *states

    return layers


def _cell(step: _Step) -> Callable[..., Any]:
    def cell(x: Gaussian | Tensor, hx: Any, *weights: Tensor | None) -> Any:
        """One step."""
        states = hx if isinstance(hx, list | tuple) else [hx]
        if x.ndim != 2:
            return Unknown("a recurrent cell without a batch axis")
        after = step(_through(_believed(x, 0), 0, weights), tuple([_believed(each, 0) for each in states]), weights)
        return after if len(after) > 1 else after[0]

    return cell


for _name, _step in (("lstm", _lstm), ("gru", _gru), ("rnn_tanh", _plain(_tanh)), ("rnn_relu", _plain(relu))):
    rule(*aliases(_name))(_layers(_step))
    rule(*aliases(f"{_name}_cell"))(_cell(_step))
