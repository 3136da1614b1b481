"""One call there, one call back."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import conv_net, made_of, prior_of
from torch import nn
from torch.nn.utils import prune
from torchvision.ops.misc import FrozenBatchNorm2d

import kalmannorm as kn
from kalmannorm.steps import step_of


def small(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4))


def trained(model):
    """With statistics and an affine map that are not the initial ones."""
    for layer in model.modules():
        if hasattr(layer, "running_var"):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        if hasattr(layer, "running_var") or isinstance(layer, nn.GroupNorm):
            with torch.no_grad():
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
    return model


def test_eval_output_does_not_change_by_one_bit():
    model = trained(torchvision.models.resnet18(num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    torch.testing.assert_close(kn.convert(model)(x), before, rtol=0, atol=0)
    torch.testing.assert_close(kn.to_batchnorm(model)(x), before, rtol=0, atol=0)
    assert all(type(m).__module__.startswith(("torch.nn", "torchvision")) for m in model.modules())


def test_resnet50_has_one_gain_and_a_noise_for_each_channel_more():
    model = torchvision.models.resnet50()
    channels = [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = sum(p.numel() for p in model.parameters())
    kn.convert(model)
    after = sum(p.numel() for p in model.parameters())
    assert after == 25_583_645
    assert after - before == sum(channels) + len(channels)


def test_the_very_same_parameters_and_buffers():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    kn.convert(model)
    after = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert tensors.items() <= after.items()
    before = model[4].weight.clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[4].weight, before)
    kn.to_batchnorm(model)
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors


def test_type_flag_and_requires_grad_stay():
    model = small().double()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    kn.convert(model)
    assert not model[1].training
    assert model[4].training
    assert model[1].gain.dtype == torch.float64
    assert not model[1].gain.requires_grad
    assert not model[1].process_noise.requires_grad
    assert model[4].gain.requires_grad
    meta = kn.convert(small().to("meta"))
    assert all(t.is_meta for t in [*meta.parameters(), *meta.buffers()])


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (nn.BatchNorm1d(4), kn.KalmanNorm1d),
        (nn.BatchNorm2d(4, eps=1e-3, momentum=None), kn.KalmanNorm2d),
        (nn.BatchNorm3d(4, affine=False), kn.KalmanNorm3d),
        (nn.BatchNorm2d(4, track_running_stats=False), kn.KalmanNorm2d),
        (nn.SyncBatchNorm(4), kn.KalmanNorm),
        (FrozenBatchNorm2d(4), kn.KalmanNorm2d),
    ],
    ids=lambda v: getattr(v, "__name__", None) or type(v).__name__,
)
def test_every_batch_layer_converts_even_alone(stock, ours):
    trained_stock = trained(stock) if getattr(stock, "affine", False) and stock.track_running_stats else stock
    x = torch.randn(2, 4, *{kn.KalmanNorm1d: (5,), kn.KalmanNorm3d: (2, 3, 3)}.get(ours, (5, 5)))
    before = trained_stock.eval()(x)
    wrapped = nn.Sequential(nn.Identity(), trained_stock)
    with torch.no_grad():
        layer = kn.convert(wrapped)[1]
    assert type(layer) is ours
    torch.testing.assert_close(layer.eval()(x), before)
    for option in ("eps", "momentum", "affine", "track_running_stats"):
        if hasattr(stock, option):
            assert getattr(layer, option) == getattr(stock, option)


def test_a_frozen_layer_keeps_its_own_statistics():
    """A teacher that shares layers with the network, or a state dict taken before, must not change."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    stock[1].running_mean = stock[1].running_mean.double() + 1  # of another type than the weight
    teacher, state = nn.Sequential(*stock).eval(), stock.state_dict()
    x = torch.randn(8, 3, 6, 6)
    expected, mean = teacher(x), state["1.running_mean"].clone()
    model = kn.convert(stock).train()
    model(x).sum().backward()
    assert not model[1].running_mean.equal(mean.float())
    assert torch.equal(teacher(x), expected)
    assert torch.equal(state["1.running_mean"], mean)


class DetrFrozenBatchNorm2d(nn.Module):
    """As transformers has one for each detector: no `eps` of its own."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_copies_of_frozen_batch_norm_convert():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), DetrFrozenBatchNorm2d(4))
    x = torch.randn(2, 3, 6, 6)
    before = model(x)
    kn.convert(model)
    assert type(model[1]) is kn.KalmanNorm2d
    torch.testing.assert_close(model.eval()(x), before)
    kn.to_batchnorm(model)
    torch.testing.assert_close(model(x), before)

    class FrozenBatchNorm2d(nn.Module):
        """Of that name, but with other buffers."""

        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

    with pytest.raises(ValueError, match="nothing to convert"):
        kn.convert(nn.Sequential(FrozenBatchNorm2d()))


@pytest.mark.parametrize("shape", [(2, 40), (2, 5, 3), (2, 3, 4, 4)])
def test_single_numbers_describe_an_input_of_any_layout(shape):
    """Waveforms, sequences with their channels on the last axis, and images."""
    stock = made_of(
        lambda self, x, scale: self.norm((x * scale).reshape(len(x), 1, 1, -1)), norm=nn.BatchNorm2d(1)
    )  # fmt: skip
    model = kn.convert(copy.deepcopy(stock), input_stats=(2.0, 3.0))
    (row,) = kn.describe(model, torch.randn(shape), 2.0).rows
    assert row.prior_from == ("input",)
    found = []
    model.norm.register_forward_pre_hook(lambda layer, args: found.append(prior_of(args[0], 1)))
    model(torch.randn(shape), 2.0)
    assert (found[0].mean.item(), found[0].var.item()) == (4.0, 36.0)
    with pytest.raises(ValueError, match="std above 0"):
        kn.convert(stock, input_stats=(0.0, 0.0))


def test_a_layer_without_bias_stays_without():
    try:
        stock = nn.BatchNorm2d(4, bias=False)
    except TypeError:
        pytest.skip("this torch has no BatchNorm without bias")
    layer = kn.convert(nn.Sequential(stock))[0]
    assert layer.bias is None
    assert kn.to_batchnorm(nn.Sequential(layer))[0].bias is None
    assert kn.KalmanNorm2d(4, bias=False).bias is None


def test_a_lone_layer_is_returned():
    assert type(kn.to_batchnorm(kn.KalmanNorm2d(3))) is nn.BatchNorm2d
    assert isinstance(kn.convert(nn.BatchNorm2d(3)), kn.KalmanNorm2d)
    with pytest.raises(ValueError, match="no Kalman layer to connect"):
        kn.connect(nn.Linear(2, 2))


def test_group_and_instance_layers_convert_when_asked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.InstanceNorm2d(4), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    groups = kn.convert(copy.deepcopy(model), layers=("group", "instance"), gain=1.0)
    assert [type(m).__name__ for m in groups][1::2] == ["GroupKalmanNorm", "GroupKalmanNorm"]
    assert type(groups[4]) is nn.BatchNorm2d
    assert groups[3].num_groups == 4
    torch.testing.assert_close(groups(x), model(x), rtol=1e-5, atol=1e-5)
    assert type(kn.convert(copy.deepcopy(model))[1]) is nn.GroupNorm
    with pytest.raises(ValueError, match=r"InstanceNorm2d '0' tracks running statistics"):
        kn.convert(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)), layers=("instance",))


def test_a_layer_used_twice_stays_one():
    norm = nn.BatchNorm2d(3)
    model = kn.convert(made_of(lambda self, x: self.b(self.a(x)), a=norm, b=norm))
    assert model.a is model.b
    assert isinstance(model.b, kn.KalmanNorm2d)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8)], ids=repr)
def test_a_trained_layer_without_running_statistics_is_warned_of(norm):
    kinds = ("instance", "group")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    nn.init.zeros_(norm.weight)  # a way to begin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kn.convert(copy.deepcopy(model), layers=kinds)
        nn.init.uniform_(norm.weight)
        kn.convert(copy.deepcopy(model), layers=kinds, calibrate=False)
    with pytest.warns(UserWarning, match="'1' takes the place of a trained layer without running statistics"):
        kn.convert(model, layers=kinds)


def test_nothing_to_convert():
    with pytest.raises(TypeError, match="got OrderedDict, expected"):
        kn.convert(small().state_dict())
    with pytest.raises(ValueError, match=r"Linear has nothing to convert: no layer of the kinds \['batch'\]"):
        kn.convert(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="nothing to convert"):
        kn.convert(small(), layers=("group",))


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"kalmannorm.convert got option 'gian', expected one of \['gain',"):
        kn.convert(small(), gian=0.1)
    with pytest.raises(ValueError, match=r"got layers 'layer', expected one of \['batch', 'group', 'instance'\]"):
        kn.convert(small(), layers=("layer",))
    model = small()
    with pytest.raises(ValueError, match=r"gain=2\.0"):
        kn.convert(model, gain=2.0)
    assert type(model[1]) is nn.BatchNorm2d  # nothing was half done


def test_subclasses_with_a_forward_of_their_own_are_left_alone_and_named():
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x):
            return torch.relu(super().forward(x))

    model = nn.Sequential(BatchNormAct(3), nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="BatchNormAct '0' is a kind of BatchNorm2d with a forward or train"):
        kn.convert(model)
    assert type(model[0]) is BatchNormAct
    assert type(model[1]) is kn.KalmanNorm2d


def test_input_stats_outlive_a_call_without_values():
    """They follow the inputs to their device, but not to one where they would be lost."""
    model = kn.convert(small(), input_stats=([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    expected = model(torch.ones(2, 3, 8, 8))
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta")(torch.empty(2, 3, 8, 8, device="meta"))
    model.to_empty(device="cpu").load_state_dict(values)
    for layer in (model[1], model[4]):
        layer.nonfinite_batches.zero_()
    torch.testing.assert_close(model(torch.ones(2, 3, 8, 8)), expected)


def test_input_stats_give_the_first_layer_a_prior():
    model = kn.convert(small(), input_stats=([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    row = kn.describe(model, torch.randn(2, 3, 8, 8)).rows[0]
    assert row.prior_from == ("input",)
    with pytest.raises(ValueError, match=r"describe 3 channels, but Sequential got an input of shape \(2, 4, 8, 8\)"):
        model(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match="one finite number a channel each, std above 0"):
        kn.convert(small(), input_stats=([0.0], [0.0]))
    with pytest.raises(ValueError, match="one finite number a channel each, std above 0"):
        kn.convert(small(), input_stats=([float("nan")] * 3, [1.0] * 3))
    for stats in (([0.0, 0.0], [1.0]), ([], []), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="one finite number a channel each, std above 0"):
            kn.convert(small(), input_stats=stats)


def test_connecting_twice_is_connecting_once():
    model = kn.connect(kn.connect(kn.convert(small())))
    assert len(model._forward_hooks) == 1
    assert len(model._forward_pre_hooks) == 1
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
    kn.to_batchnorm(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_there_and_back_keeps_requires_grad_and_training_flags(training):
    model = nn.Sequential(small(), nn.BatchNorm2d(4), nn.Dropout()).train(training)
    model[0][1].training = not training
    model[0][1].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[0][3].requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}, flags(model)
    kn.convert(model)
    assert flags(model) == wanted[1]
    kn.to_batchnorm(model)
    assert ({name: p.requires_grad for name, p in model.named_parameters()}, flags(model)) == wanted


def test_what_is_inside_a_layer_keeps_a_training_flag_of_its_own():
    layer = kn.modules.KalmanNormAct2d(4, drop=nn.Dropout(0.5), act=nn.ReLU())
    model = nn.Sequential(layer)
    layer.drop.eval()
    plain = kn.to_batchnorm(model)
    assert [type(m) for m in plain[0]] == [nn.BatchNorm2d, nn.Dropout, nn.ReLU]
    assert [m.training for m in plain[0]] == [True, False, True]

    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d
    model = nn.Sequential(norm_act(4, drop_layer=nn.Dropout))
    model[0].drop.eval()
    wanted = flags(model)
    assert flags(kn.convert(model)) == wanted
    assert flags(kn.to_batchnorm(model)) == wanted


def test_users_own_hooks_stay():
    model = small()
    model.register_forward_hook(lambda module, args, y: y + 1)
    y = kn.to_batchnorm(kn.convert(model)).eval()(torch.zeros(1, 3, 8, 8))
    model._forward_hooks.clear()
    torch.testing.assert_close(y, model(torch.zeros(1, 3, 8, 8)) + 1)


def test_hooks_on_a_layer_go_where_it_goes():
    seen = []
    model = small()
    handle = model[1].register_forward_hook(lambda layer, args, y: seen.append(type(layer)))
    x = torch.zeros(2, 3, 8, 8)
    kn.convert(model)(x)
    kn.to_batchnorm(model)(x)
    assert seen == [kn.KalmanNorm2d, nn.BatchNorm2d]
    handle.remove()
    model(x)
    assert len(seen) == 2


def test_hooks_of_backward_passes_and_checkpoints_go_along():
    seen = []
    model = small()
    model[1].register_full_backward_hook(lambda layer, before, after: seen.append(("backward", type(layer))))
    model[1].register_state_dict_pre_hook(lambda layer, prefix, keep: seen.append(("state", type(layer))))
    model[1].register_load_state_dict_pre_hook(lambda layer, *rest: seen.append(("load", type(layer))))
    for change, kind in ((kn.convert, kn.KalmanNorm2d), (kn.to_batchnorm, nn.BatchNorm2d)):
        change(model)
        seen.clear()
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert seen == [("backward", kind), ("state", kind), ("load", kind)]


def test_a_counter_that_was_taken_off_does_not_stop_running_statistics():
    model, stock = small(), small()
    model[1].num_batches_tracked = None
    x = torch.randn(2, 3, 8, 8)
    kn.convert(model)(x)
    stock(x)
    torch.testing.assert_close(model[1].running_mean, stock[1].running_mean)


class WithoutRank(nn.modules.batchnorm._BatchNorm):
    """As some libraries write it: for inputs of any rank."""

    def _check_input_dim(self, input):
        pass


class WithRanks(nn.BatchNorm1d):
    def __init__(self, channels):
        super().__init__(channels)
        self.activation = "relu"
        self.gain = self.belief = None  # names that a Kalman layer has

    def _check_input_dim(self, input):
        pass


class AlwaysInEval(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("kind", [WithoutRank, WithRanks])
def test_subclasses_for_other_ranks_are_replaced(kind):
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)), input_stats=([0.0] * 3, [1.0] * 3))
    assert isinstance(model[1], kn.KalmanNorm)
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert getattr(model[1], "activation", "") == ("relu" if kind is WithRanks else "")
    assert type(kn.to_batchnorm(model)[1]) is kind


def test_a_subclass_that_stays_in_eval_is_left_alone():
    with pytest.warns(UserWarning, match=r"AlwaysInEval '1' .* train of its own"):
        model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), AlwaysInEval(4), nn.BatchNorm2d(4))).train()
    assert type(model[1]) is AlwaysInEval
    assert not model[1].training


def test_a_pruned_layer_of_timm_is_left_alone():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4), nn.BatchNorm2d(4))
    prune.random_unstructured(model[1], "weight", 0.5)
    with pytest.warns(UserWarning, match=r"BatchNormAct2d '1' .* or tensors: kalmannorm.convert leaves it as it is"):
        kn.convert(model)
    assert type(model[1]) is layers.BatchNormAct2d
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_layers_with_tensors_of_their_own_are_left_alone():
    class Scaled(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.scale = nn.Parameter(torch.ones(1))

    class Plain(nn.BatchNorm2d):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None)
    model = nn.Sequential(Scaled(4), parametrized, Plain(4, eps=1e-3))
    with pytest.warns(UserWarning, match="with a forward or train of its own, or tensors") as raised:
        kn.convert(model)
    assert len(raised) == 2
    assert model[1] is parametrized
    assert type(model[0]) is Scaled
    assert type(model[2]) is kn.KalmanNorm2d
    model[2].eps = 1e-2
    kn.to_batchnorm(model)
    assert type(model[2]) is Plain
    assert model[2].eps == 1e-2


def test_converting_twice_changes_nothing_but_what_is_said_of_the_input():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), gain=0.2)
    layer, hooks = model[1], [*model._forward_pre_hooks.values()]
    assert kn.convert(model)[1] is layer
    assert layer.gain == 0.2
    assert len(model._forward_pre_hooks) == len(hooks) == 1
    assert kn.describe(model, torch.randn(2, 3, 8, 8)).with_prior == 0
    kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(model, torch.randn(2, 3, 8, 8)).with_prior == 1


@pytest.mark.parametrize(
    "options",
    [{"gain": 0.3}, {"calibrate": False}, {"track_running_stats": False}, {"weight_standardization": True}], ids=str,
)  # fmt: skip
def test_options_of_a_converted_model_are_refused(options):
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"Sequential is converted already, so .* got .*{name}.* in vain"):
        kn.convert(model, **options)


def test_group_layers_that_fuse_have_no_stock_layer():
    model = kn.convert(small(lambda c: nn.GroupNorm(2, c)), layers=("group",))
    with pytest.raises(ValueError, match=r"GroupKalmanNorm '1' fuses its input with a prior in eval\(\) too"):
        kn.to_batchnorm(model)
    plain = kn.convert(small(lambda c: nn.GroupNorm(2, c)), layers=("group",), gain=1.0)
    assert type(kn.to_batchnorm(plain)[1]) is nn.GroupNorm


def test_fuse_folds_the_layers_away():
    model = kn.convert(trained(small())).eval()
    x = torch.randn(2, 3, 8, 8)
    fused = kn.fuse(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d | kn.KalmanNorm) for m in fused.modules())
    assert isinstance(model[1], kn.KalmanNorm2d)
    with pytest.raises(ValueError, match="is in training, expected eval"):
        kn.fuse(model.train())


@pytest.mark.parametrize(("linear", "norm", "shape"), [
    (nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), (5, 6)), (nn.Linear(6, 5), nn.BatchNorm1d(4), (3, 4, 6)),
])  # fmt: skip
def test_fuse_leaves_what_torch_cannot_fold(linear, norm, shape):
    norm.running_mean.normal_()
    model = kn.convert(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), linear, norm)).eval()
    x = torch.randn(shape)
    fused = kn.fuse(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    kept = next(module for module in fused.modules() if isinstance(module, nn.BatchNorm1d))
    assert kept.track_running_stats


def test_a_converted_network_learns():
    """The end of it all: a few steps at two samples lower the loss."""
    torch.manual_seed(0)
    model = kn.convert(nn.Sequential(small(), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_options_of_batch_layers_are_not_given_to_group_layers():
    def both():
        return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4))

    model = kn.convert(both(), layers=("batch", "group"), stats_batch_size=2)
    assert model[0].stats_batch_size == 2
    assert isinstance(model[2], kn.GroupKalmanNorm)
    with pytest.raises(ValueError, match="GroupKalmanNorm got stats_batch_size=2"):
        kn.convert(both(), layers=("group",), stats_batch_size=2)


def test_layers_without_tensors_go_where_the_others_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta", dtype=torch.float64), nn.InstanceNorm2d(4))
    layer = kn.convert(model, layers=("instance",))[1]
    assert (layer.gain.device.type, layer.gain.dtype) == ("meta", torch.float64)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"), nn.BatchNorm2d(4, affine=False, track_running_stats=False))
    assert kn.convert(plain)[1].process_noise.is_meta


def test_connecting_again_keeps_what_was_said_of_the_input():
    model = kn.connect(conv_net(input_stats=([0.0] * 3, [1.0] * 3)))
    x = torch.randn(2, 3, 8, 8)
    assert kn.describe(model, x).with_prior == 2
    kn.connect(model, input_stats=([5.0] * 3, [1.0] * 3))
    assert kn.describe(model, x).rows[0].prior_from == ("input",)
    assert model._forward_pre_hooks  # and it is the new one that counts
    (watch,) = {hook.__self__ for hook in model._forward_pre_hooks.values()}
    assert watch.given[None].mean.tolist() == [5.0] * 3


def test_a_layer_alone_takes_input_stats():
    x = torch.randn(2, 3, 4, 4)
    layer = kn.convert(nn.BatchNorm2d(3), input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(layer, x).rows[0].prior_from == ("input",)
    whole = kn.convert(nn.Sequential(nn.BatchNorm2d(3)), input_stats=([0.0] * 3, [1.0] * 3))
    torch.testing.assert_close(layer(x), whole(x))
    nested = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    assert kn.describe(kn.connect(nested), x).rows[0].prior_from == ()


@pytest.mark.parametrize(
    "stats", [(0.485, 0.456, 0.406), 3, ([0.0] * 3,), ("a", "b"), (None, None), {"input": (0.0,)}, ([0.0, [1.0]], 1.0)]
)
def test_input_stats_that_are_no_mean_and_deviation(stats):
    with pytest.raises(ValueError, match=r"input_stats.* got .*, expected \(mean, std\)"):
        kn.convert(small(), input_stats=stats)


def test_input_stats_are_of_the_inputs_type():
    model = conv_net(input_stats=([0.1] * 3, [0.3] * 3)).double()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(step_of(args[0]).belief))
    model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert seen[0].mean.dtype == torch.float64
    assert seen[0].mean.flatten()[0].item() == 0.1
    model.float()(torch.randn(2, 3, 8, 8))
    model.bfloat16()(torch.randn(2, 3, 8, 8).bfloat16())
    assert [belief.mean.dtype for belief in seen[1:]] == [torch.float32] * 2


def test_frozen_batch_norm_stays_frozen_where_the_convolution_before_it_is():
    """As in the first stages of a detector's pretrained backbone."""
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.ReLU()) for _ in range(2)))
    model[0].requires_grad_(False)
    model = kn.convert(model).train()
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    assert [stage[1].frozen for stage in model] == [True, False]
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"1"}
    assert [bool(stage[1].running_mean.any()) for stage in model] == [False, True]


def test_a_hook_on_the_layer_that_was_replaced_is_not_one_on_the_new():
    old = nn.BatchNorm2d(4)
    called = []
    old.register_forward_hook(lambda *args: called.append("before"))
    model = kn.convert(nn.Sequential(old))
    old.register_forward_hook(lambda *args: called.append("after"))
    model(torch.randn(2, 4, 6, 6))
    assert called == ["before"]


@pytest.mark.parametrize("holder", [list, tuple, lambda layers: dict(enumerate(layers))],
                         ids=["list", "tuple", "dict"])  # fmt: skip
def test_layers_that_a_network_holds_in_a_container_are_replaced_there_too(holder):
    """As detectors do that register their layers by name, and call a list of them."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)]
            for i, layer in enumerate(layers):
                self.add_module(f"layer{i}", layer)
            self.called, self.sizes = holder(layers), [4, 5]

        def forward(self, x):
            for i in range(3):
                x = self.called[i](x)
            return x

    model = Holder()
    for change, kind in ((kn.convert, kn.KalmanNorm2d), (kn.to_batchnorm, nn.BatchNorm2d)):
        assert change(model) is model
        assert [type(model.called[i]) for i in range(3)] == [kind, nn.ReLU, kind]
        assert all(model.called[i] is layer for i, layer in enumerate(model.children()))
    assert model.sizes == [4, 5]


@pytest.mark.parametrize(
    ("lazy", "kinds"),
    [
        (nn.LazyBatchNorm2d(), "batch"),
        (nn.LazyBatchNorm2d(affine=False, track_running_stats=False), "batch"),
        (nn.LazyInstanceNorm2d(track_running_stats=False), "instance"),
    ],
)
def test_a_lazy_layer_is_refused_until_it_has_been_called(lazy, kinds):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), lazy)
    with pytest.raises(ValueError, match=rf"{type(lazy).__name__} '3' is lazy and does not know its channels yet"):
        kn.convert(model, layers=(kinds,))
    assert not any(isinstance(layer, kn.KalmanNorm2d | kn.GroupKalmanNorm) for layer in model)
    model(torch.randn(2, 3, 8, 8))
    assert isinstance(kn.convert(model, layers=(kinds,))[3], kn.KalmanNorm2d | kn.GroupKalmanNorm)


def test_instance_normalization_without_a_batch_axis_is_refused():
    """`(C, H, W)` could be taken for `(N, C, L)` where `H` is `C`."""
    model = kn.convert(nn.Sequential(nn.InstanceNorm2d(4)), layers=("instance",))
    with pytest.raises(ValueError, match=r"'0' got an input of shape \(4, 4, 6\), expected \(N, 4, \*, \*\)"):
        model(torch.randn(4, 4, 6))
    assert model(torch.randn(2, 4, 6, 6)).shape == (2, 4, 6, 6)


def test_a_model_stays_as_it_was_where_input_stats_are_wrong():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="expected \\(mean, std\\)"):
        kn.convert(model, input_stats=([0.0], [0.0]))
    assert type(model[1]) is nn.BatchNorm2d


def test_group_layers_have_no_running_statistics_to_drop():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    assert type(kn.convert(model, layers=("group",), track_running_stats=False)[1]) is kn.GroupKalmanNorm
    assert not kn.convert(small(), track_running_stats=False)[1].track_running_stats


def two_inputs():
    first, second = (nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8)) for inputs in (4, 5))
    return made_of(lambda self, x, y: self.first(x) + self.second(y), first=first, second=second)


def test_input_stats_by_name_of_what_was_compiled():
    """What torch.compile gives has a forward of any arguments."""
    model = torch.compile(two_inputs(), backend="eager")
    with pytest.raises(ValueError, match="input_stats got 'z'"):
        kn.convert(model, input_stats={"z": (0.0, 1.0)})
    model = kn.convert(model, input_stats={"x": (0.0, 1.0), "y": (0.0, 2.0)})
    assert kn.describe(model, torch.randn(6, 4), torch.randn(6, 5)).with_prior == 2


@pytest.mark.parametrize("keeps_statistics", [True, False])
def test_a_checkpoint_that_is_assigned_to_a_network_on_the_meta_device(keeps_statistics):
    trained = small()
    for _ in range(30):
        trained(2 * torch.randn(4, 3, 8, 8) + 1)
    with torch.device("meta"):
        model = small()
    kn.convert(model, track_running_stats=keeps_statistics)
    model.load_state_dict(copy.deepcopy(trained.state_dict()), assign=True)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    expected = kn.convert(trained, track_running_stats=keeps_statistics)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
    assert model.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_network_from_the_meta_device_has_initial_values_of_what_a_checkpoint_lacks(affine, assign):
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine))

    with torch.device("meta"):
        model = kn.convert(build())
    if not assign:
        model.to_empty(device="cpu")
        assert (model[1].gain == 0).all()  # of memory that may hold anything
        assert (model[1].process_noise == 0).all()
        assert model[1].nonfinite_batches == 0
    model.load_state_dict(build().state_dict(), assign=assign)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_network_whose_tensors_were_loaded_one_by_one_leaves_the_meta_device():
    with torch.device("meta"):
        model = kn.convert(small())
    for name, tensor in kn.convert(small()).state_dict().items():  # as accelerate does
        module, _, name = name.rpartition(".")
        tensors = model.get_submodule(module)._buffers
        if name not in tensors:
            tensors, tensor = model.get_submodule(module)._parameters, nn.Parameter(tensor)
        tensors[name] = tensor
    model.to("cpu")
    counters = [layer.nonfinite_batches for layer in model.modules() if isinstance(layer, kn.KalmanNorm)]
    assert len(counters) > 1
    assert all(counter.item() == 0 for counter in counters)
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("convert", [
    lambda model: kn.convert(model, layers=("batch", "instance")),
    lambda model: kn.to_batchnorm(kn.convert(model, layers=("batch", "group"))),
])  # fmt: skip
def test_hooks_stay_where_a_later_layer_cannot_be_converted(convert):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"tracks running statistics|fuses its input with a prior"):
        convert(model)
    model(torch.randn(2, 4, 3, 3))
    assert calls == [1]


def test_input_stats_of_a_network_that_is_made_on_the_meta_device():
    with torch.device("meta"):
        model = kn.convert(two_inputs(), input_stats={"x": (0.0, 1.0), "y": ([0.0] * 5, [1.0] * 5)})
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert kn.describe(model, torch.randn(6, 4), torch.randn(6, 5)).with_prior == 2


def test_a_layer_of_all_processes_is_saved_and_loaded(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = kn.convert(nn.Sequential(nn.SyncBatchNorm(4)))
        group = model[0].process_group
        saved = pickle.dumps(model)
        assert group is not None
        assert pickle.loads(saved)[0].process_group is copy.copy(model[0]).process_group is group
    finally:
        torch.distributed.destroy_process_group()
    assert pickle.loads(saved)[0].process_group is None


def test_layers_without_tensors_are_made_as_the_models_buffers():
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4)).double()
    assert kn.convert(model, layers="instance")[1].gain.dtype == torch.float64


def test_groups_of_samples_may_be_larger_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(4))
    assert kn.convert(model, track_running_stats=False, stats_batch_size=2)[0].stats_batch_size == 2


def test_a_frozen_layers_eps_is_kept():
    frozen = FrozenBatchNorm2d(3, eps=0.5)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(kn.convert(nn.Sequential(frozen)).eval()(x), frozen(x))


def test_input_stats_that_a_network_learns_are_taken_as_numbers():
    mean = nn.Parameter(torch.zeros(3))
    model = kn.convert(nn.Sequential(nn.BatchNorm2d(3)), input_stats=(mean, torch.ones(3)))
    for _ in range(2):
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert mean.grad is None


def test_a_network_that_was_converted_in_inference_mode_can_be_trained():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with torch.inference_mode():
        model = kn.convert(model, input_stats=(0.0, 1.0))
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
