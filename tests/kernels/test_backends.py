"""The kernels in C and by torch functions beside plain float64 expressions; what chooses between them."""

import pytest
import torch
from backend_cases import CASES, run

import kalmannorm as kn
from kalmannorm.kernels import backends, native, on_cpu, on_gpu, on_torch
from kalmannorm.kernels.backends import backend_for

# `link` casts weights before.
SMALL = [
    name for name, case in CASES.items()
    if not getattr(case, "tiny", False) and (case.dtype == torch.float32 or not name.startswith("link"))
]  # fmt: skip

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("name", SMALL)
def test_in_c(name):
    assert on_cpu.is_available()
    wrong = run(name, "cpu", on_cpu)
    assert not wrong, "\n".join(wrong)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["layer_large", "layer_groups_own_priors", "layer_channels_last_3d", "link_many_rows"])
def test_in_c_on_several_threads(name, threads):
    assert on_cpu.is_available()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wrong = run(name, "cpu", on_cpu)
    finally:
        torch.set_num_threads(before)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", SMALL)
def test_by_torch_functions(name):
    wrong = run(name, "cpu", on_torch)
    assert not wrong, "\n".join(wrong)


@needs_compiler
def test_a_constant_channel_sends_no_gradient_through_its_relu():
    """Both passes of the backward pass must take the same side of zero, or nothing cancels."""
    torch.manual_seed(0)
    layer = kn.KalmanNorm2d(64, gain=1.0)
    torch.nn.init.uniform_(layer.weight)
    x = (3 + torch.randn(1, 64, 1, 1)).expand(2, 64, 5, 5).contiguous().requires_grad_()
    model = kn.connect(torch.nn.Sequential(layer, torch.nn.ReLU(inplace=True)))
    model(x).sum().backward()
    assert x.grad.abs().max() < 1


class TestChoice:
    @needs_compiler
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_an_activation_of_single_or_half_precision_on_a_cpu_is_compiled(self, dtype):
        x = torch.randn(2, 3).to(dtype)
        assert backend_for(x, None, torch.ones(3)) is on_cpu
        assert backend_for(x, torch.nn.Parameter(torch.ones(3))) is on_cpu

    def test_other_types_are_not(self):
        assert backend_for(torch.randn(2, 3).double()) is on_torch
        for dtype in (torch.float64, torch.bfloat16):
            assert backend_for(torch.randn(2, 3), torch.ones(3).to(dtype)) is on_torch

    def test_other_devices_are_not(self):
        assert backend_for(torch.empty(2, 3, device="meta")) is on_torch
        assert backend_for(torch.ones(3), torch.empty(2, 3, device="meta")) is on_torch

    def test_a_gpu_has_kernels_of_its_own_unless_they_cannot_be_had(self, monkeypatch):
        class OnGpu:
            device, dtype = torch.device("cuda"), torch.float16

        monkeypatch.setattr(backends, "_PLAIN_TENSORS", (OnGpu,))
        monkeypatch.setattr(on_gpu, "is_available", lambda: True)
        assert backend_for(OnGpu()) is on_gpu
        monkeypatch.setattr(OnGpu, "dtype", torch.float64)
        assert backend_for(OnGpu()) is on_torch
        monkeypatch.setattr(OnGpu, "dtype", torch.bfloat16)
        monkeypatch.setattr(on_gpu, "is_available", lambda: False)
        assert backend_for(OnGpu()) is on_torch


@needs_compiler
class TestCompilation:
    """A folder of its own, so that nothing compiled before is found."""

    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("KALMANNORM_CACHE", str(tmp_path / "cache"))
        self.folder = tmp_path / "cache"

    def library(self):
        return native.library.__wrapped__()

    def test_a_library_is_kept(self):
        assert self.library() is not None
        (path,) = self.folder.iterdir()
        written = path.stat().st_mtime_ns
        assert self.library() is not None
        assert path.stat().st_mtime_ns == written

    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv("KALMANNORM_NATIVE", "0")
        assert self.library() is None
        assert not self.folder.exists()

    def test_without_a_compiler(self, monkeypatch):
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        assert self.library() is None

    def test_a_compiler_that_fails_leaves_nothing_behind(self, monkeypatch, tmp_path):
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CC", str(broken))
        assert self.library() is None
        assert not self.folder.exists() or not list(self.folder.iterdir())

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("KALMANNORM_CACHE", str(tmp_path / "file" / "cache"))
        assert self.library() is None
