"""From a trained Kalman network to what is deployed: stock layers, folded, exported, in ONNX, in int8."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from networks import made_of
from torch import nn
from torch.nn.utils import prune
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock, ResNet

import kalmannorm as kn

CLASSES = 5


class Block(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.skip = nn.Conv2d(channels, 2 * channels, 1, stride)
        self.skip_norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.skip_norm(self.skip(x)))


class Residual(nn.Module):
    """A small residual network."""

    def __init__(self, num_classes, blocks=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(*(Block(8 * 2**number, 1 + number) for number in range(blocks)))
        self.head = nn.Sequential(
            nn.Linear(8 * 2**blocks, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes)
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def resnet(num_classes):
    """ResNet-18 with one block a stage instead of two."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes)


def mobilenet(num_classes):
    """MobileNetV3-small with a block of each kind: without an expansion, without squeeze-and-excitation, residual."""
    blocks = [
        (16, 3, 16, 16, True, "RE", 2), (16, 3, 72, 24, False, "RE", 2), (24, 5, 96, 40, True, "HS", 2),
        (40, 5, 120, 40, True, "HS", 1),
    ]  # fmt: skip
    return MobileNetV3([InvertedResidualConfig(*block, dilation=1, width_mult=1.0) for block in blocks], 128,
                       num_classes)  # fmt: skip


NETWORKS = {"residual": (Residual, 16), "resnet": (resnet, 32), "mobilenet": (mobilenet, 64)}
large = [pytest.param(name, marks=pytest.mark.slow) for name in list(NETWORKS)[1:]]


def images(name, samples):
    """Of very different contents, or a deep random network would tell them all alike."""
    size = NETWORKS[name][1]
    coarse = 3 * torch.randn(samples, 3, 4, 4)
    return F.interpolate(coarse, size) + torch.randn(samples, 3, size, size) / 4


@functools.cache
def _trained(name):
    torch.manual_seed(0)
    model = kn.convert(NETWORKS[name][0](num_classes=CLASSES))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()  # torchvision's small ones take longer to tell images apart
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, target = images(name, 12), torch.arange(12) % CLASSES
    for step in range(40):
        part = torch.arange(4 * step, 4 * step + 4) % 12
        loss = F.cross_entropy(model(x[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kn.recalibrate(model, x.split(4), progress=False).eval()


def trained(name):
    """A Kalman network in ``eval()`` after some steps at four samples, and what it gives for some images."""
    model = copy.deepcopy(_trained(name))
    torch.manual_seed(1)  # whichever test has trained it
    x = images(name, 12)
    with torch.no_grad():
        y = model(x)
    assert (y - y.mean(0)).norm() > 0.5 * y.norm()  # or equal outputs would say little
    return model, x, y


def relative_error(found, expected):
    """Of what tells the images apart."""
    return ((found - expected).norm() / (expected - expected.mean(0)).norm()).item()


def kinds(model):
    return {type(module) for module in model.modules()}


def deployed(model, how):
    return kn.to_batchnorm(model) if how == "stock" else model


every_network = pytest.mark.parametrize("name", ["residual", *large])
# Each network and each kind of layers is exported, but not each with each: an export takes seconds.
both_ways = pytest.mark.parametrize(("name", "how"), [
    ("residual", "stock"), ("residual", "kalman"), pytest.param("resnet", "kalman", marks=pytest.mark.slow),
    pytest.param("mobilenet", "stock", marks=pytest.mark.slow),
])  # fmt: skip


@every_network
def test_stock_layers_compute_the_same(name):
    model, x, y = trained(name)
    untouched = NETWORKS[name][0](num_classes=CLASSES)
    plain = kn.to_batchnorm(model)
    torch.testing.assert_close(plain(x), y, rtol=0, atol=1e-6)
    assert kinds(plain) == kinds(untouched)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert set(plain.state_dict()) == set(untouched.state_dict())


@every_network
def test_folded_into_the_convolutions(name):
    model, x, _ = trained(name)
    model, x = model.double(), x.double()  # to see past the rounding of many layers
    y = model(x)
    fused = kn.fuse(model)
    torch.testing.assert_close(fused(x), y, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in fused.modules())
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


class Shared(nn.Module):
    """One convolution, called for two heads with a normalization of its own each, as detectors do."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.tower.conv = nn.Conv2d(3, 3, 1)
        self.heads = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x):
        return self.heads[0](self.tower(x)), self.tower(x), self.heads[1](self.tower(-x))


def test_a_convolution_called_at_several_places():
    model = kn.convert(Shared())
    model(torch.randn(8, 3, 4, 4) * 3)
    with torch.no_grad():
        model.heads[1].weight.fill_(2.0)
    model.eval()
    x = torch.randn(2, 3, 4, 4)
    fused = kn.fuse(model)
    for found, expected in zip(fused(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_a_convolution_whose_weight_a_function_uses():
    model = made_of(
        lambda self, x: F.linear(self.norm(self.encoder(x)), self.encoder.weight.t()),
        encoder=nn.Linear(5, 8), norm=nn.BatchNorm1d(8),
    )  # fmt: skip
    model = kn.convert(model)
    x = torch.randn(8, 5)
    model(x)
    fused = kn.fuse(model.eval())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fused.modules())


def test_a_model_that_cannot_be_traced_says_so():
    model = kn.convert(made_of(lambda self, x: self.norm(x) if x.sum() > 0 else x, norm=nn.BatchNorm2d(3))).eval()
    with pytest.raises(ValueError, match=r"Net cannot be traced by torch.fx \(TraceError: symbolically traced"):
        kn.fuse(model)
    assert type(model.norm) is kn.KalmanNorm2d


# -- exported --------------------------------------------------------------------------------------


def exported(model, x, **options):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), **options)


@both_ways
def test_export_with_any_batch_size(name, how):
    model, x, y = trained(name)
    program = exported(deployed(model, how), x[:3])
    torch.testing.assert_close(program.module()(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(program.module()(x[:1]), y[:1], rtol=1e-5, atol=1e-5)


@both_ways
def test_onnx(name, how, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, y = trained(name)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        deployed(model, how), (x[:3],), path, dynamo=True, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-4)


@functools.cache
def _trained_one_at_a_time():
    """Each sample normalized by itself, in training and in ``eval()``, after some steps."""
    torch.manual_seed(0)
    # One block: with each further one, an export of the priors takes seconds more.
    network = Residual(num_classes=CLASSES, blocks=1)
    model = kn.convert(network, input_stats=([0.0] * 3, [3.0] * 3), track_running_stats=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, target = images("residual", 12), torch.arange(12) % CLASSES
    for step in range(24):
        part = torch.arange(4 * step, 4 * step + 4) % 12
        loss = F.cross_entropy(model(x[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained_one_at_a_time():
    model = copy.deepcopy(_trained_one_at_a_time())
    torch.manual_seed(1)
    x = images("residual", 6)
    with torch.no_grad():
        return model, x, model(x)


def test_one_at_a_time_exports_priors_as_constants():
    model, x, y = trained_one_at_a_time()
    graph = exported(model, x[:3])
    assert "kalmannorm" not in str(graph.graph)
    torch.testing.assert_close(graph.module()(x), y, rtol=1e-4, atol=1e-5)
    used = {node.name for node in graph.graph.nodes if node.users}
    kept = [name for name in graph.constants if name in str(graph.graph_signature)]
    assert len(kept) >= 2 * 4  # mean and variance of four layers' priors
    in_use = {spec.target for spec in graph.graph_signature.input_specs if spec.arg.name in used}
    assert not any("process_noise" in str(name) for name in in_use - set(kept))


def test_one_at_a_time_in_a_strict_export():
    """Which has functions of Python's module `operator` for ``a + b``."""
    model, x, y = trained_one_at_a_time()
    strict = torch.export.export(model, (x,), strict=True).module()
    torch.testing.assert_close(strict(x), y, rtol=1e-4, atol=1e-5)


def test_one_at_a_time_in_int8():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, x, y = trained_one_at_a_time()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    quantized = pt2e.convert_pt2e(prepared)
    assert sum(t.dtype == torch.int8 for t in quantized.state_dict().values()) == 5
    with torch.no_grad():
        assert 0 < relative_error(quantized(x), y) < 0.2


def test_one_at_a_time_in_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x, y = trained_one_at_a_time()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (x[:3],), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), y, rtol=1e-4, atol=1e-4)


def test_one_at_a_time_has_no_stock_layers():
    model, _, _ = trained_one_at_a_time()
    with pytest.raises(ValueError, match="fuses its input with a prior in eval"):
        kn.to_batchnorm(model)


@every_network
def test_int8(name):
    """Post-training quantization with BatchNorm folded, as for any stock network."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, x, y = trained(name)
    # Strict, as torchao's quantizer takes a ReLU called twice (ResNet's) for one function of two outputs
    # otherwise: pytorch/ao#4478.
    graph = exported(kn.to_batchnorm(model), x[:3], strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(graph, quantizer)
    for part in x.split(3):
        prepared(part)
    quantized = pt2e.convert_pt2e(prepared)
    functions = [str(node.target) for node in quantized.graph.nodes]
    assert not any("batch_norm" in function for function in functions)
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    assert sum("dequantize_per_channel" in function for function in functions) == layers  # their weights
    weights = [t for t in quantized.state_dict().values() if t.dtype == torch.int8]
    assert len(weights) == layers
    with torch.no_grad():
        # Between 0.05 and 0.1, as the rounding of its training falls.
        assert 0 < relative_error(quantized(x), y) < 0.15
        # One normalization layer folded wrongly would show.
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms[len(norms) // 2].running_var.mul_(4)
        assert relative_error(model(x), y) > 0.2


# -- checkpoints both ways -------------------------------------------------------------------------


@every_network
def test_a_checkpoint_of_stock_layers_fits_the_kalman_network_and_back(name, tmp_path):
    build, _ = NETWORKS[name]
    model, x, y = trained(name)
    torch.save(kn.to_batchnorm(copy.deepcopy(model)).state_dict(), tmp_path / "stock.pt")
    stock = build(num_classes=CLASSES).eval()
    stock.load_state_dict(torch.load(tmp_path / "stock.pt", weights_only=True), strict=True)
    torch.testing.assert_close(stock(x), y, rtol=0, atol=1e-6)
    # And on from there.
    again = kn.convert(build(num_classes=CLASSES)).eval()
    again.load_state_dict(torch.load(tmp_path / "stock.pt", weights_only=True), strict=True)
    torch.testing.assert_close(again(x), y, rtol=0, atol=1e-6)


@every_network
def test_a_checkpoint_of_the_kalman_network_trains_on_and_deploys(name, tmp_path):
    build, _ = NETWORKS[name]
    model, x, y = trained(name)
    torch.save(model.state_dict(), tmp_path / "kalman.pt")
    fresh = kn.convert(build(num_classes=CLASSES))
    fresh.load_state_dict(torch.load(tmp_path / "kalman.pt", weights_only=True), strict=True)
    # Gain and process noise came along: it trains as the other would.
    twin = copy.deepcopy(model).train()
    torch.manual_seed(1)
    expected = twin(x[:2])
    torch.manual_seed(1)  # MobileNet drops out
    torch.testing.assert_close(fresh(x[:2]), expected, rtol=1e-5, atol=1e-5)
    assert any(layer.gain.item() != 0 for layer in fresh.modules() if isinstance(layer, kn.KalmanNorm))
    fresh.load_state_dict(torch.load(tmp_path / "kalman.pt", weights_only=True), strict=True)
    torch.testing.assert_close(kn.to_batchnorm(fresh.eval())(x), y, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gain"):
        build(num_classes=CLASSES).load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_layers_whole(training):
    torch.manual_seed(0)
    model = kn.convert(Residual(CLASSES), input_stats=([0.0] * 3, [3.0] * 3)).train(training)
    traced, x = torch.fx.symbolic_trace(copy.deepcopy(model)), images("residual", 2)
    assert sum(node.op == "call_module" and "norm" in str(node.target) for node in traced.graph.nodes) == 4
    kn.connect(traced, input_stats=([0.0] * 3, [3.0] * 3))  # a new module, for the hooks of the old one are gone
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    assert kn.describe(traced, x).with_prior == kn.describe(model, x).with_prior == 6


def test_features_of_torchvision():
    (model, *_), x = trained("residual"), images("residual", 2)
    extractor = create_feature_extractor(model, {"body.0": "features"})
    torch.testing.assert_close(extractor.eval()(x)["features"], model.body[0](model.stem(x)))


def test_torch_fx_traces_a_part_that_is_connected():
    part = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), input_stats=([0.0] * 3, [1.0] * 3))
    model = nn.Sequential(nn.ReLU(), part)
    traced, x = torch.fx.symbolic_trace(model), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(traced.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_torch_fx_traces_a_layer_with_its_activation():
    model = kn.connect(nn.Sequential(nn.Conv2d(3, 4, 3), kn.KalmanNormAct2d(4, act=nn.ReLU()), nn.Dropout(0.0)))
    traced, x = torch.fx.symbolic_trace(copy.deepcopy(model)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(kn.connect(traced)(x), model(x), rtol=0, atol=0)


def test_an_exported_network_trains_without_a_graph_that_grows():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), input_stats=(0.0, 1.0))
    graph = torch.export.export(model, (torch.randn(2, 3, 8, 8),)).module()
    graph(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert not any(buffer.requires_grad for buffer in graph.buffers())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)])
def test_torch_jit_trace_of_groups_is_told_what_to_do(norm):
    options = {"stats_batch_size": 1} if isinstance(norm, nn.BatchNorm2d) else {"layers": ("group",)}
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), norm), **options)
    with pytest.raises(TypeError, match=r"torch\.jit\.trace cannot trace the statistic groups of \w+ '1'"):
        torch.jit.trace(model, torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torch_jit_script_is_told_what_to_do():
    model, *_ = trained("residual")
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile KalmanNorm2d 'stem\.1', expected stock"):
        torch.jit.script(model)
    x = images("residual", 2)
    torch.testing.assert_close(torch.jit.script(kn.to_batchnorm(copy.deepcopy(model)))(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    ],
    ids=["pruned", "parametrized"],
)
def test_a_pruned_or_parametrized_layer_has_no_stock_layer_yet(change):
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    change(model[1])
    with pytest.raises(ValueError, match="'1' computes its weight or bias from other tensors"):
        kn.to_batchnorm(model)
    assert isinstance(model[1], kn.KalmanNorm2d)


def test_a_parametrized_process_noise_is_dropped_with_the_parameter():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    nn.utils.parametrize.register_parametrization(model[1], "process_noise", nn.Identity())
    assert type(kn.to_batchnorm(model)[1]) is nn.BatchNorm2d


def test_a_part_of_a_network_becomes_stock_again():
    part = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = kn.convert(nn.Sequential(part, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    kn.to_batchnorm(model[0])
    assert [type(layer) for layer in (model[0][1], model[2])] == [nn.BatchNorm2d, kn.KalmanNorm2d]
    with pytest.warns(UserWarning, match=r"1 of 2 Kalman layers of Sequential were replaced .* the first is '0\.1'"):
        model(torch.randn(4, 3, 12, 12)).sum().backward()
    assert model[2].running_mean.any()


def test_a_trace_through_a_forward_of_its_own_is_refused():
    class Doubled(kn.KalmanNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"torch.fx cannot trace the forward of Doubled, expected it to be a leaf"):
        torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4)))
