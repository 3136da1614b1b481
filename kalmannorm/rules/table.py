"""The table from a torch function to the rule that moves a belief through it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from kalmannorm.gaussian import Gaussian, Unknown

__all__ = ["BELIEF_FIRST", "FACTORIES", "LIKE", "RULES", "Belief", "Rule", "aliases", "rule"]

Belief = Gaussian | Unknown
Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)

RULES: dict[Callable[..., Any], Rule] = {}
# Rules that say, by annotation, that their first argument is a belief: they are not asked about a known one.
BELIEF_FIRST: set[Rule] = set()

_HOMES = (torch, torch.Tensor, torch.nn.functional, torch.special)


def rule(*functions: Callable[..., Any]) -> Callable[[_R], _R]:
    """Teach the library how a torch function moves a belief.

    The decorated rule is called as the function was, with a :class:`Gaussian` in the place of each
    tensor that carries a belief, and returns the Gaussian of the output (a tuple of them where the
    function returns several tensors), or an :class:`Unknown` that says why there is none. Tensors
    that don't depend on the network's input, weights for one, arrive as they are. A rule taught
    later replaces the one before.

    Args:
        functions: the torch functions it stands for: what ``torch.overrides`` calls them, so a
            method and a function of one name are two.

    Raises:
        TypeError: where something that cannot be called is given.

    Example:
        >>> import torch, kalmannorm as kn
        >>> @kn.rule(torch.nn.functional.glu)
        ... def glu(x, dim=-1):
        ...     return kn.Unknown("halves of a GLU depend on each other")
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"kn.rule takes torch functions, got {function!r}")

    def register(decorated: _R) -> _R:
        first = next(iter(inspect.signature(decorated).parameters.values()), None)
        if first is not None and first.annotation in (Gaussian, "Gaussian"):
            BELIEF_FIRST.add(decorated)
        for function in functions:
            RULES[function] = decorated
        return decorated

    return register


def aliases(*names: str) -> list[Callable[..., Any]]:
    """Every function and method of torch that goes by one of ``names``."""
    found = [getattr(home, name, None) for name in names for home in _HOMES]
    return list(dict.fromkeys(function for function in found if callable(function)))


# What these return has an activation's shape, type or device, but does not depend on its values: masks of
# dropped paths, zeros to pad with.
FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    aliases("new_empty", "new_full", "new_ones", "new_zeros", "empty_like", "full_like", "ones_like", "zeros_like",
            "rand_like", "randn_like", "randint_like")
)  # fmt: skip

# These take a shape or a type from their second argument, and values from the first alone.
LIKE: frozenset[Callable[..., Any]] = frozenset(aliases("expand_as", "reshape_as", "view_as", "type_as", "to"))
