"""Cross-Iteration Batch Normalization."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kalmannorm.lab.baselines.cross_iteration import CrossIterationNorm, to_cross_iteration
from kalmannorm.lab.baselines.replacing import count_in_steps
from kalmannorm.lab.models.small import SmallConvNet


def network(bias=False, **options):
    conv = nn.Conv2d(2, 4, 3, 2, 1, bias=bias)
    model = to_cross_iteration(nn.Sequential(conv, nn.BatchNorm2d(4)), **options).double()
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    return model


def shake(model, size=0.1):
    """As an optimizer's step does."""
    with torch.no_grad():
        model[0].weight += size * torch.randn_like(model[0].weight)


def moments(images, filters, shifts):
    """Of one batch: a channel's mean and second moment, and their derivatives by its own filter, pixel by pixel."""
    patches = F.unfold(images, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, filters[0].numel())
    mean, square, mean_slope, square_slope = [], [], [], []
    for theta, shift in zip(filters.flatten(1), shifts, strict=True):
        x = patches @ theta + shift
        mean.append(x.mean())
        square.append((x * x).mean())
        mean_slope.append(patches.mean(0))
        square_slope.append((2 * x[:, None] * patches).mean(0))
    return [torch.stack(each) for each in (mean, square, mean_slope, square_slope)]


def plain(model, history, images, window):
    """The paper's equations for the newest of `history`, pairs of images and filters: the output, mean and variance."""
    now, shifts = history[-1][1].flatten(1), torch.zeros(4) if model[0].bias is None else model[0].bias
    means, squares = [], []
    for past_images, past_filters in history[-window:]:
        mean, square, mean_slope, square_slope = moments(past_images, past_filters, shifts)
        change = now - past_filters.flatten(1)
        means.append(mean + (mean_slope * change).sum(1))
        squares.append(torch.maximum(square + (square_slope * change).sum(1), means[-1] ** 2))
    mean, square = sum(means) / len(means), sum(squares) / len(squares)
    std = (square - mean**2 + model[1].eps).sqrt().view(4, 1, 1)
    y = (F.conv2d(images, history[-1][1], model[0].bias, 2, 1) - mean.view(4, 1, 1)) / std
    return y * model[1].weight.view(4, 1, 1) + model[1].bias.view(4, 1, 1), mean, square - mean**2


@pytest.mark.parametrize(
    ("size", "bias", "trained"),
    [
        (0.02, False, True),
        (1.0, False, True),  # some second moments fall below the squared mean
        (0.02, True, True),
        (0.0, False, False),  # frozen filters
    ],
)
def test_the_papers_equations(size, bias, trained):
    model, history = network(bias, window=3), []
    model[0].requires_grad_(trained)
    model[1].momentum = 1.0  # the running statistics are the newest
    for step in range(1, 7):
        images = (torch.randn(2, 2, 7, 7).double() + 1).requires_grad_()
        history.append((images, model[0].weight.detach().clone()))
        expected, mean, var = plain(model, history, images, 3)
        assert torch.allclose(model(images), expected)
        assert torch.allclose(model[1].running_mean, mean)
        pixels = min(step, 3) * 2 * 4 * 4
        assert torch.allclose(model[1].running_var, var * pixels / (pixels - 1))
        shake(model, size)


def test_a_window_of_one_is_batchnorm():
    model = network(window=1)
    stock = copy.deepcopy(nn.Sequential(model[0], nn.BatchNorm2d(4).double()))
    stock[1].load_state_dict(model[1].state_dict())
    for _ in range(3):
        images = torch.randn(2, 2, 7, 7).double().requires_grad_()
        y, expected = model(images), stock(images)
        assert torch.allclose(y, expected)
        direction = torch.randn_like(y)
        gradient, wanted = (torch.autograd.grad(each, images, direction)[0] for each in (y, expected))
        assert torch.allclose(gradient, wanted)
    for name, value in model[1].state_dict().items():
        assert torch.allclose(value, stock[1].state_dict()[name])
    assert torch.allclose(model.eval()(images), stock.eval()(images))


def test_burn_in_is_batchnorm():
    model = network(window=3, burn_in=2)
    for step in range(4):
        images = torch.randn(2, 2, 7, 7).double()
        stock = F.batch_norm(model[0](images), None, None, model[1].weight, model[1].bias, training=True)
        assert torch.allclose(model(images), stock) == (step < 2)


def test_each_pass_of_a_step_has_the_window_of_its_place():
    """As on a device of its own, which sees one batch a step."""
    passes = 3
    model = network(window=2, burn_in=1)
    devices = [copy.deepcopy(model) for _ in range(passes)]
    count_in_steps(model, passes)
    for _ in range(4):
        for device in devices:
            device[0].load_state_dict(model[0].state_dict())
            images = torch.randn(2, 2, 7, 7).double() + 1
            assert torch.allclose(model(images), device(images))
        shake(model)
    assert len(model[1]._past) == passes


@pytest.mark.parametrize("calls", [1, 3])
def test_gradcheck(calls):
    model = network(window=3)
    for _ in range(calls - 1):
        model(torch.randn(2, 2, 4, 4).double())
        shake(model)
    images = torch.randn(2, 2, 4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(model)(x), images)  # noqa: PLW0108 - fresh each time


def test_where_nothing_stands_below_it_is_batchnorm():
    layer, x = CrossIterationNorm(3), torch.randn(2, 3, 4, 4)
    layer(torch.randn(2, 3, 4, 4))
    assert torch.allclose(layer(x), F.batch_norm(x, None, None, training=True), atol=1e-6)
    model = network()
    with torch.no_grad():
        model(torch.randn(2, 2, 7, 7).double())
    assert not model[1]._past


def test_state_dict_is_batchnorms_and_the_window_fills_again():
    model, again = network(window=2, burn_in=1), network(window=2, burn_in=1)
    for _ in range(2):
        model(torch.randn(2, 2, 7, 7).double())
    again.load_state_dict(model.state_dict())
    nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)).load_state_dict(model.state_dict())
    images = torch.randn(2, 2, 7, 7).double()
    assert torch.equal(again.eval()(images), model.eval()(images))
    model[1]._past.clear()
    assert torch.equal(again.train()(images), model.train()(images))
    assert len(model.float()[1]._past) == 0


def test_whole_network_and_half_precision():
    model = to_cross_iteration(SmallConvNet())
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(4, 1, 32, 32)).sum().backward()
    assert all(len(norm._past) == 2 for norm in model.norms)


def test_errors():
    with pytest.raises(ValueError, match=r"CrossIterationNorm got an input of shape \(4, 2\), expected \(N, 3, \*\)"):
        CrossIterationNorm(3)(torch.randn(4, 2))
    with pytest.raises(ValueError, match="CrossIterationNorm got window=0"):
        CrossIterationNorm(3, window=0)
