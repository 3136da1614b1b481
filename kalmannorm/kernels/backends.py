"""Which of the backends computes: `on_cpu`, `on_gpu` or `on_torch`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from kalmannorm.kernels import on_cpu, on_gpu, on_torch
from kalmannorm.kernels.memory_format import is_channels_last

_PLAIN_TENSORS = (Tensor, nn.Parameter)
# Types of an activation that compiled kernels take.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend_for(x: Tensor, *others: Tensor | None) -> ModuleType:
    """The backend with compiled kernels for a device and types, or `on_torch`."""
    device = x.device
    if type(x) not in _PLAIN_TENSORS or x.dtype not in _DTYPES or device.type not in ("cpu", "cuda"):
        return on_torch
    for t in others:
        if t is None:
            continue
        if t.dtype is not torch.float32 or type(t) not in _PLAIN_TENSORS or t.device != device:
            return on_torch
        if not t.is_contiguous() and not is_channels_last(t):  # a compiled kernel reads memory from its start on
            return on_torch
    backend: ModuleType = on_cpu if device.type == "cpu" else on_gpu
    return backend if backend.is_available() else on_torch
