"""The table from a torch function to the rule that moves a belief through it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from kalmannorm.gaussian import Gaussian, Unknown

__all__ = [
    "BELIEF_FIRST", "DEFERRING", "FACTORIES", "LIKE", "OVERWRITING", "RULES", "SOURCES", "Belief", "Rule", "aliases",
    "as_rule_is_called", "rule",
]  # fmt: skip

Belief = Gaussian | Unknown
Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)

RULES: dict[Callable[..., Any], Rule] = {}
# Rules that say, by annotation, that their first argument is a belief: they are not asked about a known one.
BELIEF_FIRST: set[Rule] = set()
# What starts a belief of its own, as it takes no activation.
SOURCES: set[Callable[..., Any]] = set()
# Rules that only note what is to be computed, and by which arguments they do.
DEFERRING: dict[Rule, Callable[..., bool]] = {}
# The names of a rule's parameters, and how many it takes by position; None for any. Noted when it is taught, as a
# compiler cannot ask for them.
_TAKES: dict[Rule, tuple[frozenset[str] | None, int | None]] = {}
# What torch calls the first and the second argument of a function: a rule has names of its own.
_TORCHS_NAMES = (("input", "self", "tensor", "tensors", "inputs"), ("other", "mat2", "size", "shape", "repeats"))

_LISTED: set[Callable[..., Any]] = {
    function for functions in torch.overrides.get_overridable_functions().values() for function in functions
}

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
        >>> @kn.rule(torch.cumprod)
        ... def cumprod(x, dim):
        ...     return kn.Unknown("products of ever more elements")
    """
    for function in functions:
        if not callable(function):
            raise TypeError(f"kn.rule takes torch functions, got {function!r}")

    def register(decorated: _R) -> _R:
        parameters = list(inspect.signature(decorated).parameters.values())
        if parameters and parameters[0].annotation in (Gaussian, "Gaussian"):
            BELIEF_FIRST.add(decorated)
        kinds = [p.kind for p in parameters]
        names = None if inspect.Parameter.VAR_KEYWORD in kinds else frozenset(p.name for p in parameters)
        positions = sum(kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
        _TAKES[decorated] = names, None if inspect.Parameter.VAR_POSITIONAL in kinds else positions
        for function in functions:
            RULES[function] = decorated
        _show_to_compilers(functions)
        return decorated

    return register


def _show_to_compilers(functions: Sequence[Callable[..., Any]]) -> None:
    """Have torch.compile ask modes about these functions, as eager torch does. It goes by a list of torch's own that
    lacks some: ``hardswish``, ``hardsigmoid``, ``relu_``.
    """
    missing = [function for function in functions if function not in _LISTED]
    if not missing:
        return
    _LISTED.update(missing)
    torch.overrides.get_overridable_functions()[torch.nn.functional].extend(missing)
    compiler: Any = sys.modules.get("torch._dynamo.variables.torch")
    if compiler is not None:  # it keeps a copy
        compiler.get_overridable_functions.cache_clear()


def as_rule_is_called(rule: Rule, args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:  # fmt: skip
    """The arguments of a function as its rule takes them: ``add(input=x, other=y)`` is the rule's ``add(x, y)``.

    Args:
        rule: the function's.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        Both, changed where that is needed; None for arguments that the rule does not know.
    """
    names, positions = _TAKES.get(rule, (None, None))
    if not kwargs:  # nearly always
        return (args, kwargs) if positions is None or len(args) <= positions else None
    for place, of_torch in enumerate(_TORCHS_NAMES):
        for name in of_torch:
            if len(args) == place and name in kwargs and (names is None or name not in names):
                kwargs = dict(kwargs)
                args = (*args, kwargs.pop(name))
    if positions is not None and len(args) > positions:
        return None
    if names is not None and not all(name in names for name in kwargs):
        return None
    return args, kwargs


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

# These change a tensor in place, and their rules do not ask for what it was: its first argument, or zeros.
OVERWRITING: frozenset[Callable[..., Any]] = frozenset(
    aliases("copy_", "scatter_add_", "index_add_", "scatter_", "scatter_reduce_", "index_reduce_")
)

# These take a shape or a type from their second argument, and values from the first alone.
LIKE: frozenset[Callable[..., Any]] = frozenset(aliases("expand_as", "reshape_as", "view_as", "type_as", "to"))
