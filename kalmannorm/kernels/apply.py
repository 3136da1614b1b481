"""How an autograd function is called: in eager mode, under functorch, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["direct"]


def direct(function: type[torch.autograd.Function], plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``function.apply``, a good deal faster in eager mode, and out of the compiler's way.

    A function with ``setup_context``, which functorch asks for, has its arguments bound to the signature
    of ``forward`` at each call. That takes longer than the tiny operations of a belief; one whose
    ``forward`` takes the context itself is spared it. ``torch.compile`` derives and fuses a backward pass
    by itself, and older releases trace a hand-written one wrongly: it gets the plain expression.

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
        if torch.compiler.is_compiling():
            return plain(*args)
        functorch = torch._C._are_functorch_transforms_active()
        return (function if functorch else Direct).apply(*args)  # type: ignore[no-untyped-call]

    return call
