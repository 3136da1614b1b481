"""Filters of zero mean and unit norm: which layers get them, what they compute, and where they work."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from network import in_two_processes
from networks import Checkpointed, made_of, through_a_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torchvision.ops.misc import FrozenBatchNorm2d

import kalmannorm as kn
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.signal import SignalNet, TabularNet
from kalmannorm.lab.models.unet3d import UNet3d
from kalmannorm.standardization import filters_below_norms, standardized


def plain(weight):
    """The formula as it is written."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / (rows.var(1, keepdim=True, correction=0) * rows.shape[1] + 1e-4).sqrt()).view_as(weight)


def small(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), norm(8), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(4),
    )  # fmt: skip


def built(norm=nn.BatchNorm2d):
    model = small(norm)
    model(torch.randn(2, 3, 8, 8))
    for layer in model.modules():
        if hasattr(layer, "reset_running_stats"):
            layer.reset_running_stats()
    return model


def both():
    """With Kalman layers."""
    return kn.convert(built(), weight_standardization=True)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def names(model):
    return [name for name, layer in model.named_modules() if type(layer).__name__.startswith("Standardized")]


def train(model, steps=2, images=IMAGES):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return model


# -- what is computed ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (6, 1, 5), (5, 7), (2, 3, 1, 2, 3)])
def test_the_formula_its_gradient_and_their_gradient(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(standardized(weight), plain(weight), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(shape, dtype=torch.float64)
    found, expected = (torch.autograd.grad((f(weight) * upstream).sum(), weight)[0] for f in (standardized, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(standardized, weight)
    assert torch.autograd.gradgradcheck(standardized, weight)


def test_a_dead_filter_stays_finite():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    standardized(weight).sum().backward()
    assert not standardized(weight).any()
    assert weight.grad.isfinite().all()


def test_half_precision_is_computed_in_float32():
    weight = (torch.randn(4, 512, 3, 3) + 3).bfloat16()
    found = standardized(weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, plain(weight.float()).bfloat16(), rtol=2**-7, atol=1e-6)


LAYERS = [
    (nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (2, 4, 9)),
    (nn.Conv2d(3, 4, 3, stride=2, padding_mode="circular"), (2, 3, 8, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (2, 4, 8, 8)),
    (nn.Conv3d(2, 4, (1, 2, 3), bias=False), (2, 2, 4, 4, 4)),
    (nn.Linear(5, 3), (2, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_is_the_stock_layer_with_other_filters(layer, shape):
    x = torch.randn(shape)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight.copy_(plain(expected.weight))
    new = kn.standardize_weights(nn.Sequential(copy.deepcopy(layer)), names=["0"])
    torch.testing.assert_close(new(x), expected(x), rtol=1e-5, atol=1e-6)
    assert names(new) == ["0"]


def test_priors_are_those_of_the_standardized_filters():
    model = kn.convert(built(), weight_standardization=True)
    baked = copy.deepcopy(model)
    for name in names(baked):
        layer = baked.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(plain(layer.weight))
        layer.__class__ = nn.Conv2d
    rows = [kn.describe(each, IMAGES).rows[1] for each in (model, baked)]
    assert rows[0] == rows[1]
    assert rows[0].prior_from == ("1",)
    ys = [each(IMAGES[:1]) for each in (model, baked)]  # of one image, so by the prior above all
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-5)


def test_prior_of_an_affine_norm_has_a_gradient_to_the_raw_filter():
    """By differences, through the prior, as an output of one image hardly moves by its own statistics."""
    model = kn.convert(built(), weight_standardization=True).double()
    x = IMAGES[:1].double()
    weight = model[3].weight
    model(x).square().sum().backward()
    direction = torch.randn_like(weight)

    def at(step):
        with torch.no_grad():
            weight.add_(step * direction)
            y = model(x).square().sum()
            weight.sub_(step * direction)
        return y

    slope = (at(1e-5) - at(-1e-5)) / 2e-5
    torch.testing.assert_close((weight.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


# -- which layers ----------------------------------------------------------------------------------


def convolutions(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)]


def of_timm(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, "fc"),
    "resnet50": (torchvision.models.resnet50, "fc"),
    "densenet121": (torchvision.models.densenet121, "classifier"),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), r"aux\d.fc|fc"),
    "mobilenet_v3": (torchvision.models.mobilenet_v3_small, r"block\.\d\.fc|classifier"),
    "efficientnet": (torchvision.models.efficientnet_b0, r"block\.\d\.fc|classifier"),
    "group": (lambda: torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(4, c)), "fc"),
    "timm resnet50": (lambda: of_timm("resnet50"), "fc"),
    "timm lite0": (lambda: of_timm("efficientnet_lite0", drop_path_rate=0.2), "classifier"),
    "before the activation": (lambda: CifarResNet(14, width=4), "classifier"),
    "behind it": (lambda: CifarResNet(14, width=4, preactivation=False), "classifier"),
    "volumes": (lambda: UNet3d(4, 2), "up|head"),
    "signals": (SignalNet, "20"),
    "rows": (lambda: TabularNet(8, (4, 4)), "6"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_reaches_a_norm_and_nothing_else(name):
    build, left = NETWORKS[name]
    model = build()
    tensors = {key: id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()}
    attributes = set(vars(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kn.standardize_weights(model) is model
    pattern = re.compile(left)
    assert names(model) == [each for each in convolutions(model) if not pattern.search(each)]
    assert names(model)
    assert {key: id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert set(vars(model)) == attributes
    assert model.training


class Ways(nn.Module):
    """Paths from a convolution to one norm."""

    def __init__(self):
        super().__init__()
        self.reaches = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(7))
        self.stops = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.scale, self.free = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.randn(4, 4, 3, 3))
        self.drop, self.identity = torchvision.ops.StochasticDepth(0.5, "row"), nn.Identity()
        self.other, self.norm = nn.LayerNorm(8), nn.BatchNorm2d(4)
        self.made = torch.zeros(())

    def forward(self, x):
        a, b, c, d, e, f, g = (layer(x) for layer in self.reaches)
        h, i, j, k, m, n = (layer(x) for layer in self.stops)
        first, second = torch.chunk(torch.cat([a, b], 1), 2, dim=1)
        reaches = first - 2 * second + self.drop(self.identity(c)) + self.scale.view(4, 1, 1) * d + torch.zeros(1)
        reaches += F.interpolate(F.max_pool2d(F.pad(e, (1, 1, 1, 1)), 3, 2)[:, :, :4, :4], scale_factor=2) / 2
        reaches += f.permute(0, 2, 3, 1).reshape(f.shape[0], -1, 4).permute(0, 2, 1).view(f.size(0), 4, 8, 8)
        reaches += torch.stack([g, g]).mean(0)
        stops = F.relu(h) + i * j.sigmoid() + j * i + self.other(k) + F.gelu(m) + F.conv2d(n, self.free)[
            :, :, :1, :1]  # fmt: skip
        return self.norm(reaches + stops)


def test_the_paths_to_a_norm():
    model = kn.standardize_weights(Ways())
    assert names(model) == [f"reaches.{i}" for i in range(7)]
    assert model(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8)


def test_layers_between_which_nothing_normalizes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    assert names(kn.standardize_weights(model)) == ["1"]
    with pytest.raises(ValueError, match="Sequential has nothing to standardize"):
        kn.standardize_weights(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


class Own(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_cannot_be_standardized_is_named_with_its_reason():
    left = [
        nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2), Own(4, 4, 3),
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
        nn.Conv2d(4, 4, 3),
    ]  # fmt: skip
    left[-1].forward = left[-1].forward
    units = [module for layer in [*left, nn.Conv2d(4, 4, 3)] for module in (layer, nn.BatchNorm2d(4), nn.ReLU())]
    with pytest.warns(UserWarning, match="standardize_weights leaves") as caught:
        model = kn.standardize_weights(nn.Sequential(*units))
    assert names(model) == ["18"]
    (message,) = {str(warning.message) for warning in caught if "kalmannorm" in str(warning.message)}
    assert len(caught) == 1
    for name, reason in {
        "0": "has filters of one weight", "3": "is a ConvTranspose2d", "6": r"is a test_standardization.Own",
        "9": "ParametrizedConv2d", "12": "computes its weight from other tensors", "15": "has a forward of its own",
    }.items():  # fmt: skip
        assert reason in message[message.index(f"'{name}'") :].split(";")[0]


def test_a_weight_that_another_layer_uses_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    model[3].weight = model[0].weight
    with pytest.warns(UserWarning, match="'0' shares its weight with '3'"):
        kn.standardize_weights(model)
    assert names(model) == []


@pytest.mark.parametrize("inputs", [None, torch.randn(4, 5)])
def test_a_weight_that_a_function_uses_too(inputs):
    """A decoder that is the encoder, transposed: `to_batchnorm` may not write into the one for the other."""
    model = made_of(
        lambda self, x: F.linear(self.norm(self.encoder(x) + self.other(x)).relu(), self.encoder.weight.t()),
        encoder=nn.Linear(5, 8), other=nn.Linear(5, 8), norm=nn.BatchNorm1d(8),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="'encoder' has a weight that another function uses"):
        kn.standardize_weights(model, inputs=inputs)
    assert names(model) == ["other"]


def test_layers_by_name():
    model = torchvision.models.resnet18()
    assert names(kn.standardize_weights(model, names=["fc", "layer1.0.conv1", "fc"])) == ["layer1.0.conv1", "fc"]
    for wrong, message in [
        (["conv9"], "has no layer 'conv9'"), (["bn1"], "'bn1': it is a .*BatchNorm2d"), ("fc", "expected a list"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kn.standardize_weights(model, names=wrong)


def test_a_model_that_cannot_be_traced():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = made_of(lambda self, x: self.backbone(x if x.sum() > 0 else -x), backbone=backbone).eval()
    with pytest.raises(ValueError, match=r"Net cannot be traced .*inputs=images"):
        kn.convert(model, weight_standardization=True)
    assert not model.training
    assert type(model.backbone[1]) is nn.BatchNorm2d
    kn.standardize_weights(model.backbone)
    assert names(kn.convert(model)) == ["backbone.0"]


def test_a_detectors_backbone():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, norm_layer=nn.BatchNorm2d
    )
    kn.standardize_weights(model.backbone)
    assert len(names(model)) == 53


# -- pretrained networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_a_trained_network_is_refused_and_left_as_it_was(norm):
    model = built(norm)
    if norm is nn.BatchNorm2d:
        model(IMAGES)
    hook = model[1].register_forward_hook(lambda *_: None)
    classes = [type(layer) for layer in model]
    for change in (kn.standardize_weights, lambda m: kn.convert(m, weight_standardization=True)):
        with pytest.raises(ValueError, match=r"BatchNorm2d '\d'.* kalmannorm.convert\(model\).*calibrate"):
            change(model)
    assert [type(layer) for layer in model] == classes
    assert hook.id in model[1]._forward_hooks


def test_twice_is_once_also_when_trained_in_between():
    model = train(kn.standardize_weights(built()))
    before = model(IMAGES)
    torch.testing.assert_close(kn.standardize_weights(model)(IMAGES), before)
    assert names(kn.standardize_weights(model, names=["0"])) == ["0", "3"]


def test_a_checkpoint_loads_afterwards_and_a_stock_model_loads_it():
    trained = train(both())
    again = both()
    assert str(again.load_state_dict(trained.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(again.eval()(IMAGES), trained.eval()(IMAGES), rtol=0, atol=0)
    stock = built()
    stock.load_state_dict(kn.to_batchnorm(trained).state_dict())
    torch.testing.assert_close(stock.eval()(IMAGES), again(IMAGES), rtol=0, atol=1e-6)


# -- back to stock layers --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
def test_to_batchnorm_bakes_without_kalman_layers(norm):
    check_baked(kn.standardize_weights(built(norm)))


def test_to_batchnorm_bakes():
    check_baked(both())


def check_baked(model):
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model[3].training = False
    train(model).eval()
    model[0].weight.requires_grad_(False)
    parameters, expected = {name: id(p) for name, p in model[0].named_parameters()}, model(IMAGES)
    raw = model[0].weight.clone()
    kn.to_batchnorm(model)
    assert {type(layer).__module__.partition(".")[0] for layer in model} == {"torch"}
    torch.testing.assert_close(model[0].weight.data, plain(raw))
    assert type(model[0]) is type(model[3]) is nn.Conv2d
    assert {name: id(p) for name, p in model[0].named_parameters()} == parameters
    assert not model[0].weight.requires_grad
    calls.clear()
    torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=1e-6)
    assert calls


def test_a_filter_that_layers_share_is_baked_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = kn.convert(model, weight_standardization=True)
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(0.01)
    x = torch.randn(2, 4, 6, 6)
    expected = model.eval()(x)
    torch.testing.assert_close(kn.to_batchnorm(model)(x), expected)


def test_a_copy_is_fused():
    model = train(both()).eval()
    fused = kn.fuse(model)
    torch.testing.assert_close(fused(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    assert not any(hasattr(layer, "running_var") for layer in fused.modules())
    assert names(model) == ["0", "3"]


def test_traced_by_torch_fx_as_it_is():
    model = train(kn.standardize_weights(built())).eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES), rtol=0, atol=0)


# -- in a program ----------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [both, lambda: kn.standardize_weights(built())])
def test_copied_and_pickled(convert):
    model = train(convert())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_a_file(model)]
    for each in copies:
        assert names(each) == ["0", "3"]
    expected = train(model)(IMAGES)
    for each in copies:
        torch.testing.assert_close(train(each)(IMAGES), expected, rtol=0, atol=0)


def test_a_moving_average_of_weights_is_of_the_raw_ones():
    model = both()
    average = AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2)
    first = model[0].weight.detach().clone()
    average.update_parameters(model)
    train(model)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, (first + model[0].weight) / 2)
    assert names(average) == ["module.0", "module.3"]
    assert average(IMAGES).isfinite().all()


def test_compiled_as_a_whole():
    torch._dynamo.reset()
    model = both()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    ys = [each(IMAGES) for each in (model, compiled)]
    for y in ys:
        y.square().sum().backward()
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].weight.grad, compiled._orig_mod[0].weight.grad, rtol=1e-3, atol=1e-5)


def test_bfloat16_autocast():
    model = both()
    expected = model(IMAGES)
    weights = []
    convolve = F.conv2d
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", lambda x, w, *args: (weights.append(w), convolve(x, w, *args))[1])
        y = model(IMAGES)
    y.float().square().sum().backward()
    assert [w.dtype for w in weights] == [torch.float32, torch.float32]
    torch.testing.assert_close(weights[1], standardized(model[3].weight), rtol=0, atol=0)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("convert", [both, lambda: kn.standardize_weights(built())])
def test_exported(convert):
    model = train(convert()).eval()
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=((torch.export.Dim("batch"), 3, 8, 8),))
    more = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_exported_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = train(both()).eval()
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (IMAGES,), path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_functional_call_with_raw_weights():
    model = both()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state["0.weight"] = 2 * state["0.weight"]  # whose standardized filters are the same, but for eps
    y = torch.func.functional_call(model, state, IMAGES)
    torch.testing.assert_close(y, model(IMAGES), rtol=1e-3, atol=1e-3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    model.eval()  # running statistics cannot be moved inside
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, IMAGES).square().sum())(parameters)
    model(IMAGES).square().sum().backward()
    torch.testing.assert_close(gradients["0.weight"], model[0].weight.grad, rtol=1e-3, atol=1e-5)


def test_double_backward():
    model = both().double()
    x = IMAGES.double()
    weight = model[0].weight

    def slope():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        return gradient.square().sum()

    (found,) = torch.autograd.grad(slope(), weight)
    direction = torch.randn_like(weight)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(slope().detach())
        with torch.no_grad():
            weight.sub_(step * direction)
    torch.testing.assert_close((found * direction).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-6)


def test_from_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        kn.convert(model, weight_standardization=True)
        assert names(model) == ["0", "3"]
    model.to_empty(device="cpu")
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    y = train(model)(IMAGES)
    assert y.device.type == "cpu"
    assert y.isfinite().all()


def test_checkpointed_regions_give_the_same_gradients():
    models = [kn.convert(kn.standardize_weights(Plain(use), names=Plain.NAMES)) for use in (False, True)]
    for model in models:
        model(IMAGES).square().sum().backward()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=0)


class Plain(Checkpointed):
    NAMES = ("stem.0", "blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "blocks.2.side")


# -- several processes -----------------------------------------------------------------------------


def trained_in_parallel(rank):
    model = both().double()
    train(DistributedDataParallel(model), images=IMAGES[rank : rank + 1].double())
    return dict(model.named_parameters())


@pytest.mark.slow
def test_data_parallel(tmp_path):
    first, second = in_two_processes(trained_in_parallel, tmp_path)
    models = [both().double() for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for _ in range(2):
        for model, image in zip(models, IMAGES.double().split(1), strict=True):
            model.zero_grad()
            model(image).square().mean().backward()
        for pair in zip(*(model.parameters() for model in models), strict=True):
            mean = torch.stack([p.grad for p in pair]).mean(0)
            for p in pair:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(first[name], parameter, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(second[name], parameter, rtol=1e-9, atol=1e-12)


def test_a_filter_beside_a_pruned_bias_is_standardized():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    prune.l1_unstructured(layers[0], "bias", 1)
    with warnings.catch_warnings(action="error"):
        model = kn.convert(layers, weight_standardization=True)
    x = torch.randn(2, 3, 8, 8)
    expected = nn.functional.conv2d(x, standardized(model[0].weight), model[0].bias)
    torch.testing.assert_close(model[0](x), expected)


def test_a_pruned_filter_stays_standardized():
    """Pruning writes its weight anew at each call: what is written into it would be lost."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = kn.convert(layers, weight_standardization=True)
    prune.l1_unstructured(model[3], "weight", 0.5)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"leaves \['3'\] standardized, whose weights are pruned or parametrized"):
        model = kn.to_batchnorm(model)
    torch.testing.assert_close(model(x), expected)
    prune.remove(model[3], "weight")
    model = kn.to_batchnorm(model)
    assert type(model[3]) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


class Untraceable(nn.Module):
    """Its course depends on a value, which `torch.fx` cannot follow."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.gate, self.branch, self.late = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, images, scale=1.0):
        h = F.relu(self.norm(self.stem(images)))
        if h.sum() > -1:
            h = h * torch.sigmoid(self.gate(h)) + self.branch(h) * scale
        return self.head(F.relu(self.late(h)).mean((2, 3)))


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "mapping"])
def test_filters_are_found_in_a_call(inputs):
    model = Untraceable().eval()
    images = torch.randn(2, 3, 6, 6)
    given = {"tensor": images, "tuple": (images, 2.0), "mapping": {"images": images}}[inputs]
    with pytest.raises(ValueError, match=r"cannot be traced by torch.fx.*standardize_weights\(model, inputs=images\)"):
        kn.standardize_weights(model)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kn.standardize_weights(model, inputs=given)
    changed = [name for name, layer in model.named_modules() if type(layer).__name__.startswith("Standardized")]
    assert changed == ["stem", "branch"]  # not the gate, and not the head
    assert not model.training
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not vars(images)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5"])
def test_a_call_finds_what_the_graph_has(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    by_graph, by_call = (filters_below_norms(model, x) for x in (None, torch.randn(2, 3, 64, 64)))
    assert by_graph == by_call
    assert len(by_graph) > 20
