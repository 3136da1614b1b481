"""How an activation lies in memory, and in which type."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(t: Tensor) -> bool:
    """Whether channels lie innermost; not where that makes no difference."""
    if t.ndim not in _CHANNELS_LAST or t.is_contiguous():
        return False
    if torch._C._are_functorch_transforms_active():  # vmap cannot tell, in a compiled call neither
        return False
    return t.is_contiguous(memory_format=_CHANNELS_LAST[t.ndim])


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type; itself, where it has that already, which torch takes longer to find."""
    return t if t.dtype is dtype else t.to(dtype)


def as_dense(t: Tensor) -> Tensor:
    """The tensor in one block of memory, channels first or last; itself, where it is that already."""
    return t if t.is_contiguous() or is_channels_last(t) else t.contiguous()


def dense(t: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another one, which is dense; itself, where it is that already."""
    if t.stride() == like.stride():
        return t
    return t.contiguous(memory_format=_CHANNELS_LAST[like.ndim] if is_channels_last(like) else torch.contiguous_format)
