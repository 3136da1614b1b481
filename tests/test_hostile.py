"""Whatever comes in: no crash without a name, nothing that is not finite from what is."""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import kalmannorm as kn
from kalmannorm.functional import kalman_norm

# Shapes of one value a channel are among those that come up.
pytestmark = pytest.mark.filterwarnings("ignore:.*got one value a channel")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# As far as each type goes; the square of float32's is still a number in float32.
LARGEST = {torch.float64: 1e100, torch.float32: 1e18, torch.bfloat16: 1e4, torch.float16: 1e4}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}

options = st.fixed_dictionaries(
    {},
    optional={
        "gain": st.sampled_from(["learned", "prior-strength", 0.05, 0.7, 1.0]),
        "spread": st.booleans(),
        "carry": st.sampled_from(["output", "posterior"]),
        "process_noise": st.booleans(),
        "estimator": st.sampled_from(["exact", "monte_carlo"]),
        "stats_batch_size": st.sampled_from([1, 2]),
        "guard": st.just(100.0),
    },
)
norm_options = st.fixed_dictionaries(
    {},
    optional={
        "affine": st.just(False),
        "track_running_stats": st.just(False),
        "momentum": st.none(),
        "eps": st.sampled_from([1e-3, 1e-8]),
    },
)
shapes = st.integers(2, 5).flatmap(
    lambda rank: st.tuples(st.integers(0, 4), st.integers(1, 7), *[st.integers(1, 5 if rank < 5 else 3)] * (rank - 2))
)
kinds = st.sampled_from(["noise", "constant", "zero", "one", "offset", "tiny", "dead channel"])
layouts = st.sampled_from(["contiguous", "channels last", "sliced", "transposed", "expanded"])


def draw_input(shape, dtype, kind, magnitude):
    """Values of a kind, the largest about as large as ``magnitude``."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "constant":
        x = torch.ones(shape, dtype=torch.float64)
    elif kind == "zero":
        x = torch.zeros(shape, dtype=torch.float64)
    elif kind == "one":
        x = torch.zeros(shape, dtype=torch.float64)
        x.view(-1)[:1] = 1.0
    elif kind == "offset":
        x = 1 + 1e-3 * x
    elif kind == "tiny":
        x = x * 1e-30
    elif kind == "dead channel":
        x[:, 0] = 0.5
    return (x.clamp(-1, 1) * magnitude).to(dtype)


def lay_out(x, layout):
    """The same values, elsewhere in memory."""
    if layout == "channels last" and x.ndim > 3:
        return x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and x.ndim > 2:
        return x[..., :1].expand_as(x)
    return x


def network(rank, channels, norm, kalman=None, between=True):
    """Two normalization layers, a filter and a ReLU between them where that is wanted."""
    torch.manual_seed(0)
    filter_ = nn.Linear(channels, channels) if rank == 2 else CONVOLUTIONS[rank](channels, channels, 1)
    middle = [nn.ReLU(), filter_] if between else [nn.ReLU()]
    model = nn.Sequential(NORMS[rank](channels, **norm), *middle, NORMS[rank](channels, **norm))
    return model if kalman is None else kn.convert(model, **kalman)


def results(model, x, upstream):
    """The output, the gradients of input and parameters, and the buffers after a step, by name."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(upstream)
    found = {"output": y.detach(), "input's gradient": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers())


def not_finite(found):
    return [name for name, tensor in found.items() if not tensor.isfinite().all()]


@settings(max_examples=150)
@given(
    shape=shapes, dtype=st.sampled_from(DTYPES), layout=layouts, kalman=options, norm=norm_options,
    between=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_type_and_layout(shape, dtype, layout, kalman, norm, between, seed):
    """It gives what the same values give when they are contiguous, or an error that names the layer."""
    torch.manual_seed(seed)
    x = lay_out(torch.randn(shape, dtype=dtype), layout)
    model = network(len(shape), shape[1], norm, kalman, between).to(dtype)
    size = kalman.get("stats_batch_size", 1)
    if shape[0] % size:
        with pytest.raises(ValueError, match=rf"KalmanNorm\dd '0' got a batch of {shape[0]}, expected a multiple of"):
            model(x)
        return
    upstream = torch.randn(shape, dtype=dtype)
    # A channel of one value is normalized to the kink of the ReLU, where rounding decides on the gradient.
    varies = x.numel() > 0 and bool((x.transpose(0, 1).flatten(1).double().var(1, correction=0) > 1e-4).all())
    # In eval() it is BatchNorm, which divides float16 by a variance of nothing and overflows.
    for training in (True, False) if dtype != torch.float16 else (True,):
        twin = copy.deepcopy(model.train(training)).train(training)
        torch.manual_seed(seed)
        found = results(model, x, upstream)
        torch.manual_seed(seed)
        expected = results(twin, x.contiguous(), upstream)
        assert found["output"].shape == x.shape
        assert found["output"].dtype == dtype
        assert not not_finite(found)
        assert found.keys() == expected.keys()
        near = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1)
        # Gradients that are sums to zero have the rounding of what they are summed from.
        scale = 1 + max(t.abs().max().item() for t in expected.values()) if varies else math.inf
        for name, tensor in found.items():
            difference = (tensor.double() - expected[name].double()).abs().max().item() if varies else 0.0
            assert difference < near * scale, name


@settings(max_examples=200)
@given(
    shape=shapes.filter(lambda shape: shape[0] > 0), dtype=st.sampled_from(DTYPES), kind=kinds,
    share=st.sampled_from([1.0, 1e-3, 1e-9]), kalman=options, norm=norm_options, training=st.booleans(),
    between=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_finite_input_gives_finite_results(shape, dtype, kind, share, kalman, norm, training, between, seed):
    """Output, running statistics and gradients. In float16, those of a loss as a scaler would scale it."""
    size = kalman.get("stats_batch_size", 1)
    assume(shape[0] % size == 0)
    # Without the spread, as Eq. 7 is printed, an output may be as large as the prior is wrong.
    assume(kalman.get("spread", True) or share == 1e-9)
    torch.manual_seed(seed)
    x = draw_input(shape, dtype, kind, LARGEST[dtype] * share)
    upstream = torch.randn(shape, dtype=dtype) * (1e-4 if dtype == torch.float16 else 1)
    model = network(len(shape), shape[1], norm, kalman, between).to(dtype).train(training)
    assert not not_finite(results(model, x, upstream))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kalman", [{}, {"stats_batch_size": 2}, {"carry": "posterior"}], ids=str)
def test_a_constant_channel_has_no_more_gradient_than_its_normalization_gives(dtype, kalman):
    """What is believed of a standard deviation has an infinite slope at zero, times a deviation of zero."""
    model = network(4, 3, {}, kalman).to(dtype)
    x = torch.full((4, 3, 5, 5), 0.1, dtype=dtype)
    upstream = torch.randn(x.shape, dtype=dtype) * 0.01
    found = results(model, x, upstream)
    # Each layer multiplies a gradient by at most 1 / sqrt(eps).
    bound = (1e-5**-0.5) ** 2 * upstream.norm()
    assert found["input's gradient"].norm() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_in_half_precision_are_summed_in_float32(dtype, groups):
    """Their terms cancel, while each alone is a hundred times as large, or infinite."""
    x, weight = (4 + torch.randn(4, 3, 5, 5)).to(dtype), torch.full((3,), 50.0)
    upstream = torch.randn(x.shape).to(dtype) + 2000
    gradients = []
    for wide in (False, True):
        leaf = (x.double() if wide else x).requires_grad_()
        y = kalman_norm(leaf, None, weight.double() if wide else weight, groups=groups).output
        gradients.append(torch.autograd.grad(y, leaf, upstream.to(y.dtype))[0].double())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


@pytest.mark.parametrize("variance", [0.0, 1e-5, 1e-30])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_nothing_divides_by_a_running_variance(variance, eps):
    """A pretrained network brings dead channels, of variance 0, and nearly dead ones: all that it can be put through
    stays finite.
    """
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=eps), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, eps=eps),
        nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, eps=eps),
    )  # fmt: skip
    loader = [torch.randn(2, 3, 12, 12) for _ in range(4)]
    for x in loader:
        stock(x)
    with torch.no_grad():
        for norm in (stock[1], stock[4], stock[7]):
            norm.running_var[:2] = variance
            norm.num_batches_tracked += 1000
        stock[0].weight[0] = stock[0].bias[0] = 0  # and its input is as dead as its statistics say
    expected = stock.eval()(loader[0])
    model = kn.convert(stock, input_stats=([0.0] * 3, [1.0] * 3))
    torch.testing.assert_close(model(loader[0]), expected)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for x in loader:
        optimizer.zero_grad()
        model(x[:1]).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    for found in (
        kn.calibrate(model, loader, progress=False), kn.calibrate(model, loader, source="data", progress=False)
    ):  # fmt: skip
        assert all(math.isfinite(row.variance) for row in found.rows)
    assert all(math.isfinite(row.correction) for row in kn.describe(model, loader[0]).rows)
    kn.diagnose(model, loader, progress=False)
    with kn.online_statistics(model.eval()):
        assert model(loader[0]).isfinite().all()
    kn.recalibrate(model, loader, progress=False)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert kn.fuse(model)(loader[0]).isfinite().all()
    assert kn.to_batchnorm(model)(loader[0]).isfinite().all()
