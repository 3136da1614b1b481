"""A gain that falls while a network trains."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import kalmannorm as kn


def odds(layer, samples=2):
    gain = float(torch.as_tensor(layer.kalman_gain(samples)).detach())
    return gain / (1 - gain)


def small():
    return kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), input_stats=([0.0] * 3, [1.0] * 3))


@pytest.mark.parametrize("gain", ["prior-strength", "learned"])
@pytest.mark.parametrize("make", [lambda **k: kn.KalmanNorm2d(4, **k), lambda **k: kn.GroupKalmanNorm(2, 4, **k)])
def test_the_odds_of_a_learned_gain_are_divided(make, gain):
    layer = make(gain=gain)
    with torch.no_grad():
        layer.gain.fill_(0.7)  # something was learned
    before = odds(layer)
    assert kn.anneal(layer, 3.0) is layer
    assert odds(layer) == pytest.approx(before / 3, rel=1e-5)
    kn.anneal(layer, 1 / 3)
    assert odds(layer) == pytest.approx(before, rel=1e-5)


def test_many_small_steps_are_one_large_one():
    layer = kn.KalmanNorm2d(4)
    before = odds(layer)
    for _ in range(2000):
        kn.anneal(layer, 10 ** (1 / 2000))
    assert odds(layer) == pytest.approx(before / 10, rel=1e-3)


def test_fixed_and_frozen_gains_stay():
    model = nn.Sequential(kn.KalmanNorm2d(4), kn.KalmanNorm2d(4, gain=0.3), kn.freeze(kn.KalmanNorm2d(4)))
    before = [odds(layer) for layer in model]
    kn.anneal(model, 2.0)
    assert [before[i] / odds(model[i]) for i in range(3)] == pytest.approx([2, 1, 1], rel=1e-5)


def test_the_optimizer_goes_on_learning_the_same_parameter():
    torch.manual_seed(0)
    model = small()
    gain = model[1].gain
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    kn.anneal(model, 2.0)
    at = gain.item()
    optimizer.step()
    assert model[1].gain is gain
    assert gain.item() == pytest.approx(at - 0.1 * gain.grad.item())
    assert gain.grad.item() != 0


def test_a_copy_of_the_state_has_what_was_annealed():
    layer, other = kn.KalmanNorm2d(4), kn.KalmanNorm2d(4)
    kn.anneal(layer, 5.0)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert odds(other) == odds(layer)


def test_a_compiled_network_is_not_compiled_again():
    counter = CompileCounter()
    model = small()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(2, 3, 8, 8)
    outputs, counts = [], []
    for _ in range(3):
        outputs.append(compiled(x.clone()))
        counts.append(counter.frame_count)
        kn.anneal(model, 2.0)
    assert counts == [1, 1, 1]
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_must_be_above_zero(factor):
    with pytest.raises(ValueError, match="expected a number above 0"):
        kn.anneal(kn.KalmanNorm2d(4), factor)


def test_a_network_needs_gains_that_are_learned():
    with pytest.raises(ValueError, match="Sequential has no Kalman layer that learns its gain"):
        kn.anneal(nn.Sequential(kn.KalmanNorm2d(4, gain=0.1), nn.BatchNorm2d(4)), 2.0)


def test_a_step_that_the_type_cannot_hold_is_refused():
    layer = kn.KalmanNorm2d(4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"factor=1\.01, which gains of type torch\.bfloat16 cannot hold"):
        kn.anneal(layer, 1.01)
    assert layer.gain.item() == 0
    kn.anneal(layer, 1.0)
    before = odds(layer)
    kn.anneal(layer, 2.0)
    assert odds(layer) == pytest.approx(before / 2, rel=0.02)
