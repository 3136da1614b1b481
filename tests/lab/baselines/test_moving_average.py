"""Moving Average Batch Normalization."""

import copy

import pytest
import torch
from torch import nn

from kalmannorm.lab.baselines.moving_average import MovingAverageNorm, centralize

AXES = (0, 2, 3)


def random_layer(**options):
    layer = MovingAverageNorm(3, **options).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def plain(layer, batches, directions):
    """Each step's output and the gradients of input, weight and bias, written out."""
    weight, bias, eps = layer.weight.view(1, 3, 1, 1), layer.bias.view(1, 3, 1, 1), layer.eps
    squares, responses, running, outputs, gradients = [], [], torch.ones(1, 3, 1, 1).double(), [], []
    for step, (x, direction) in enumerate(zip(batches, directions, strict=True)):
        span = 1 if step < layer.warmup else layer.buffer_size
        squares.append((x * x).mean(AXES, keepdim=True))
        square = sum(squares[-span:]) / len(squares[-span:])
        chi = (square + eps).sqrt()
        r = (chi / (running + eps).sqrt()).clamp(1 / layer.limit, layer.limit) if step >= layer.renorm_start else 1
        z = x / chi
        outputs.append(weight * r * z + bias)
        of_z = direction * weight * r
        responses.append((of_z * z).mean(AXES, keepdim=True))
        psi = sum(responses[-span:]) / len(responses[-span:])
        of_x = (of_z - z * psi) / chi
        gradients.append((of_x, (direction * r * z).sum(AXES), direction.sum(AXES)))
        running = (1 - layer.momentum) * running + layer.momentum * square
    return outputs, gradients, running.view(1, 3)


@pytest.mark.parametrize(("warmup", "renorm_start"), [(0, 0), (2, 4), (5, 100)])
def test_many_steps(warmup, renorm_start):
    layer = random_layer(momentum=0.1, buffer_size=3, limit=1.3, warmup=warmup, renorm_start=renorm_start)
    batches = [(1 + step / 3) * torch.randn(2, 3, 4, 4).double() + 0.5 for step in range(8)]
    directions = [torch.randn(2, 3, 4, 4).double() for _ in range(8)]
    outputs, gradients, running = plain(layer, batches, directions)
    for x, direction, output, expected in zip(batches, directions, outputs, gradients, strict=True):
        y = layer(x.requires_grad_())
        assert torch.allclose(y, output)
        found = torch.autograd.grad(y, (x, layer.weight, layer.bias), direction)
        assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.allclose(layer.running_square, running)


def test_centralized_filters_have_no_mean():
    depthwise = nn.Conv2d(4, 4, 1, groups=4)
    model = centralize(nn.Sequential(nn.Conv2d(3, 4, 3), depthwise, nn.Linear(4, 2)))
    assert model[0].weight.mean((1, 2, 3)).abs().max() < 1e-7
    assert not hasattr(depthwise, "parametrizations")
    kept = model[0].parametrizations.weight.original
    assert torch.allclose(model[0].weight, kept - kept.mean((1, 2, 3), keepdim=True))


def test_ranks_and_types():
    assert MovingAverageNorm(3, affine=False)(torch.randn(4, 3)).shape == (4, 3)
    assert MovingAverageNorm(3)(torch.randn(4, 3, 2, 2).bfloat16()).dtype == torch.bfloat16


def test_errors():
    with pytest.raises(ValueError, match=r"MovingAverageNorm got an input of shape \(4, 2\), expected \(N, 3, \*\)"):
        MovingAverageNorm(3)(torch.randn(4, 2))
    with pytest.raises(ValueError, match="MovingAverageNorm got buffer_size=0"):
        MovingAverageNorm(3, buffer_size=0)


def assert_as_apart(layer, copies, x, direction):
    """Output and input gradient are as where each part of a batch goes through a layer of its own."""
    expected = torch.cat([each(part) for each, part in zip(copies, x.split(len(x) // len(copies)), strict=True)])
    y = layer(x)
    assert torch.allclose(y, expected)
    gradients = (torch.autograd.grad(each, x, direction)[0] for each in (y, expected))
    assert torch.allclose(*gradients)


def batches_of_three(steps):
    for step in range(steps):
        x = ((1 + step / 3) * torch.randn(6, 3, 4, 4).double() + 0.5).requires_grad_()
        yield x, torch.randn(6, 3, 4, 4).double()


OPTIONS = {"momentum": 0.1, "buffer_size": 3, "limit": 1.3, "warmup": 1, "renorm_start": 2}


def test_statistics_batches_are_like_devices_of_their_own():
    layer = random_layer(samples=2, **OPTIONS)
    devices = [copy.deepcopy(layer) for _ in range(3)]
    for x, direction in batches_of_three(6):
        assert_as_apart(layer, devices, x, direction)
    for name in ("squares", "responses", "running_square"):
        assert torch.allclose(getattr(layer, name), torch.cat([getattr(each, name) for each in devices], -2)), name
    x = torch.randn(2, 3, 4, 4).double()
    mean = sum(each.running_square[0] for each in devices).view(3, 1, 1) / 3
    scale = layer.weight.view(3, 1, 1) / (mean + layer.eps).sqrt()
    assert torch.allclose(layer.eval()(x), x * scale + layer.bias.view(3, 1, 1))


def test_pooled_statistics_batches_share_their_past():
    """Against a loop over groups whose buffers, after each step, hold the mean over groups."""
    layer, shared = random_layer(samples=2, pooled=True, **OPTIONS), random_layer(**OPTIONS)
    shared.load_state_dict(layer.state_dict())
    for x, direction in batches_of_three(6):
        copies = [copy.deepcopy(shared) for _ in range(3)]
        assert_as_apart(layer, copies, x, direction)
        for name, buffer in shared.named_buffers():
            buffer.copy_(torch.stack([dict(each.named_buffers())[name] for each in copies]).double().mean(0))
            assert torch.allclose(dict(layer.named_buffers())[name], buffer), name


def test_a_batch_with_fewer_statistics_batches_uses_the_first_places_and_more_begin_with_the_mean():
    layer = random_layer(samples=2, **OPTIONS)
    layer(torch.randn(4, 3, 4, 4).double())
    squares, running = layer.squares.clone(), layer.running_square.clone()
    layer(torch.randn(2, 3, 4, 4).double())
    assert not torch.equal(layer.squares[:, 0], squares[:, 0])
    assert torch.equal(layer.squares[:, 1], squares[:, 1])
    assert torch.equal(layer.running_square[1], running[1])
    past = layer.squares.clone()
    layer(torch.randn(6, 3, 4, 4).double())
    assert torch.allclose(layer.squares[:2, 2], past[:2].mean(1))


def test_a_checkpoint_brings_its_number_of_statistics_batches():
    layer, again = random_layer(samples=2, **OPTIONS), random_layer(samples=2, **OPTIONS)
    for x, direction in batches_of_three(2):
        layer(x).backward(direction)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(6, 3, 4, 4).double()
    assert torch.equal(again.eval()(x), layer.eval()(x))
    assert torch.equal(again.train()(x), layer.train()(x))
    with pytest.raises(RuntimeError, match="size mismatch for squares"):
        random_layer(samples=2, pooled=True, **OPTIONS).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("pooled", [False, True])
def test_compiled_it_is_the_same(pooled):
    layer = random_layer(samples=2, pooled=pooled, **OPTIONS)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager")
    for x, direction in batches_of_three(4):
        (expected,) = torch.autograd.grad(layer(x), x, direction)
        assert torch.allclose(torch.autograd.grad(compiled(x), x, direction)[0], expected)
    assert torch.allclose(twin.responses, layer.responses)
