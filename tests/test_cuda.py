"""What only a GPU can show. ``KALMANNORM_TEST_DEVICE=cpu`` rehearses it without one.

On a machine with a GPU: ``python -m pytest tests/test_cuda.py``.
"""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import kalmannorm as kn

DEVICE = os.environ.get("KALMANNORM_TEST_DEVICE", "cuda")

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")


def net(classes=3):
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=classes)


def batch(samples=2, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, size, size, generator=generator), torch.arange(samples) % 3


@pytest.fixture
def _exact_matmul():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_exact_matmul")
@pytest.mark.parametrize(
    "options",
    [{}, {"stats_batch_size": 1}, {**kn.preset("released"), "estimator": "exact"}],
    ids=["default", "groups", "released"],
)
def test_equal_to_the_cpu(options):
    """Gradients and buffers of a step, in double precision; pairs of few pixels make much of rounding."""
    here = kn.convert(net().double(), input_stats=([0.0] * 3, [1.0] * 3), **options)
    there = copy.deepcopy(here).to(DEVICE)
    images, labels = batch()
    for model, device in ((here, "cpu"), (there, DEVICE)):
        F.cross_entropy(model(images.double().to(device)), labels.to(device)).backward()
    pairs = [(name, p.grad, q.grad) for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True)]
    pairs += [(name, a, b) for (name, a), b in zip(here.named_buffers(), there.buffers(), strict=True)]
    for name, a, b in pairs:
        error = (b.cpu() - a).double().norm() / a.double().norm().clamp_min(1e-3)
        assert error < 1e-5, f"{name}: off by {error:.1e}"


def test_gain_1_is_batch_norm():
    stock, ours = net().to(DEVICE).double(), kn.convert(net().to(DEVICE).double(), gain=1.0)
    images, labels = (t.to(DEVICE) for t in batch(4))
    losses = [F.cross_entropy(model(images.double()), labels) for model in (stock, ours)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mixed_precision_step_lowers_the_loss(dtype, memory_format):
    model = kn.convert(net()).to(DEVICE, memory_format=memory_format)
    images, labels = (t.to(DEVICE) for t in batch())
    images = images.contiguous(memory_format=memory_format)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler(DEVICE)
    losses, formats = [], []
    model.bn1.register_forward_hook(lambda _, args, y: formats.append(y.is_contiguous(memory_format=memory_format)))
    for _ in range(8):
        with torch.autocast(DEVICE, dtype):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert kn.first_nonfinite(model) is None
    assert all(formats)


def test_compiled_by_inductor():
    model = kn.convert(net()).to(DEVICE)
    compiled = copy.deepcopy(model)
    images, labels = (t.to(DEVICE) for t in batch())
    run = torch.compile(compiled, fullgraph=True)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            losses = [F.cross_entropy(f(images), labels) for f in (model, run)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_compiled_into_cuda_graphs():
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    model = kn.convert(net()).to(DEVICE)
    compiled = copy.deepcopy(model)
    run = torch.compile(compiled, mode="reduce-overhead")
    for step in range(5):
        images, labels = (t.to(DEVICE) for t in batch(seed=step))
        torch.compiler.cudagraph_mark_step_begin()
        losses = [F.cross_entropy(f(images), labels) for f in (model, run)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_captured_in_a_cuda_graph():
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    model = kn.convert(net(), input_stats=([0.0] * 3, [1.0] * 3)).to(DEVICE)
    eager = copy.deepcopy(model)
    images, labels = (t.to(DEVICE) for t in batch())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.load_state_dict(eager.state_dict())
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    graph.replay()
    expected = F.cross_entropy(eager(images), labels)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_captured_in_one_line(autocast):
    """Also what only a real graph can show: that gradients accumulate, and that a part takes beliefs along."""
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    eager = kn.convert(net(), input_stats=([0.0] * 3, [1.0] * 3)).to(DEVICE)
    whole, part = copy.deepcopy(eager), copy.deepcopy(eager)
    kn.capture(whole)
    kn.capture(part.layer2)
    images, labels = (t.to(DEVICE) for t in batch())
    losses = []
    for model in (eager, whole, part):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        of_model = []
        for number in range(8):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(images.roll(number, 0)), labels)
            loss.backward()
            of_model.append(loss.detach())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(torch.stack(of_model))
    assert len(whole.forward.graphs) == 1
    close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-3, "atol": 1e-4}
    for found in losses[1:]:
        torch.testing.assert_close(found, losses[0], **close)
    for model in (whole, part):
        for a, b in zip(eager.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(a, b, **close)


class Parts(nn.Module):
    """Bytes come in; rules that compute on the device, dropout and a recurrent layer follow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Dropout2d(0.2))
        self.body = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.Hardswish(),
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8),
            nn.Softmax(1), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        )  # fmt: skip
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.asks = False

    def forward(self, x):
        x = self.body(self.stem(x.permute(0, 3, 1, 2).float() / 255))
        if self.asks and x.mean().item() > 1e9:
            raise AssertionError
        return self.head(self.gru(x.flatten(2).mT)[0].mean(1))


@pytest.mark.usefixtures("_exact_matmul")
@pytest.mark.parametrize("options", [{}, {"stats_batch_size": 1, "layers": ("batch", "group")}, {"guard": 100.0}])
def test_captured_with_bytes_and_many_rules(options):
    eager = kn.convert(Parts(), input_stats=([0.5] * 3, [0.2] * 3), **options).to(DEVICE)
    eager.stem[3].p = 0.0
    captured = kn.capture(copy.deepcopy(eager))
    x = torch.randint(256, (4, 12, 12, 3), dtype=torch.uint8, device=DEVICE)
    losses = []
    for model in (eager, captured):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        of_model = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            of_model.append(loss.detach())
        losses.append(torch.stack(of_model))
    assert DEVICE != "cuda" or len(captured.forward.graphs) == 1
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-4)


def test_after_a_recording_that_failed_all_goes_on():
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    model = kn.capture(kn.convert(Parts(), input_stats=([0.5] * 3, [0.2] * 3)).to(DEVICE), warm_up=1)
    x = torch.randint(256, (4, 12, 12, 3), dtype=torch.uint8, device=DEVICE)
    model.asks = True
    model(x)
    with pytest.raises(RuntimeError, match="cannot record Parts"):
        model(x)
    assert torch.rand(4, device=DEVICE).isfinite().all()
    model.asks = False
    for _ in range(3):
        model(x).sum().backward()
    assert len(model.forward.graphs) == 1
    assert kn.first_nonfinite(model) is None


@pytest.mark.parametrize("method", ["bn", "gn", "brn", "mabn", "kn", "kn-paper"])
def test_a_captured_training_of_the_laboratory(method):
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    lightning = pytest.importorskip("lightning")
    from short_trainings import loader, quiet_trainer

    from kalmannorm.lab.curve import Curve
    from kalmannorm.lab.models.small import SmallConvNet
    from kalmannorm.lab.training import Classifier

    images, labels = torch.randn(32, 1, 32, 32), torch.randint(0, 10, (32,))
    losses = []
    for capture in (False, True):
        lightning.seed_everything(0, verbose=False)
        curve = Curve()
        options = {"normalization": method, "rate": 0.02, "steps": 12, "statistics_batch": 2, "capture": capture}
        module = Classifier(SmallConvNet(), num_classes=10, **options)
        quiet_trainer(12, curve, accelerator="gpu").fit(module, loader(images, labels, 8, 0))
        losses.append(torch.tensor(curve.losses))
    tolerance = 0.2 if method == "kn-paper" else 1e-2  # its draws differ
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="no NCCL")
def test_nccl_with_one_process(tmp_path):
    if DEVICE != "cuda":
        pytest.skip("NCCL is CUDA's")
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        alone, shared = (kn.convert(net(), **o).double().to(DEVICE) for o in ({}, {"process_group": group}))
        images = batch()[0].double().to(DEVICE)
        parallel = nn.parallel.DistributedDataParallel(shared, device_ids=[0])
        torch.testing.assert_close(parallel(images), alone(images), rtol=1e-6, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
