"""Weight Normalization."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kalmannorm.lab.baselines.weight_norm import initialize, to_weight_norm
from kalmannorm.lab.models.small import SmallConvNet


def outputs_of(model, images):
    """What each normalized layer gives."""
    seen = []
    layers = [layer for layer in model.modules() if hasattr(layer, "awaits_data")]
    handles = [layer.register_forward_hook(lambda layer, args, y: seen.append(y.detach())) for layer in layers]
    y = model(images)
    for handle in handles:
        handle.remove()
    return y, seen


def is_standard(y):
    axes = [axis for axis in range(y.ndim) if axis != 1]
    var, mean = torch.var_mean(y, axes, correction=0)
    return torch.allclose(mean, torch.zeros_like(mean), atol=1e-9) and torch.allclose(var, torch.ones_like(var))


def test_the_plain_formula():
    layer = to_weight_norm(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)))[0].double()
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    nn.init.normal_(g)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 2, 5, 5).double()
    weight = torch.stack([g[c].squeeze() * v[c] / v[c].square().sum().sqrt() for c in range(3)])
    assert torch.allclose(layer.eval()(x), F.conv2d(x, weight, layer.bias))


def test_after_the_first_batch_every_layer_is_standard():
    model = to_weight_norm(SmallConvNet()).double()
    images = torch.randn(8, 1, 32, 32).double()
    y, seen = outputs_of(model, images)
    assert len(seen) == 7
    assert all(is_standard(layer) for layer in seen)
    y.sum().backward()  # g changed before the pass that is differentiated
    _, seen = outputs_of(model, 2 * images)
    assert not all(is_standard(layer) for layer in seen)
    assert torch.allclose(model(images), y)


def test_initialize_is_that_pass_and_keeps_flags():
    model = to_weight_norm(SmallConvNet()).double()
    images = torch.randn(8, 1, 32, 32).double()
    twin = copy.deepcopy(model)
    twin(images)
    assert not initialize(model.eval(), images).training
    for ours, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    initialize(model, 3 * images)
    _, seen = outputs_of(model, 3 * images)
    assert all(is_standard(layer) for layer in seen)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (5, 4, 9)),
        (nn.Conv3d(2, 6, 1), nn.BatchNorm3d(6), (5, 2, 3, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (5, 4, 3, 3)),
        (nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1), (5, 4, 7, 7)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (9, 4)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 7, 4)),  # tokens
    ],
)
def test_kinds_of_layers(layer, norm, shape):
    model = to_weight_norm(nn.Sequential(layer, norm)).double()
    y = model(torch.randn(shape).double())
    assert is_standard(y.movedim(-1, 1) if isinstance(layer, nn.Linear) else y)


def test_a_constant_channel_keeps_its_scale():
    model = to_weight_norm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    g = model[0].parametrizations.weight.original0.detach().clone()
    assert torch.equal(model(torch.ones(2, 1, 3, 3)), torch.zeros(2, 2, 3, 3))
    assert torch.equal(model[0].parametrizations.weight.original0, g)


def test_a_checkpoint_is_not_initialized_anew():
    model = to_weight_norm(SmallConvNet())
    images = torch.randn(8, 1, 32, 32)
    model(images)
    loaded = to_weight_norm(SmallConvNet())
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(2 * images), model(2 * images))
    assert torch.equal(loaded.eval()(images), model.eval()(images))
