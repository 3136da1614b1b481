"""The CUDA kernels beside plain float64 expressions: by Triton's interpreter, and on a GPU where there is one."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from backend_cases import CASES, LAYERS, LayerCase, run

from kalmannorm.kernels import on_gpu
from kalmannorm.kernels.arguments import Given, Options, Running

pytest.importorskip("triton")


def test_interpreted():
    """Triton interprets what is imported with its variable set, hence another process, for all cases at once."""
    chosen = [name for name, case in CASES.items() if name.startswith(("layer_tiled", "link")) or not case.tiny]
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "backend_cases.py", *chosen],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == chosen
    wrong = [f"{name}: {line}" for name, lines in found.items() for line in lines]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    assert on_gpu.is_available()
    wrong = run(name, "cuda")
    assert not wrong, "\n".join(wrong)


# ---- compiled for a GPU that isn't there ----


class _Compiled:
    """Stands for the module of kernels: a launch compiles for an H200, and keeps the assembly."""

    def __init__(self, module: types.ModuleType):
        self.module, self.assembly = module, {}

    def __getattr__(self, name):
        return _Launch(getattr(self.module, name), self.assembly)


class _Launch:
    def __init__(self, kernel, assembly):
        self.kernel, self.assembly = kernel, assembly

    def __getitem__(self, grid):
        assert len(grid) == 1
        assert 0 < grid[0] < 2**31
        return self._compile

    def _compile(self, *args, num_warps=4):
        assert len(args) == len(self.kernel.params)
        compiled = self.kernel.warmup(*args, grid=(1,), num_warps=num_warps)
        assert compiled.asm["cubin"]
        self.assembly[self.kernel.__name__] = compiled.asm["ptx"]


class _H200:
    """A driver, as far as Triton asks one before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch):
    from triton.backends.nvidia import compiler
    from triton.runtime import driver

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted")
    try:
        compiler.get_ptxas(90)
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(driver, "_active", _H200())
    modules = {name: _Compiled(on_gpu._kernels(name)) for name in ("triton_layer", "triton_link")}
    monkeypatch.setattr(on_gpu, "_kernels", modules.__getitem__)
    return modules


_FULL = Options(gain_slope=1.0, noise_scale=0.1, relu=True)
HELD = ["backward_kernel", "forward_kernel"]
TILED = [
    "apply_kernel", "fuse_kernel", "gradients_kernel", "input_gradient_kernel", "moments_kernel", "sums_kernel"
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        pytest.param(LayerCase((2, 8, 56, 56), _FULL, noise=True), HELD, id="held"),
        pytest.param(LayerCase((2, 8, 14, 14), dtype=torch.bfloat16, last=True), HELD, id="held_channels_last"),
        pytest.param(
            LayerCase((4, 3, 5, 5), Options(groups=2), prior_groups=None, affine="", sent=""),
            [*HELD, "running_kernel"], id="held_groups",
        ),
        pytest.param(LayerCase((8, 8, 64, 64), _FULL, noise=True), TILED, id="tiled"),
        pytest.param(LayerCase((8, 64, 64, 64), _FULL, torch.float16, True), TILED, id="tiled_channels_last"),
    ],
)  # fmt: skip
def test_layer_compiles(case, expected, compiled):
    channels, o = case.shape[1], case.options
    x = torch.empty(case.shape, dtype=case.dtype)
    x = x.contiguous(memory_format=torch.channels_last) if case.last else x
    c = torch.empty(channels)
    prior = None if case.prior_groups is None else torch.empty(2, case.prior_groups, channels)
    correction = c if case.corrected else None
    given = Given(
        prior, correction, correction, None if prior is None else c[:1], c if case.noise else None,
        c if case.affine else None, c if case.affine else None,
    )  # fmt: skip
    count = torch.tensor(0)
    y, statistics = on_gpu.layer_forward(x, given, Running(c, c, count, count, 0.1), o)
    sent = torch.empty(2, o.groups, channels) if case.sent else None
    gradients = on_gpu.layer_backward(y, x, given, statistics, sent, case.sent == "posterior", o)
    for gradient, t in zip(gradients, (x, prior, *given[3:]), strict=True):
        assert (None if gradient is None else gradient.shape) == (None if t is None else t.shape)
    assembly = compiled["triton_layer"].assembly
    assert sorted(assembly) == expected
    for name in {*HELD, *TILED} - {"fuse_kernel", "gradients_kernel"}:
        if name in assembly and channels % 8 == 0:
            assert "ld.global.v4" in assembly[name], f"{name} loads fewer than 16 bytes at once"


@pytest.mark.parametrize("shape", [(2, 8, 14, 14), (8, 8, 64, 64)], ids=["held", "tiled"])
def test_the_kernels_are_the_same_for_a_gain_of_any_batch_size(shape, compiled):
    """The heads of a detector get another number of regions at nearly each step."""
    c, count = torch.empty(8), torch.tensor(0)
    x, given = torch.empty(shape), Given(torch.empty(2, 1, 8), gain=c[:1], weight=c, bias=c)
    found = []
    for offset in (0.3, 0.7):
        options = Options(gain_slope=-1.0, gain_offset=offset)
        _, statistics = on_gpu.layer_forward(x, given, Running(c, c, count, count, 0.1), options)
        on_gpu.layer_backward(x, x, given, statistics, None, False, options)
        found.append(dict(compiled["triton_layer"].assembly))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("dtype", "last", "relu"),
    [(torch.float32, False, True), (torch.bfloat16, True, True), (torch.float32, True, False)],
)
def test_link_compiles(dtype, last, relu, compiled):
    weight = torch.empty(64, 32, 3, 3, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    below, above = torch.empty(2, 2, 32), torch.empty(2, 2, 64)
    _, rectified = on_gpu.link_forward(below, weight, above[0, 0], relu)
    d_below, d_weight = on_gpu.link_backward(below, weight, rectified, above, below if relu else None, relu)
    assert d_below.shape == (2, 2, 32)
    assert d_weight.stride() == weight.stride()
    assembly = compiled["triton_link"].assembly
    assert sorted(assembly) == ["contract_kernel", "moment_gradients_kernel", "weight_gradient_kernel"]
    assert "ld.global.v4" in assembly["contract_kernel"]


def test_walks_cover_an_activation_and_fit_a_program():
    shapes = [case.shape for case in LAYERS.values()]
    shapes += [(1, 3, 1024, 1023), (1, 64, 500, 500), (256, 2048, 7, 7), (32, 24, 56, 56), (2, 320, 16, 64, 64)]
    shapes += [(512, 1000), (70000, 3), (8, 512, 1024, 1024), (1, 64, 256, 512, 512)]
    for shape in shapes:
        for last in {False, len(shape) in {4, 5}}:
            for itemsize in (2, 4):
                walk = on_gpu._walk(shape, last, 1, itemsize)
                a, k, b, *_ = walk.tile
                channels, pixels, rows = walk.shape
                assert walk.tiles * a * b >= rows * pixels
                assert walk.programs * k >= channels
                assert walk.chunk * walk.chunks >= walk.tiles > walk.chunk * (walk.chunks - 1)
                assert a * b * k <= (on_gpu._HELD if walk.held else on_gpu._TILE // itemsize), (shape, walk)
                assert walk.tiles == 1 or not walk.held
                assert (a - 1) * channels * pixels + k * pixels + b < 2**31
