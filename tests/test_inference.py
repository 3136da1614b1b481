"""The paper's option B, statistics of a whole data set, and its BN*."""

import collections
import copy
import re
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from network import in_two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kalmannorm as kn
from kalmannorm import passes
from kalmannorm.functional import kalman_update, observe
from kalmannorm.gaussian import Gaussian
from kalmannorm.passes import Population, run_batches
from kalmannorm.traversal import device_of


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


@pytest.mark.parametrize("convert", [True, False])
def test_frozen_layers_are_never_online(convert):
    model = kn.convert(small()) if convert else small()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    expected = kn.freeze(model).eval()(x)
    with pytest.raises(ValueError, match="no KalmanNorm and no BatchNorm layer that is not frozen"):
        kn.online_statistics(model).__enter__()
    kn.freeze(model[2:], False)
    model.eval()
    with kn.online_statistics(model):
        first = model[:2](x)
        assert not torch.allclose(model(x), expected)
    kn.freeze(model)
    torch.testing.assert_close(model[:2](x), first)


# -- recalibrate -----------------------------------------------------------------------------------


def quiet(model, loader, **options):
    return kn.recalibrate(model, loader, progress=False, **options)


def statistics(model):
    """The running statistics, copied."""
    return {key: t.clone() for key, t in model.state_dict().items() if "running" in key}


def assert_same_statistics(model, expected, **tolerance):
    torch.testing.assert_close(statistics(model), expected, **tolerance)


def everything(model):
    flags = [module.training for module in model.modules()]
    online = [getattr(module, "online", None) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return copy.deepcopy(model.state_dict()), flags, online, hooks


def assert_as_before(model, before):
    now = everything(model)
    torch.testing.assert_close(now[0], before[0], rtol=0, atol=0)
    assert now[1:] == before[1:]
    assert not any("collect" in vars(module) for module in model.modules())


@pytest.mark.parametrize("sizes", [[5, 5, 3], [1, 12], [13], [2] * 6 + [1]], ids=str)
@pytest.mark.parametrize(
    "layer", [kn.KalmanNorm2d(4, gain=1.0), kn.KalmanNorm2d(4), nn.BatchNorm2d(4, momentum=None)], ids=repr
)
def test_one_layer_gets_mean_and_biased_variance_of_the_data(layer, sizes):
    model = kn.connect(nn.Sequential(layer)) if isinstance(layer, kn.KalmanNorm) else nn.Sequential(layer)
    buffers = [layer.running_mean, layer.running_var]
    # Far from zero, and with different statistics from batch to batch.
    x = 100 + torch.randn(13, 4, 3, 3, dtype=torch.float64) + torch.arange(13.0).view(13, 1, 1, 1)
    assert quiet(model, x.float().split(sizes)) is model
    assert layer.running_mean is buffers[0]
    assert layer.running_var is buffers[1]
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_var.double(), x.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    assert layer.num_batches_tracked.item() == 0


def test_statistic_groups_are_pooled():
    layer = kn.KalmanNorm1d(3, gain=1.0, stats_batch_size=2)
    x = torch.randn(10, 3) * torch.arange(1.0, 11.0)[:, None]
    quiet(layer, x.split([6, 4]))
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0))


def merged(parts):
    """The mean and variance of all samples, from samples, mean and variance of each part."""
    total = sum(n for n, _, _ in parts)
    mean = sum(n * own for n, own, _ in parts) / total
    return mean, sum(n * (var + (own - mean) ** 2) for n, own, var in parts) / total


@pytest.mark.parametrize("options", [{}, {"spread": False, "gain": 0.3}, {"stats_batch_size": 1}], ids=str)
def test_each_layer_gets_the_fused_statistics_of_its_inputs_as_in_eval(options):
    """One layer after another, the layer below by its statistics up to then."""
    model = kn.convert(small(), input_stats=([0.0] * 3, [1.0] * 3), process_noise=False, **options).double()
    batches = [torch.randn(n, 3, 8, 8, dtype=torch.float64) * n for n in (3, 1, 4)]
    result = quiet(copy.deepcopy(model), [(x, None) for x in batches])
    lower, upper = kn.freeze(model[1]), model[4]
    seen, parts = {}, {lower: [], upper: []}
    for layer in parts:
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: (layer.prior(args[0], 1), args[0])}))
    for x in batches:
        for layer, own in parts.items():
            with torch.no_grad(), kn.online_statistics(model.eval()):
                model(x)
            prior, z = seen[layer]
            groups = layer.statistic_groups(len(z))
            fused = kalman_update(prior, observe(z, groups), layer.kalman_gain(len(z) // groups), spread=layer.spread)
            own += [(len(z) / groups, *each) for each in zip(fused.mean, fused.var, strict=True)]
            layer.running_mean, layer.running_var = (t.detach() for t in merged(own))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(result[1], name), getattr(lower, name))
        torch.testing.assert_close(getattr(result[4], name), getattr(upper, name))


@pytest.mark.parametrize("kalman", [True, False])
def test_eval_of_a_deep_network_comes_back(kalman):
    """Where running statistics are off in each layer, errors multiply; they are mended from the bottom to the top."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(12)))
    model = kn.convert(model, input_stats=([0.0] * 4, [1.0] * 4)) if kalman else model
    batches = torch.randn(64, 4, 6, 6).split(2)
    with torch.no_grad():
        for x in batches:
            model(x)
        for block in model:
            block[1].running_var.mul_(0.1)
        assert model.eval()(batches[0]).square().mean() > 1e6
        quiet(model, batches)
        assert model(batches[0]).square().mean() < 5


class Stateful(nn.Module):
    """All kinds of layers with a state, some of them frozen or without gradients."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.norm = kn.KalmanNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.stock = nn.BatchNorm2d(4)
        self.frozen = kn.freeze(kn.KalmanNorm2d(4))
        self.frozen_stock = kn.freeze(nn.BatchNorm2d(4))
        self.no_statistics = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        x = self.instance(self.drop(self.norm(self.conv(x))))
        return self.no_statistics(self.frozen_stock(self.frozen(self.stock(input=x))))


def test_all_else_keeps_its_state():
    model = kn.connect(Stateful())
    model(torch.randn(4, 3, 8, 8))
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    before = everything(model)
    random_state = torch.get_rng_state()
    changed = {"norm.running_mean", "norm.running_var", "stock.running_mean", "stock.running_var"}
    quiet(model, torch.ones(8, 3, 8, 8).mul(torch.arange(8.0).view(8, 1, 1, 1)).split(2))
    assert torch.equal(torch.get_rng_state(), random_state)  # no dropout
    now = everything(model)
    assert now[1:] == before[1:]
    assert {key for key, t in now[0].items() if not torch.equal(t, before[0][key])} == changed
    assert [p.grad for p in model.parameters() if p.grad is not None] == []


@pytest.mark.parametrize("run", [
    lambda model, batches: kn.recalibrate(model, batches, progress=False),
    lambda model, batches: kn.diagnose(model, batches, progress=False),
])  # fmt: skip
def test_a_correction_that_is_awaited_is_awaited_still(run):
    model = small()
    for _ in range(30):
        model(torch.randn(8, 3, 8, 8))
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    batches = [2 * torch.randn(8, 3, 8, 8) for _ in range(3)]  # of other statistics
    other = copy.deepcopy(model)
    run(model, batches)
    assert model[4].awaits_correction
    first = model(batches[0])
    assert first.isfinite().all()
    assert torch.equal(first, other(batches[0]))  # corrected by the same statistics
    assert not model[4].awaits_correction
    assert model[4].prior_scale.min() > 0


def test_frozen_layers_feed_the_others_by_their_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(kn.freeze(nn.BatchNorm2d(3)), kn.KalmanNorm2d(3, gain=1.0))
    model[0].running_mean.fill_(2.0)
    model[0].running_var.fill_(4.0)
    x = torch.randn(6, 3, 4, 4)
    quiet(kn.connect(model), x.split(4))
    expected = (x - 2) / (4 + 1e-5) ** 0.5
    torch.testing.assert_close(model[1].running_mean, expected.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, expected.var((0, 2, 3), correction=0))
    with pytest.raises(ValueError, match="Sequential has no layer with running statistics that is not frozen"):
        quiet(kn.freeze(model), [x])


Pair = collections.namedtuple("Pair", ["image", "label"])


class Takes(nn.Module):
    """Takes a tensor, a list of tensors, or keywords."""

    def __init__(self):
        super().__init__()
        self.net = kn.convert(small())

    def forward(self, x=None, image=None):
        x = image if x is None else x
        return self.net(torch.stack(x) if isinstance(x, list) else x)


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (lambda x: x, {}),
        (lambda x: (x, "label"), {}),
        (lambda x: [x, torch.zeros(len(x))], {}),
        (lambda x: Pair(x, [{"box": 3}]), {}),
        (lambda x: (list(x), [{} for _ in x]), {}),
        (lambda x: {"image": x}, {}),
        (lambda x: types.SimpleNamespace(image=x), {"forward": lambda model, batch: model(batch.image)}),
        (lambda x: ("label", {"pixels": [x]}), {"forward": lambda model, batch: model.net(batch[1]["pixels"][0])}),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "list of tensors", "mapping", "object", "nested"],
)
def test_batches_of_all_kinds(batch, options):
    model, plain = Takes(), Takes()
    data = torch.randn(7, 3, 8, 8).split([4, 3])
    quiet(plain.net, data)
    before = statistics(model)
    quiet(model, (batch(x) for x in data), **options)
    assert_same_statistics(model, statistics(plain), rtol=0, atol=0)
    assert not torch.equal(before["net.1.running_mean"], model.net[1].running_mean)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("image", r"gave a batch of type str \(no tensor\), expected a tensor, a tuple or list that begins with"),
        (("label", torch.zeros(1)), r"gave a batch of type tuple \(of str, Tensor\)"),
        ((["label"], torch.zeros(1)), r"gave a batch of type tuple \(of list, Tensor\)"),
        ([], r"gave a batch of type list \(of nothing\).*; or forward="),
        ({"image": torch.zeros(1)}, r"a batch with the keys \['image'\], expected arguments of Sequential's forward"),
    ],
    ids=repr,
)
def test_a_batch_that_cannot_be_called_with(batch, message):
    model = kn.convert(small())
    before = everything(model)
    with pytest.raises(TypeError, match=message):
        quiet(model, [torch.randn(2, 3, 8, 8), batch])
    assert_as_before(model, before)


def test_inputs_move_to_the_models_device():
    """The meta device stands for another one; it has no values, so the call itself is watched."""
    seen = []
    model = kn.convert(small()).to("meta")
    batch = Pair({"x": torch.zeros(2)}, [(torch.zeros(1),), "label"])
    with pytest.raises(RuntimeError, match="stop"):
        quiet(model, [batch], forward=lambda model, batch: seen.append(batch) or exec("raise RuntimeError('stop')"))
    assert type(seen[0]) is Pair
    assert seen[0].image["x"].is_meta
    assert seen[0].label[0][0].is_meta
    assert seen[0].label[1] == "label"


def test_a_batch_that_can_move_itself_does():
    """As those of transformers and torch_geometric do."""

    class Batch:
        def to(self, device):
            return [torch.zeros(1, device=device)]

    seen = []
    run_batches(nn.Linear(1, 1, device="meta"), [Batch()], seen.extend, caller="f", max_batches=None, progress=False)
    assert seen[0].is_meta


def test_a_model_of_buffers_alone_is_where_they_are():
    assert device_of(nn.BatchNorm2d(3, affine=False, device="meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


def test_max_batches():
    data = torch.randn(8, 3, 8, 8)
    model, expected = kn.convert(small()), kn.convert(small())
    quiet(expected, data[:4].split(2))
    batches = iter(data.split(2))
    quiet(model, batches, max_batches=2)
    assert_same_statistics(model, statistics(expected), rtol=0, atol=0)
    assert len(list(batches)) == 2  # none was fetched in vain
    with pytest.raises(ValueError, match="got max_batches=0, expected None or a number above 0"):
        quiet(model, [data], max_batches=0)


def bars_of_rich(monkeypatch):
    """The titles and totals of the bars that are shown from here on."""
    progress = pytest.importorskip("rich.progress")
    shown = []
    track = progress.track
    monkeypatch.setattr(progress, "track", lambda batches, what, total, **options: shown.append((what, total))
                        or track(batches, what, total, **options))  # fmt: skip
    return shown


@pytest.mark.parametrize(("most", "total"), [(None, 4), (3, 3), (9, 4)])
def test_progress_by_rich(monkeypatch, capsys, most, total):
    shown = bars_of_rich(monkeypatch)
    kn.recalibrate(kn.convert(small()), torch.randn(8, 3, 8, 8).split(2), max_batches=most)
    assert shown == [("recalibrate", total)]
    kn.recalibrate(kn.convert(small()), iter(torch.randn(8, 3, 8, 8).split(2)))
    quiet(kn.convert(small()), torch.randn(2, 3, 8, 8).split(2))
    assert len(shown) == 2
    assert capsys.readouterr().out == ""


def test_the_most_batches_are_the_total_where_the_loader_has_no_length(monkeypatch):
    shown, batches = bars_of_rich(monkeypatch), (torch.randn(2, 3, 8, 8) for _ in range(4))
    kn.recalibrate(kn.convert(small()), batches, max_batches=3)
    assert shown == [("recalibrate", 3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_shows_progress(monkeypatch, rank):
    shown = bars_of_rich(monkeypatch)
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    run_batches(nn.ReLU(), [torch.zeros(1)], id, caller="f", max_batches=None, progress=True, process_group=object())
    assert shown == [("f", 1)][rank:]


def test_an_error_ends_the_progress_bar(monkeypatch):
    """At once, though the error still holds the loop: rich shows no second bar beside one that is open."""
    ended = []

    def bar(batches, total):
        try:
            yield from batches
        finally:
            ended.append(total)

    monkeypatch.setattr(passes, "_progress_bar", lambda title: bar)
    with pytest.raises(ZeroDivisionError) as held:
        kn.recalibrate(kn.convert(small()), [torch.zeros(1), torch.zeros(1)], forward=lambda model, batch: 1 / 0)
    assert ended == [2]
    assert held.tb is not None


def test_progress_without_rich(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    data = torch.randn(4, 3, 8, 8).split(2)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    kn.recalibrate(kn.convert(small()), data)
    assert re.search("recalibrate: .*/2", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model, expected = kn.convert(small()), quiet(kn.convert(small()), data)
    kn.recalibrate(model, data)
    assert capsys.readouterr().err == ""
    assert_same_statistics(model, statistics(expected), rtol=0, atol=0)


def test_nothing_to_recalibrate():
    with pytest.raises(ValueError, match="Linear has no layer with running statistics"):
        quiet(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="no layer with running statistics"):
        quiet(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2)), [torch.zeros(1, 2)])
    model = kn.convert(small())
    before = everything(model)
    with pytest.raises(ValueError, match="got an empty loader for Sequential, expected a batch"):
        quiet(model, [])
    assert_as_before(model, before)


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_statistics_that_are_not_finite_name_the_layer_and_change_none(convert, value):
    model = kn.convert(small()) if convert else small()
    before = everything(model)
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    batches[1][0, 0, 0, 0] = value
    kind = "KalmanNorm2d" if convert else "BatchNorm2d"
    with pytest.raises(ValueError, match=rf"{kind} '1' got statistics that are not finite in torch.float32, expected"):
        quiet(model, batches)
    assert_as_before(model, before)


def test_statistics_that_overflow_the_buffer():
    layer = kn.KalmanNorm1d(2).half()
    quiet(layer, [torch.tensor([[1.0, 2.0], [3.0, 2.0]]).half()])
    assert layer.running_mean.dtype == torch.float16
    assert layer.running_mean.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match=r"KalmanNorm1d '' got statistics that are not finite in torch\.float16"):
        quiet(layer, [torch.tensor([[1.0, 1e4], [3.0, -1e4]]).half()])
    assert layer.running_mean.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_all_as_it_was(error):
    def loader():
        yield torch.randn(2, 3, 8, 8)
        raise error("stop")

    model = kn.connect(nn.Sequential(kn.convert(small()), nn.BatchNorm2d(4)))
    model[0][4].online = True
    model[0][1].eval()
    before = everything(model)
    with pytest.raises(error, match="stop"):
        kn.recalibrate(model, loader())
    assert_as_before(model, before)
    with pytest.raises(ValueError, match="got an input of shape"):
        quiet(model, [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8)], forward=lambda m, x: m(x) if x.ndim == 4
              else m[0][1](x))  # fmt: skip
    assert_as_before(model, before)


def test_layers_that_no_batch_came_through_keep_theirs_and_are_named():
    model = kn.connect(nn.Sequential(kn.convert(small()), nn.ModuleList([kn.KalmanNorm2d(4), nn.BatchNorm2d(4)])))
    model[1][0].running_mean.fill_(3.0)
    with pytest.warns(UserWarning, match=r"no batch came through keep their running statistics: \['1.0', '1.1'\]"):
        quiet(model, [torch.randn(2, 3, 8, 8)], forward=lambda m, x: m[0](x))
    assert model[1][0].running_mean.tolist() == [3.0] * 4
    assert model[0][1].running_mean.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(model[0], [torch.randn(2, 3, 8, 8)])


def test_a_process_that_saw_nothing_may_be_merged_first():
    population, x = Population(nn.BatchNorm2d(3)), torch.randn(4, 3, 2, 2)
    population.add(Gaussian(torch.zeros(1, 3), torch.zeros(1, 3)), 0)
    population.observe(x)
    torch.testing.assert_close(population.statistics.mean[0], x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_counts_for_nothing():
    model, expected = kn.connect(nn.Sequential(kn.convert(small()), nn.BatchNorm2d(4))), None
    data = torch.randn(4, 3, 8, 8)
    expected = quiet(copy.deepcopy(model), data.split(2))
    quiet(model, [data[:0], *data.split(2), data[:0]])
    assert_same_statistics(model, statistics(expected), rtol=0, atol=0)


def test_a_compiled_model():
    """Compiled code is not run, nor compiled anew; afterwards it is as before."""
    torch.compiler.reset()
    data = torch.randn(4, 3, 8, 8)
    expected = quiet(kn.convert(small()), data.split(2))
    model = kn.convert(small())
    compiled = torch.compile(model, backend="eager", fullgraph=True).eval()
    compiled(data[:2])
    with torch.compiler.set_stance("fail_on_recompile"):
        before = compiled(data[:2])
        assert quiet(compiled, data.split(2)) is compiled
        after = compiled(data[:2])
    assert_same_statistics(model, statistics(expected), rtol=0, atol=0)
    torch.testing.assert_close(after, expected.eval()(data[:2]))
    assert not torch.allclose(after, before, atol=1e-3)


def spread_model(process_group=None):
    return kn.convert(small(), process_group=process_group)


def spread_data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 3, 8, 8, generator=generator) + torch.arange(10.0).view(10, 1, 1, 1)


def recalibrated_by_two(rank):
    world = dist.group.WORLD
    mine = [spread_data()[:6].split(2), spread_data()[6:].split([4])][rank]  # three batches here, one there
    found = {}
    found["merged"] = statistics(quiet(spread_model(), mine, process_group=world))
    found["shared"] = statistics(quiet(spread_model(world), spread_data().split(5)[rank].split([3, 2])))
    found["both"] = statistics(quiet(spread_model(world), spread_data().split(5)[rank].split([3, 2]),
                                     process_group=world))  # fmt: skip
    # DistributedDataParallel's own forward would wait for the other process.
    parallel = DistributedDataParallel(spread_model())
    found["one is empty"] = statistics(quiet(parallel, [] if rank else mine, process_group=world).module)
    try:
        quiet(spread_model(), [], process_group=world)
    except ValueError as error:
        found["error"] = str(error)
    return found


@pytest.mark.slow
def test_two_processes_merge_what_each_found(tmp_path):
    found = in_two_processes(recalibrated_by_two, tmp_path)
    x = spread_data()
    first, second = (statistics(quiet(spread_model(), parts)) for parts in (x[:6].split(2), [x[6:]]))
    of_both = {}
    for name in ("1", "4"):
        mean, var = f"{name}.running_mean", f"{name}.running_var"
        of_both[mean], of_both[var] = merged([(6, first[mean], first[var]), (4, second[mean], second[var])])
    # Each call there sees both processes' batches as one.
    shared = statistics(quiet(spread_model(), [x[[0, 1, 2, 5, 6, 7]], x[[3, 4, 8, 9]]]))
    expected = {"merged": of_both, "one is empty": first, "shared": shared, "both": shared}
    for rank in range(2):
        for name, wanted in expected.items():
            torch.testing.assert_close(
                found[rank][name], wanted, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert found[rank]["error"].startswith("kalmannorm.recalibrate got an empty loader")
    for name in expected:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)


class WithQueue(nn.Sequential):
    """A network that keeps its latest outputs, as MoCo does, in `eval()` too."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x):
        y = super().forward(x)
        self.queue.copy_(y.detach().mean((0, 2, 3)))
        return y


@pytest.mark.parametrize("run", [kn.recalibrate, kn.calibrate, kn.diagnose])
def test_other_buffers_stay(run):
    model = kn.convert(WithQueue(*small()))
    model(torch.randn(2, 3, 8, 8))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before["queue"].any()
    run(model, [torch.randn(2, 3, 8, 8)], progress=False)
    changed = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    allowed = {kn.recalibrate: ("running_mean", "running_var"), kn.calibrate: ("prior_shift", "prior_scale")}
    assert {name.split(".")[-1] for name in changed} == set(allowed.get(run, ()))
