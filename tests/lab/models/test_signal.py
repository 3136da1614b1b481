"""Networks for signals and rows: their shapes."""

import pytest
import torch
from model_checks import shapes
from torch import nn

from kalmannorm.lab.models.signal import SignalNet, TabularNet


def test_shapes():
    assert SignalNet(((8, 1), (16, 2)), kernel=3, num_classes=4, in_channels=2)(torch.randn(3, 2, 20)).shape == (3, 4)
    assert TabularNet(7, (8, 9), num_classes=4)(torch.randn(3, 7)).shape == (3, 4)


def test_strides_shorten_a_signal_and_odd_kernels_do_not():
    model = SignalNet()
    found = shapes(model, [layer for layer in model if isinstance(layer, nn.Conv1d)], 1, 64)
    assert found == [(16, 64), (32, 32), (32, 32), (64, 16), (64, 16), (64, 8), (10,)]
    with pytest.raises(ValueError, match="kernel=4, expected an odd number"):
        SignalNet(kernel=4)
