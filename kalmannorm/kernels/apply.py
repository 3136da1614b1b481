"""How an autograd function is called: in eager mode, under torch.func, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["direct", "is_transformed"]


def is_transformed() -> bool:
    """Whether something other than the plain autograd engine derives what is computed now.

    ``torch.compile`` derives and fuses a backward pass by itself, and older releases trace a hand-written
    one wrongly. ``torch.func`` and forward-mode derivatives need functions that they know.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def direct(function: type[torch.autograd.Function], plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``function.apply``, a good deal faster, and the plain expression where the function is transformed.

    A function with ``setup_context`` has its arguments bound to the signature of ``forward`` at each
    call. That takes longer than the tiny operations of a belief; one whose ``forward`` takes the
    context itself is spared it.

    Args:
        function: with ``forward``, ``setup_context`` and ``backward``.
        plain: the same in functions that autograd knows; ``function.forward``, if that is so already.
    """
    plain = function.forward if plain is None else plain

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        backward = staticmethod(function.backward)

    def call(*args: Any) -> Any:
        return plain(*args) if is_transformed() else Direct.apply(*args)  # type: ignore[no-untyped-call]

    return call
