"""The paper's option B."""

import copy

import pytest
import torch
from torch import nn

import kalmannorm as kn


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize("convert", [True, False])
def test_online_statistics_are_those_of_training(convert):
    model = kn.convert(small()) if convert else small()
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(x)
    model.eval()
    by_running = model(x)
    before = copy.deepcopy(model.state_dict())
    with kn.online_statistics(model):
        torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(model(x), by_running)
    torch.testing.assert_close(model(x), by_running, rtol=0, atol=0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_restored_after_an_error_and_when_nested():
    model = kn.convert(small()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)

    def fail():
        with kn.online_statistics(model):
            with kn.online_statistics(model):
                pass
            assert not torch.allclose(model(x), expected)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_statistic_groups_online():
    model = kn.convert(small(), stats_batch_size=1).eval()
    x = torch.randn(4, 3, 8, 8)
    with kn.online_statistics(model):
        together, each = model(x), torch.cat([model(part) for part in x.split(1)])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)


def test_layers_in_training_are_left_alone():
    model = small()
    with kn.online_statistics(model):
        model(torch.randn(2, 3, 8, 8))
    assert model[1].num_batches_tracked.item() == 1
    assert model[1].running_mean.any()


def test_a_model_without_statistics():
    with pytest.raises(ValueError, match="Linear has no KalmanNorm and no"), kn.online_statistics(nn.Linear(2, 2)):
        pass
