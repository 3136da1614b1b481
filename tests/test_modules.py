"""The layers, against torch's own."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from networks import prior_of
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import module_db

import kalmannorm as kn
from kalmannorm.steps import step_of

STOCK = {
    nn.BatchNorm1d: kn.KalmanNorm1d,
    nn.BatchNorm2d: kn.KalmanNorm2d,
    nn.BatchNorm3d: kn.KalmanNorm3d,
    nn.GroupNorm: kn.GroupKalmanNorm,
}
BY_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def close(ours, stock, dtype):
    torch.testing.assert_close(ours, stock, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def compare_with_stock(ours, stock, x):
    """Outputs, gradients and buffers of one call."""
    inputs = [x.detach().clone().requires_grad_() for _ in range(2)]
    outputs = [layer(i) for layer, i in zip((ours, stock), inputs, strict=True)]
    close(*outputs, x.dtype)
    upstream = torch.randn_like(outputs[0])
    for layer, output in zip((ours, stock), outputs, strict=True):
        layer.zero_grad()
        output.backward(upstream)
    close(inputs[0].grad, inputs[1].grad, x.dtype)
    for name, parameter in stock.named_parameters():
        # A sum over the batch: relative to the number of its terms.
        scale = max(1.0, upstream.numel() / upstream.shape[1]) ** 0.5
        close(ours.get_parameter(name).grad / scale, parameter.grad / scale, x.dtype)
    for name, buffer in stock.named_buffers():
        close(ours.get_buffer(name), buffer, buffer.dtype if buffer.is_floating_point() else x.dtype)


def randomize(*layers):
    for name, parameter in layers[0].named_parameters():
        with torch.no_grad():
            parameter.uniform_(0.5, 1.5)
            for other in layers[1:]:
                other.get_parameter(name).copy_(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (2, 6, 3, 4, 5), (1, 6, 7)])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-3, "momentum": 0.3}],
    ids=str,
)
def test_gain_1_is_batch_norm(shape, dtype, options):
    torch.manual_seed(0)
    stock = BY_RANK[len(shape)](6, dtype=dtype, **options)
    ours = STOCK[type(stock)](6, gain=1.0, dtype=dtype, **options)
    randomize(stock, ours)
    for training in (True, True, False):
        stock.train(training)
        ours.train(training)
        compare_with_stock(ours, stock, torch.randn(shape, dtype=dtype) * 2 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (2, 6, 3, 4, 5)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_gain_1_is_group_norm(shape, dtype, groups, affine):
    if math.prod(shape[1:]) == groups:
        pytest.skip("one value a group")
    torch.manual_seed(0)
    stock = nn.GroupNorm(groups, 6, affine=affine, dtype=dtype)
    ours = kn.GroupKalmanNorm(groups, 6, affine=affine, gain=1.0, dtype=dtype)
    randomize(stock, ours)
    for training in (True, False):
        stock.train(training)
        ours.train(training)
        compare_with_stock(ours, stock, torch.randn(shape, dtype=dtype) * 2 + 1)


def test_gain_1_in_a_network_ignores_the_priors():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    ours = kn.convert(copy.deepcopy(stock), gain=1.0).double()
    # In double, as the gradient of a bias before a norm is nothing but rounding.
    compare_with_stock(ours, stock.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))


# -- PyTorch's own module tests ----------------------------------------------------------------------

OWN = [info for info in module_db if info.module_cls in STOCK]


def own_samples(info, dtype=torch.float64, requires_grad=False, training=True):
    samples = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    )
    for sample in samples:
        make, call = sample.constructor_input, sample.forward_input
        x = call.args[0]
        if x.numel() == 0 or (x.ndim == 2 and x.shape[0] == 1 and training):
            continue
        yield make.args, make.kwargs, x


def test_the_database_has_samples_for_every_stock_class():
    assert {info.module_cls for info in OWN} == set(STOCK)
    assert all(len(list(own_samples(info))) >= 3 for info in OWN)


@pytest.mark.parametrize("info", OWN, ids=lambda info: info.module_cls.__name__)
@pytest.mark.parametrize("training", [True, False])
class TestPyTorchsOwn:
    def test_forward(self, info, training):
        for args, kwargs, x in own_samples(info, training=training):
            stock = info.module_cls(*args, **kwargs).double().train(training)
            ours = STOCK[info.module_cls](*args, **kwargs, gain=1.0).double().train(training)
            compare_with_stock(ours, stock, x)

    def test_grad_and_gradgrad(self, info, training):
        for args, kwargs, x in own_samples(info, requires_grad=True, training=training):
            ours = STOCK[info.module_cls](*args, **kwargs).double().train(training)
            x = x.detach()[(slice(2), slice(None), *[slice(2)] * (x.ndim - 2))].clone().requires_grad_()
            quiet = _silent(ours)
            assert gradcheck(quiet, (x,), check_undefined_grad=False)
            assert gradgradcheck(quiet, (x,), atol=1e-4)

    def test_pickle_and_deepcopy(self, info, training):
        for args, kwargs, x in own_samples(info, training=training):
            ours = _silent(STOCK[info.module_cls](*args, **kwargs).double().train(training))
            for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
                assert clone.state_dict().keys() == ours.state_dict().keys()
                torch.testing.assert_close(copy.deepcopy(clone)(x), clone(x))

    def test_device_and_dtype_of_constructor(self, info, training):
        for args, kwargs, _ in own_samples(info, training=training):
            meta = STOCK[info.module_cls](*args, **kwargs, device="meta", dtype=torch.float64)
            assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
            assert all(b.is_meta for b in meta.buffers())

    def test_non_contiguous_input(self, info, training):
        for args, kwargs, x in own_samples(info, training=training):
            layer = _silent(STOCK[info.module_cls](*args, **kwargs).double().train(training))
            strided = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x)
            assert not strided.is_contiguous() or x.numel() <= 1
            torch.testing.assert_close(copy.deepcopy(layer)(strided), copy.deepcopy(layer)(x))

    def test_factory_repr_shows_the_options(self, info, training):
        for args, kwargs, _ in own_samples(info, training=training):
            text = str(STOCK[info.module_cls](*args, **kwargs))  # what print() shows
            assert "gain='prior-strength'" in text
            assert "carry='output'" in text


def _silent(layer):
    """A lone layer warns that nothing is connected, and of one value a channel; here both are meant."""
    layer._warn_once = _say_nothing
    return layer


def _say_nothing(message):
    pass


# -- the filter in a network -------------------------------------------------------------------------


def three_layers(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(),
        nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3),
    )  # fmt: skip
    return kn.convert(model, **options).double()


@pytest.mark.parametrize(
    "options",
    [{}, {"gain": "learned", "carry": "posterior"}, {"gain": 0.3, "spread": False}, {"stats_batch_size": 1}],
    ids=str,
)
def test_gradcheck_through_three_layers(options):
    model = three_layers(**options)
    names = [n for n, _ in model.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        state = {**dict(zip(names, parameters, strict=True)), **{n: b.clone() for n, b in buffers.items()}}
        return torch.func.functional_call(model, state, (x,))

    assert gradcheck(run, (x, *parameters))
    # The filter's own parameters matter, where there is a prior.
    gradients = dict(zip(names, torch.autograd.grad(run(x, *parameters).pow(3).sum(), parameters), strict=True))
    for name, gradient in gradients.items():
        if name.endswith(("gain", "process_noise")):
            assert (gradient.abs().sum() > 0) == (not name.startswith("1.")), name




def test_paper_preset_is_equation_7():
    """Two layers of one channel with a 1x1 filter between: every number by hand."""
    options = {**kn.preset("paper"), "estimator": "exact"}
    model = kn.connect(nn.Sequential(kn.KalmanNorm2d(1, **options), nn.Conv2d(1, 1, 1), kn.KalmanNorm2d(1, **options)))
    conv, second = model[1:]
    with torch.no_grad():
        conv.weight.fill_(3.0)
        conv.bias.fill_(1.0)
        second.gain.fill_(math.log(0.25 / 0.75) - math.log(0.1 / 0.9))  # q = 0.25
        second.process_noise.fill_(math.log(0.5 / 0.01))  # R is half of what is predicted
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2)  # mean 3, variance 3.5
    seen = {}
    second.register_forward_hook(lambda layer, args, y: seen.update(x=args[0], y=y))
    model(x)
    z = seen["x"]
    # Eq. 7: the posterior of layer 1 is (3, 3.5), without its own normalization; A = 3, bias 1.
    mean = 0.75 * (3 * 3 + 1) + 0.25 * z.mean()
    var = 0.75 * (9 * 3.5 * (1 + 0.5)) + 0.25 * z.var(correction=0)
    torch.testing.assert_close(seen["y"], (z - mean) / (var + 1e-5).sqrt())


def test_released_preset_is_the_released_code():
    """Draws of one feature map a group, through ReLU and the padded filter; the mixture's variance; the guard."""
    options = {**kn.preset("released"), "stats_batch_size": 2}
    assert (options["gain"], options["guard"], options["process_noise"]) == (0.1, 100.0, False)
    model = kn.connect(
        nn.Sequential(
            kn.KalmanNorm2d(2, **options), nn.ReLU(), nn.Conv2d(2, 3, 3, padding=1), kn.KalmanNorm2d(3, **options)
        )
    )
    x = torch.randn(4, 2, 5, 5)
    seen = {}
    model[3].register_forward_hook(lambda layer, args, y: seen.update(x=args[0], y=y))
    torch.manual_seed(7)
    model(x)
    # The same by hand: group g's first layer has no prior, so its posterior is what it saw.
    groups = x.view(2, 2, 2, 25)
    var, mean = torch.var_mean(groups, (1, 3), correction=0)
    torch.manual_seed(7)
    draws = mean[:, :, None, None] + var.sqrt()[:, :, None, None] * torch.randn(2, 2, 5, 5)
    after = model[2](draws.relu()).flatten(2)
    prior_var, prior_mean = torch.var_mean(after, 2, correction=0)
    z = seen["x"].view(2, 2, 3, 25)
    z_var, z_mean = torch.var_mean(z, (1, 3), correction=0)
    m = 0.9 * prior_mean + 0.1 * z_mean
    v = 0.9 * prior_var + 0.1 * z_var + 0.09 * (z_mean - prior_mean) ** 2
    assert ((prior_var / z_var).mean(1) < 100).all()
    y = (z - m[:, None, :, None]) / (v + 1e-5).sqrt()[:, None, :, None]
    torch.testing.assert_close(seen["y"], y.view(4, 3, 5, 5), rtol=1e-4, atol=1e-5)


def test_output_belief_is_that_of_what_leaves_the_layer():
    """With gain near one, the second layer's prior is the first one's (beta, gamma^2)."""
    first, second = kn.KalmanNorm1d(3, eps=0.5), kn.KalmanNorm1d(3, gain=1e-9, process_noise=False, spread=False)
    model = kn.connect(nn.Sequential(first, nn.Identity(), second)).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        first.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    x = torch.randn(8, 3, dtype=torch.float64)
    y = _silent(first)(x.clone())
    variance = x.var(0, correction=0)
    expected = (y - first.bias) / (first.weight.square() * variance / (variance + 0.5) + 1e-5).sqrt()
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("carry", ["output", "posterior"])
def test_statistic_groups_equal_separate_batches(carry):
    model, plain = (three_layers(carry=carry, **options) for options in ({"stats_batch_size": 2}, {}))
    for layer in (*model.modules(), *plain.modules()):
        if isinstance(layer, kn.KalmanNorm):
            layer.eps = 1e-12  # groups share the average of v / (v + eps)
    x = torch.randn(6, 2, 7, 7, dtype=torch.float64)
    upstream = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    y = model(x)
    y.backward(upstream)
    parts = [plain(part) for part in x.split(2)]
    torch.cat(parts).backward(upstream)
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_groups_hand_on_one_belief_with_the_average_factor():
    model, seen = three_layers(stats_batch_size=2), []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(step_of(args[0]).belief))
    layer, x = model[1], torch.randn(6, 2, 7, 7, dtype=torch.float64)
    layer.eps = 0.5
    posteriors = []
    layer.collect = lambda posterior, _: posteriors.append(posterior)
    model(x)
    factor = (posteriors[0].var / (posteriors[0].var + 0.5)).mean(0)
    assert seen[0].mean.shape == (1, layer.num_features, 1, 1)
    torch.testing.assert_close(seen[0].mean.flatten(), layer.bias)
    torch.testing.assert_close(seen[0].var.flatten(), layer.weight.square() * factor)


@torch.no_grad()
def test_in_eval_no_group_depends_on_another():
    """As two rows may have nearly one value, whose variance is below eps."""
    torch.manual_seed(0)
    parts = [m for _ in range(3) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
    model = kn.convert(nn.Sequential(*parts), stats_batch_size=2)
    x = torch.randn(8, 4)
    x[1] = x[0] + 1e-4
    model(x)
    with kn.online_statistics(model.eval()):
        torch.testing.assert_close(model(x), torch.cat([model(pair) for pair in x.split(2)]), rtol=1e-5, atol=1e-6)


def test_a_batch_that_does_not_divide_says_so():
    model = three_layers(stats_batch_size=4).float()
    expected = r"KalmanNorm2d '1' got a batch of 6, expected a multiple of stats_batch_size=4"
    with pytest.raises(ValueError, match=expected):
        model(torch.randn(6, 2, 7, 7))


def test_prior_strength_follows_the_batch():
    layer = kn.KalmanNorm2d(4)
    assert layer.kalman_gain(2).item() == pytest.approx(0.1)
    assert layer.kalman_gain(18).item() == pytest.approx(0.5)
    with torch.no_grad():
        layer.gain.fill_(math.log(2))  # a prior worth twice as much
    assert layer.kalman_gain(36).item() == pytest.approx(0.5)
    assert kn.KalmanNorm2d(4, gain=0.3).kalman_gain(5) == 0.3
    assert kn.KalmanNorm2d(4, gain="learned").kalman_gain(5).item() == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:.*got one value a channel")
def test_one_sample_of_one_pixel_trains():
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stock(torch.randn(1, 3, 1, 1))
    model = kn.convert(stock)
    y = model(torch.randn(1, 3, 1, 1))
    y.square().sum().backward()
    assert y.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model[3].weight.grad.abs().sum() > 0
    assert model[1].running_var.isfinite().all()


def test_an_empty_batch_leaves_everything_alone():
    model = three_layers().float()
    before = copy.deepcopy(dict(model.named_buffers()))
    y = model(torch.randn(0, 2, 7, 7))
    assert y.shape == (0, 3, 3, 3)
    y.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_an_empty_batch_of_a_group_layer_has_gradients():
    model = kn.connect(nn.Sequential(kn.GroupKalmanNorm(2, 4)), input_stats=(0.0, 1.0))
    model(torch.randn(0, 4, 3, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_parameter_has_a_gradient():
    """DistributedDataParallel expects one, also from a layer without a prior."""
    for options in ({}, {"gain": 1.0}, {"gain": "learned"}):
        model = three_layers(**options)
        model(torch.randn(2, 2, 7, 7, dtype=torch.float64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_shows_but_spoils_no_buffer(value):
    model = three_layers().float()
    model(torch.randn(2, 2, 7, 7))
    assert kn.first_nonfinite(model) is None
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 2, 7, 7)
    x[0, 0, 0, 0] = value
    assert model(x).isnan().any()
    for name, buffer in model.state_dict().items():
        assert buffer.isfinite().all(), name
        if "running" in name:
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    assert kn.first_nonfinite(model) == "1"


def test_first_nonfinite_names_where_it_began():
    model = three_layers().float()
    model[3].register_forward_hook(lambda module, args, y: y * float("nan"))
    model(torch.randn(2, 2, 7, 7))
    assert kn.first_nonfinite(model) == "4"
    model[0].register_forward_hook(lambda module, args, y: y * float("nan"))  # then all is lost
    model(torch.randn(2, 2, 7, 7))
    assert kn.first_nonfinite(model) == "4"


def test_only_channels_that_are_not_finite_keep_their_statistics():
    layer = _silent(kn.KalmanNorm1d(2))
    layer(torch.tensor([[1.0, float("nan")], [3.0, 0.0]]))
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.2, 0.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, r"KalmanNorm2d got gain=0.0, expected 'prior-strength', 'learned' or a number in \(0, 1\]"),
        ({"gain": 1.5}, r"gain=1.5"),
        ({"gain": "learnt"}, r"gain='learnt', expected one of \['prior-strength', 'learned'\]"),
        ({"gain": None}, r"gain=None"),
        ({"carry": "input"}, r"carry='input', expected one of \['output', 'posterior'\]"),
        ({"estimator": "mc"}, r"estimator='mc'"),
        ({"guard": -1.0}, r"guard=-1.0"),
        ({"guard": 0}, r"guard=0"),
        ({"stats_batch_size": 0}, r"stats_batch_size=0"),
        ({"stats_batch_size": 2.5}, r"stats_batch_size=2.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        kn.KalmanNorm2d(4, **options)


def test_bad_options_of_group_norm():
    with pytest.raises(ValueError, match="got 6 channels, expected a multiple of num_groups=4"):
        kn.GroupKalmanNorm(4, 6)
    with pytest.raises(ValueError, match="stats_batch_size=2"):
        kn.GroupKalmanNorm(2, 6, stats_batch_size=2)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(2, 5, 7, 7), ValueError, r"'4' got an input of shape \(2, 5, 7, 7\), expected \(N, 4, \*, \*\)"),
        (torch.randn(2, 4, 7), ValueError, r"\(2, 4, 7\), expected \(N, 4, \*, \*\)"),
        (torch.zeros(2, 4, 7, 7, dtype=torch.long), TypeError, r"KalmanNorm2d '4' got an input of type torch.int64"),
    ],
)  # fmt: skip
def test_bad_input_names_the_layer(x, error, message):
    with pytest.raises(error, match=message):
        three_layers()[4](x)


def test_presets_are_named():
    with pytest.raises(ValueError, match=r"unknown preset 'papre', expected one of \['paper', 'released'\]"):
        kn.preset("papre")
    kn.preset("paper")["gain"] = 0.5
    assert kn.preset("paper")["gain"] == "learned"  # a copy each time


def test_a_lone_layer_warns_once_by_name_and_is_batch_norm():
    model = three_layers().float()
    layer = model[4]
    x = torch.randn(2, 4, 5, 5)
    with pytest.warns(UserWarning, match=r"KalmanNorm2d '4' sees no propagation and acts as BatchNorm"):
        y = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    torch.testing.assert_close(y, nn.BatchNorm2d(4)(x), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match=r"'1' .*Call model\(x\) and not its parts or model.forward\(x\)"):
        model.forward(torch.randn(2, 2, 9, 9))


def test_state_dict_keys_are_the_stock_layers_and_four():
    own = {"gain", "process_noise", "prior_shift", "prior_scale"}
    assert set(kn.KalmanNorm2d(4).state_dict()) == {*nn.BatchNorm2d(4).state_dict(), *own}
    assert set(kn.GroupKalmanNorm(2, 4).state_dict()) == {*nn.GroupNorm(2, 4).state_dict(), *own}
    stock = kn.KalmanNorm2d(4, gain=1.0, process_noise=False)
    assert set(stock.state_dict()) == set(nn.BatchNorm2d(4).state_dict())


def test_a_batch_norm_checkpoint_loads_strictly():
    stock = nn.BatchNorm2d(4)
    ours = kn.KalmanNorm2d(4)
    with warnings.catch_warnings(action="error"):
        ours.load_state_dict(stock.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="running_mean"):
        kn.GroupKalmanNorm(2, 4).load_state_dict(stock.state_dict(), strict=True)
    stock(torch.randn(3, 4, 5, 5))
    ours.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(ours.running_var, stock.running_var)
    with pytest.raises(RuntimeError, match="running_var"):
        ours.load_state_dict({k: v for k, v in stock.state_dict().items() if k != "running_var"}, strict=True)
    saved = {**ours.state_dict(), "gain": torch.tensor([0.7])}
    ours.load_state_dict(saved)
    assert ours.gain.item() == pytest.approx(0.7)


def test_a_frozen_layer_hands_on_its_running_statistics():
    model = three_layers().float()
    model[1].eval()
    description = kn.describe(model, torch.randn(2, 2, 7, 7))
    assert description.rows[1].prior_from == ("1",)
    model[1].eval()
    model(torch.randn(2, 2, 7, 7)).sum().backward()
    assert model[1].num_batches_tracked.item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_models_in_half_precision(dtype):
    model = three_layers().to(dtype)
    x = torch.randn(2, 2, 8, 8) * 1e4  # its variance overflows in float16
    y = model(x.to(dtype))
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


def test_autocast_keeps_statistics_in_float32():
    model = three_layers().float()
    seen = {}
    model[4].register_forward_pre_hook(lambda layer, args: seen.update(prior=layer.prior(args[0], 1)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 2, 8, 8))
    assert y.dtype == torch.bfloat16
    assert seen["prior"].mean.dtype == torch.float32
    y.float().sum().backward()
    assert model[4].running_var.dtype == torch.float32


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e18])
def test_constant_input_is_not_nan(constant):
    model = three_layers().float()
    y = model(torch.full((2, 2, 8, 8), constant))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert not any(p.grad.isnan().any() for p in model.parameters())  # that of a filter, times 1e18, may overflow


def test_parameters_and_counters_can_be_reset():
    """`to_empty` and `reset_parameters` on every layer: how a model is initialized on a device of its own."""
    for layer in (kn.KalmanNorm2d(4), kn.GroupKalmanNorm(2, 4), kn.KalmanNorm2d(4, gain=0.5, process_noise=False)):
        fresh = copy.deepcopy(layer)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.fill_(7)
        layer.reset_parameters()
        for after, before in zip((*layer.parameters(), *layer.buffers()), (*fresh.parameters(), *fresh.buffers()),
                                 strict=True):  # fmt: skip
            assert torch.equal(after, before)


def test_a_model_from_the_meta_device_trains():
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with torch.device("meta"):
        model = kn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), gain=0.5, process_noise=False)
    model.load_state_dict(stock.state_dict(), assign=True)
    assert not any(buffer.is_meta for buffer in model.buffers())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.train()(x), stock.train()(x))
    torch.testing.assert_close(model[1].running_mean, stock[1].running_mean)


def test_a_layer_that_leaves_the_meta_device_corrects_nothing():
    with torch.device("meta"):
        layer = kn.KalmanNorm2d(8).half()
    layer.to_empty(device="cpu")
    assert torch.equal(layer.prior_scale, torch.ones(8))
    assert torch.equal(layer.prior_shift, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_counter_of_another_type_counts(dtype):
    """As from a checkpoint whose tensors were averaged, with `assign=True`."""
    model = kn.convert(nn.Sequential(nn.BatchNorm2d(4)))
    memory = torch.zeros(2, dtype=dtype)
    model[0].num_batches_tracked = memory[0]
    for _ in range(3):
        model(torch.randn(2, 4, 6, 6))
    assert memory.tolist() == [3, 0]


def test_one_value_a_channel_without_a_prior_is_told_of_once():
    def network():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))

    model = kn.convert(network())
    with pytest.warns(UserWarning, match="KalmanNorm1d '1' got one value a channel, and nothing is believed"):
        model(torch.randn(1, 3))
    model(torch.randn(1, 3))  # a second warning would be an error here
    tracked = model[1].running_mean, model[1].running_var, model[1].num_batches_tracked
    assert [(t.min().item(), t.max().item()) for t in tracked] == [(0, 0), (1, 1), (0, 0)]
    assert model[4].running_var.max() < 1  # it has a prior, and learns
    kn.convert(network(), input_stats=([0.0] * 3, [1.0] * 3))(torch.randn(1, 3))


@pytest.mark.filterwarnings("ignore:.*got one value a channel")
@pytest.mark.parametrize("options", [{}, {"guard": 100.0}])
def test_layers_above_one_value_a_channel_do_not_amplify_rounding(options):
    """Its output is its bias. To the layers above it is an activation of the scale of its weight all the same."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model = kn.convert(nn.Sequential(*layers), **options)
    nn.init.constant_(model[1].weight, 2.0)
    model[3].register_forward_pre_hook(lambda layer, args: seen.update(belief=prior_of(args[0], 1)))
    seen = {}
    model(torch.randn(1, 8)).square().mean().backward()
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 10
    pi = torch.pi
    torch.testing.assert_close(seen["belief"].mean, torch.full((1, 8), 2 * (2 * pi) ** -0.5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen["belief"].var, torch.full((1, 8), 2 - 2 / pi), rtol=1e-3, atol=1e-3)


def test_a_relu_in_the_layer_skips_no_guard():
    x = torch.randn(2, 4, 6, 6)
    outputs = [
        kn.connect(nn.Sequential(kn.KalmanNormAct2d(4, act=nn.ReLU(), guard=guard)), input_stats=(0.0, 1e4))(x)
        for guard in (None, 100.0)
    ]
    torch.testing.assert_close(outputs[1], nn.BatchNorm2d(4)(x).relu(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*outputs, atol=0.1)


def test_a_relu_in_the_layer_skips_no_dropout():
    model = kn.connect(nn.Sequential(kn.KalmanNormAct2d(64, act=nn.ReLU(), drop=nn.Dropout(0.9))))
    assert (model(torch.randn(2, 64, 6, 6)) == 0).float().mean() > 0.8


def test_a_lost_gain_does_not_reach_eval():
    """Its gradient is zero there, and so is what it adds, whatever it is."""
    layer = kn.KalmanNorm2d(3).eval()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    expected = layer(x.detach())
    with torch.no_grad():
        layer.gain.fill_(float("nan"))
        layer.process_noise.fill_(float("inf"))
    y = layer(x)
    assert torch.equal(y.detach(), expected.detach())
    y.sum().backward()
    assert layer.gain.grad.item() == 0


class OfPatient(torch.Tensor):
    """As MONAI's MetaTensor: what torch's functions return is of the patient of what they got."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        output = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(output, cls):
            output.patient = next(a.patient for a in args if isinstance(a, cls))
        return output


class Wrapped(OfPatient):
    """As torchvision's tv_tensors: the output is wrapped by hand, which makes another object of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **(kwargs or {}))
        if not isinstance(output, torch.Tensor):
            return output
        output = output.as_subclass(cls)
        output.patient = next(a.patient for a in args if isinstance(a, cls))
        return output


@pytest.mark.parametrize("kind", [OfPatient, Wrapped])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_of_the_type_of_the_input(training, kind):
    norms = kn.KalmanNorm2d(4), kn.GroupKalmanNorm(2, 4), kn.KalmanNormAct2d(4, act=nn.ReLU())
    model = nn.Sequential(norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), *norms[1:]).train(training)
    kn.connect(model, input_stats=([0.0] * 4, [1.0] * 4))
    x = torch.randn(2, 4, 6, 6)
    named = x.as_subclass(kind)
    named.patient = "A"
    expected, output = model(x), model(named)
    assert type(output) is kind
    assert output.patient == "A"
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-5)
    described = kn.describe(model, named)
    assert described.with_prior == 3, described


def test_vectors_of_another_length_name_the_layer():
    """Pruning may shorten the stock parameters alone."""
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].process_noise = nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match=r"KalmanNorm2d '1' got process_noise of shape \(6,\), expected \(4,\), one a"):
        model(torch.randn(2, 3, 6, 6))


@pytest.mark.filterwarnings("ignore:.*sees no propagation")
def test_running_statistics_may_be_parameters():
    """As BatchNorm's may: nothing asks where they are registered."""
    layers = nn.BatchNorm2d(3), kn.KalmanNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    for layer in layers:
        layer.running_mean = nn.Parameter(layer.running_mean, requires_grad=False)
        layer(x)
    torch.testing.assert_close(layers[1].running_mean.data, layers[0].running_mean.data)
    assert layers[1].num_batches_tracked == 1
