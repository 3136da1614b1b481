"""Mean and variance of a batch, against torch's var_mean."""

import pytest
import torch
from drawing import values
from hypothesis import given, settings
from hypothesis import strategies as st

from kalmannorm.kernels.moments import moments


def plain(x):
    var, mean = torch.var_mean(x, (0, *range(2, x.ndim)), correction=0)
    return mean, var


def check(x, **tolerance):
    """Values, and gradients for some gradient that comes in."""
    x = x.detach().requires_grad_()
    results = []
    for function in (moments, plain):
        outputs = function(x)
        incoming = [values(len(o), seed=i).to(o.dtype) for i, o in enumerate(outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, x, incoming)])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, **tolerance)


@given(n=st.integers(1, 7), channels=st.integers(1, 9), space=st.lists(st.integers(1, 5), max_size=3))
@settings(max_examples=40)
def test_any_shape(n, channels, space):
    check(values(n, channels, *space), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (1, 5, 1, 1), (2, 64, 33, 17), (3, 1, 7), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(shape, dtype):
    check(values(*shape).to(dtype))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(memory_format):
    check(values(4, 8, 5, 3).to(memory_format=memory_format), rtol=1e-12, atol=1e-12)


def test_channels_last_3d():
    check(values(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", [
    lambda x: x[::2], lambda x: x[:, ::2], lambda x: x[..., ::2], lambda x: x.transpose(0, 1), lambda x: x.mT,
    lambda x: x[:1].expand(4, -1, -1, -1), lambda x: x[:, :1].expand(-1, 6, -1, -1), lambda x: x.flatten(2)[..., 1:],
])  # fmt: skip
def test_not_contiguous(view):
    check(view(values(4, 6, 5, 4)), rtol=1e-12, atol=1e-12)


def test_far_from_zero():
    """A mean of a thousand standard deviations does not drown the variance, nor its gradient."""
    x = values(8, 4, 16, 16)
    exact = plain(x)[1]
    got = moments((x + 1000).float())[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=0)
    x = (x + 1000).float().requires_grad_()
    gradients = [torch.autograd.grad(f(x)[1].sum(), x)[0] for f in (moments, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 4), (2, 2, 3, 2), (1, 2, 2, 2, 2)])
def test_gradients(shape):
    x = values(*shape).requires_grad_()
    assert torch.autograd.gradcheck(moments, x)
    assert torch.autograd.gradgradcheck(moments, x)


def test_nan_shows_in_its_channel_alone():
    x = values(4, 3, 5)
    x[1, 2, 3] = torch.nan
    mean, var = moments(x)
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_over_a_batch_of_batches():
    x = values(3, 4, 5, 6)
    for got, expected in zip(torch.func.vmap(moments)(x), torch.func.vmap(plain)(x), strict=True):
        torch.testing.assert_close(got, expected)
