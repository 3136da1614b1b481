"""A sum over processes, with its gradient: the sum of the processes' gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.process_group = process_group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(d_total, ctx.process_group), None


def all_reduce(tensor: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """The sum of tensors of one shape over the processes of a group. Each must call it, and run its backward."""
    result: Tensor = _AllReduce.apply(tensor, process_group)  # type: ignore[no-untyped-call]
    return result
