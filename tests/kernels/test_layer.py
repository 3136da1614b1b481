"""The layer in one step, against the plain functions it stands for. The backends have tests of their own."""

import statistics
import time

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import kalmannorm as kn
from kalmannorm import Gaussian
from kalmannorm.functional import kalman_update, normalize, observe
from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.layer import _plain, layer
from kalmannorm.kernels.link import link

OPTIONS = {
    "plain": Options(eps=1e-3),
    "no spread": Options(spread=False, eps=1e-3),
    "learned": Options(gain_slope=-1.0, gain_offset=0.2, noise_scale=0.1, eps=1e-3),
    "relu": Options(gain_slope=1.0, gain_offset=-0.3, eps=1e-3, relu=True),
}


def inputs(shape, dtype=torch.float64, groups=1):
    torch.manual_seed(0)
    channels = shape[1]
    x = (torch.randn(shape, dtype=dtype) * 2 + 1).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    mean, var = torch.randn(groups, channels, dtype=wide), torch.rand(groups, channels, dtype=wide).add(0.2)
    prior = torch.stack([mean, var]).requires_grad_()
    gain = torch.tensor([0.3], dtype=wide).requires_grad_()
    noise = torch.rand(channels, dtype=wide).requires_grad_()
    weight, bias = (torch.randn(channels, dtype=wide).requires_grad_() for _ in range(2))
    return x, prior, gain, noise, weight, bias


def plain(x, prior, gain, noise, weight, bias, options):
    q = torch.sigmoid(options.gain_slope * gain + options.gain_offset) if options.gain_slope else gain
    mean, var = prior
    prior, seen = Gaussian(mean, var * (1 + options.noise_scale * noise.exp())), observe(x, options.groups)
    posterior = kalman_update(prior, seen, q, spread=options.spread)
    y = normalize(x, posterior, weight, bias, options.eps)
    return y.relu() if options.relu else y, posterior.mean, posterior.var


def given(prior=None, gain=None, noise=None, weight=None, bias=None, shift=None, scale=None):
    """What a layer is given, the correction last."""
    return Given(prior, shift, scale, gain, noise, weight, bias)


def outputs(tensors, options, posterior=True):
    x, *rest = tensors
    out = layer(x, given(*rest), options, posterior=posterior)
    return out.output, *out.belief.flatten(2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 3, 5, 7), (1, 3, 2, 3, 2), (1, 2, 1, 1)])
def test_equals_the_plain_functions(shape, options):
    tensors = inputs(shape)
    ours, theirs = outputs(tensors, options), plain(*tensors, options)
    upstream = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(results, tensors, upstream) for results in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("posterior", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_and_gradgradcheck(options, groups, posterior):
    options = options._replace(groups=groups)

    def run(*tensors):
        return outputs(tensors, options, posterior)

    tensors = inputs((2, 2, 2, 2), groups=groups)
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_plain_expression_moves_the_same_averages(groups):
    """That of torch.func and of a compiler, beside the backends'."""
    x, *rest = inputs((4, 3, 5), torch.float32)
    running = [
        Running(torch.zeros(3), torch.ones(3), torch.tensor(4), torch.tensor(0), 0.3) for _ in range(2)
    ]  # fmt: skip
    options = Options(groups, gain_slope=-1.0, noise_scale=0.1)
    ours = layer(x, given(*rest), options, running=running[0])
    theirs = _plain(x, given(*rest), False, options, running[1])
    torch.testing.assert_close(ours.statistics, theirs.statistics)
    for a, b in zip(*running, strict=True):
        torch.testing.assert_close(a, b)
    assert running[0].batches == 5


def test_statistics_are_returned_without_a_gradient():
    x, *rest = inputs((3, 4, 5))
    out = layer(x, given(*rest), Options())
    seen = observe(x)
    torch.testing.assert_close(out.statistics[4], seen.mean.detach())
    torch.testing.assert_close(out.statistics[5], seen.var.detach())
    assert not out.statistics.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype):
    x, *rest = inputs((4, 3, 8, 8), dtype)
    out = layer(x, given(*rest), Options(eps=1e-3), posterior=True)
    assert (out.output.dtype, out.belief.dtype) == (dtype, torch.float32)
    wide = [t.detach().double() for t in (x, *rest)]
    exact = layer(wide[0], given(*wide[1:]), Options(eps=1e-3), posterior=True)
    torch.testing.assert_close(out.output.double(), exact.output, rtol=0.02, atol=0.02)
    torch.testing.assert_close(out.belief.double(), exact.belief, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out.output, x, torch.randn_like(out.output))
    assert dx.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
def test_memory_format_is_kept(dtype, groups):
    x, *rest = inputs((2, 8, 4, 4), dtype)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x, given(*rest), Options(groups)).output
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", [False, True])
def test_any_strides_will_do(compiled):
    x, *rest = inputs((2, 8, 4, 6), torch.float32)

    def output(*args):
        return layer(*args).output

    run = torch.compile(output, fullgraph=True, backend="aot_eager") if compiled else output
    expected = output(x, given(*rest), Options())
    transposed = x.detach().mT.contiguous().mT
    part = torch.cat([x.detach(), torch.randn_like(x)], 1)[:, :8]
    for strided in (transposed, part):
        assert not strided.is_contiguous()
        torch.testing.assert_close(run(strided, given(*rest), Options()), expected)


def strided(t):
    """The same numbers, every second of a longer vector."""
    return torch.stack([t, 1e6 * torch.ones_like(t)], 1).flatten()[::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_vectors_may_have_strides(dtype):
    """A kernel that took them for dense would read, and with running statistics write, what lies between."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5, 5, dtype=dtype)
    mean, var, weight, bias, noise = (torch.rand(8, dtype=dtype) + 0.5 for _ in range(5))
    options = Options(gain_offset=0.3)
    results = []
    for form in (lambda t: t, strided):
        buffer = form(torch.zeros(8, dtype=dtype)), form(torch.ones(8, dtype=dtype))
        running = Running(*buffer, torch.tensor(0), torch.tensor(0), 0.1)
        inputs = [form(t) for t in (noise, weight, bias)]
        prior = torch.stack([form(mean)[None], form(var)[None]], -1).movedim(-1, 0)
        out = layer(x, given(prior, None, *inputs), options, running=running)
        results.append((*out[:3], running.mean, running.var))
    torch.testing.assert_close(*results)
    wide = torch.tensor([2.0], dtype=dtype).expand(8)
    flat = layer(x, given(weight=wide), options).output
    torch.testing.assert_close(flat, layer(x, given(weight=wide.clone()), options).output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.ones(4)}),
        ("bias", {"bias": torch.ones(4)}),
        ("process_noise", {"noise": torch.ones(1)}),
        ("prior_shift", {"shift": torch.ones(4)}),
        ("prior_scale", {"scale": torch.ones(4)}),
        ("a prior", {"prior": torch.ones(2, 1)}),
        ("a prior", {"prior": torch.ones(1, 1, 8, 2)}),
        ("a prior", {"prior": torch.ones(2, 1, 8, 2)}),
        ("a prior", {"prior": torch.ones(2, 1, 4)}),
        ("a prior", {"prior": torch.ones(2, 2, 8)}),
        ("running_mean", {"running": Running(*torch.zeros(2, 4), torch.tensor(0), torch.tensor(0), 0.1)}),
        ("running_var", {"running": Running(torch.zeros(8), torch.ones(4), torch.tensor(0), torch.tensor(0), 0.1)}),
        ("a batch of 4", {"options": Options(groups=3, gain_offset=0.3)}),
    ],
)
def test_what_has_another_size_is_refused(name, change, dtype):
    vectors = {"prior": torch.ones(2, 1, 8), "noise": torch.ones(8), "weight": torch.ones(8), "bias": torch.ones(8)}
    vectors |= {key: value for key, value in change.items() if key in Given._fields}
    vectors = {key: None if t is None else t.to(dtype) for key, t in vectors.items()}
    others = {"options": Options(gain_offset=0.3)} | {k: v for k, v in change.items() if k not in Given._fields}
    with pytest.raises(ValueError, match=f"got {name}.*expected"):
        layer(torch.randn(4, 8, 5, 5, dtype=dtype), Given(**vectors), **others)


def test_a_link_of_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"of as many channels as the weight of shape \(3, 8, 1, 1\) has"):
        link(torch.ones(2, 1, 4, 1, 1), torch.ones(3, 8, 1, 1))


@pytest.mark.parametrize("norms", [1, 2])
def test_create_graph_changes_no_gradient(norms):
    """A layer's input was computed from its link's filter, and a shared layer's from its own gain."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    parts = [m for _ in range(norms) for m in (nn.Conv2d(4, 4, 2), norm, nn.ReLU())]
    model = kn.convert(nn.Sequential(*parts), input_stats=([0.0] * 4, [1.0] * 4))
    loss = (model(torch.randn(3, 4, 6, 6)) ** 3).mean()
    parameters = list(model.parameters())
    plain = torch.autograd.grad(loss, parameters, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters, create_graph=True), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradgradcheck_of_a_network():
    torch.manual_seed(0)
    model = kn.convert(
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Softplus(), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)),
        input_stats=([0.0] * 2, [1.0] * 2), track_running_stats=False, stats_batch_size=3,
    ).double()  # fmt: skip
    names, values = zip(*[(n, p.detach().clone().requires_grad_()) for n, p in model.named_parameters()], strict=True)
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)

    def run(*given):
        with nn.utils.stateless._reparametrize_module(model, dict(zip(names, given, strict=True))):
            return model(x)

    assert gradgradcheck(run, values)


def test_channels_last_in_threads_takes_no_new_threads():
    """To make them takes a hundred times as long as to use those that wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, *rest = inputs((2, 64, 32, 32), torch.float32)
        taken = []
        for layout in (torch.contiguous_format, torch.channels_last):
            each = x.detach().to(memory_format=layout)
            times = []
            for _ in range(30):
                torch.ones(10**6).exp()  # other threads of torch's then wait
                start = time.perf_counter()
                layer(each, given(*rest), Options())
                times.append(time.perf_counter() - start)
            taken.append(statistics.median(times))
    finally:
        torch.set_num_threads(before)
    assert taken[1] < 20 * taken[0]
