"""The table from a torch function to the rule that moves a belief through it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import MethodWrapperType
from typing import Any, TypeVar

import torch

from kalmannorm.gaussian import Gaussian, Unknown

Belief = Gaussian | Unknown
Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)

RULES: dict[Callable[..., Any], Rule] = {}
# Rules whose first argument must carry a belief: they are not called if it is a known tensor.
BELIEF_FIRST: set[Rule] = set()
# Rules that take no belief in another place: they are not called with a weight that is computed from the input.
BELIEF_ALONE: set[Rule] = set()
# Functions whose output has a belief though no argument has one.
SOURCES: set[Callable[..., Any]] = set()
# The names of a rule's parameters and the number of positional ones; None for any. Stored at registration, since
# torch.compile cannot trace inspect.signature.
_TAKES: dict[Rule, tuple[frozenset[str] | None, int | None]] = {}
# Torch's names for the first and the second argument of a function. A rule may name them differently.
_TORCHS_NAMES = (("input", "self", "tensor", "tensors", "inputs"), ("other", "mat2", "size", "shape", "repeats"))

_LISTED: set[Callable[..., Any]] = {
    function for functions in torch.overrides.get_overridable_functions().values() for function in functions
}

_HOMES = (torch, torch.Tensor, torch.nn.functional, torch.special)


def rule(*functions: Callable[..., Any], belief_first: bool = False) -> Callable[[_R], _R]:
    """Teach the library how a torch function moves a belief.

    The library calls the decorated rule as the function was called, with a :class:`Gaussian` in the
    place of each tensor that carries a belief. The rule returns the Gaussian of the output (a tuple of
    them if the function returns several tensors), or an :class:`Unknown` that says why there is none.
    Tensors that don't depend on the network's input, such as weights, stay as they are. A later rule
    for the same function replaces an earlier one.

    Args:
        functions: torch functions as ``torch.overrides`` sees them, so a function and a method of the
            same name are two.
        belief_first: The rule takes a belief as its first argument, not a known tensor. The output of a
            call with a known tensor there has no belief, and the rule is not called.

    Raises:
        TypeError: If a function is not callable.

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
        parameters = inspect.signature(decorated).parameters
        kinds = [p.kind for p in parameters.values()]
        names = None if inspect.Parameter.VAR_KEYWORD in kinds else frozenset(parameters)
        positions = sum(kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
        _TAKES[decorated] = names, None if inspect.Parameter.VAR_POSITIONAL in kinds else positions
        if belief_first:
            BELIEF_FIRST.add(decorated)
        RULES.update(dict.fromkeys(functions, decorated))
        _show_to_compilers(functions)
        return decorated

    return register


def belief_rule(*functions: str | Callable[..., Any]) -> Callable[[_R], _R]:
    """As :func:`rule`, for functions whose first argument alone carries a belief; a name stands for all of its
    :func:`aliases`.
    """
    listed = [f for each in functions for f in (aliases(each) if isinstance(each, str) else [each])]

    def register(decorated: _R) -> _R:
        BELIEF_ALONE.add(decorated)
        return rule(*listed, belief_first=True)(decorated)

    return register


def belief_rules(how: str, rules: dict[str, Rule], alone: bool = True) -> None:
    """As :func:`belief_rule`, for rules of one expression, by the names of their functions with spaces in between.

    If not ``alone``, any argument may be a belief, as with :func:`rule`.
    """
    for names, each in rules.items():
        each.__name__, *_ = names.split()
        each.__doc__ = f"``{each.__name__}``, {how}."
        (belief_rule(*names.split()) if alone else rule(*aliases(*names.split())))(each)


def _show_to_compilers(functions: Sequence[Callable[..., Any]]) -> None:
    """Make torch.compile dispatch these functions to modes, as eager torch does.

    It goes by a list of overridable functions, which lacks ``hardswish``, ``hardsigmoid`` and ``relu_``.
    """
    missing = [function for function in functions if function not in _LISTED]
    if not missing:
        return
    _LISTED.update(missing)
    torch.overrides.get_overridable_functions()[torch.nn.functional].extend(missing)
    compiler: Any = sys.modules.get("torch._dynamo.variables.torch")
    if compiler is not None:  # it caches the list
        compiler.get_overridable_functions.cache_clear()


def as_rule_is_called(rule: Rule, args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:  # fmt: skip
    """Translate the arguments of a call to those of its rule: ``add(input=x, other=y)`` is the rule's ``add(x, y)``.

    Returns positional and keyword arguments for the rule, or None if it does not take them.
    """
    names, positions = _TAKES.get(rule, (None, None))
    if kwargs and (names is None or not all([name in names for name in kwargs])):  # seldom
        for place, of_torch in enumerate(_TORCHS_NAMES):
            for name in of_torch:
                if len(args) == place and name in kwargs and (names is None or name not in names):
                    kwargs = dict(kwargs)
                    args = (*args, kwargs.pop(name))
        if names is not None and not all([name in names for name in kwargs]):
            return None
    return (args, kwargs) if positions is None or len(args) <= positions else None


def aliases(*names: str) -> list[Callable[..., Any]]:
    """All functions and methods of torch that have one of these names.

    Looked up in ``torch``, ``torch.Tensor``, ``torch.nn.functional`` and ``torch.special``.
    """
    found = [getattr(home, name, None) for name in names for home in _HOMES]
    # A module too is compared by `__eq__` and the like.
    return list(dict.fromkeys(f for f in found if callable(f) and not isinstance(f, MethodWrapperType)))


# Their output has an activation's shape, type or device, but does not depend on its values: masks of dropped paths,
# zeros to pad with.
FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    aliases("empty", "zeros", "new_empty", "new_full", "new_ones", "new_zeros", "empty_like", "full_like", "ones_like",
            "zeros_like", "rand_like", "randn_like", "randint_like")
)  # fmt: skip

# Factories of tensors that hold zeros, or nothing yet: `x[i] = y` fills them.
BLANK: frozenset[Callable[..., Any]] = frozenset(
    aliases("empty", "empty_like", "new_empty", "new_zeros", "zeros", "zeros_like")
)

# Functions with an index. One that is computed from activations, such as that of the nearest neighbours, is taken as
# independent of what it picks.
PICKING: frozenset[Callable[..., Any]] = frozenset(
    aliases("__getitem__", "__setitem__", "embedding", "gather", "index_add", "index_add_", "index_select",
            "max_unpool1d", "max_unpool2d", "max_unpool3d", "scatter_add", "scatter_add_", "scatter_reduce",
            "scatter_reduce_", "take_along_dim")
)  # fmt: skip

# Functions that read a map at places, and the position of that argument: it stays as it is, as an index does.
PLACES: dict[Callable[..., Any], int] = {}

# In-place functions whose rules work if the tensor that changes was a known one.
OVERWRITING: frozenset[Callable[..., Any]] = frozenset(
    aliases("copy_", "scatter_add_", "index_add_", "scatter_", "scatter_reduce_", "index_reduce_")
)

# They take a shape or a type from their second argument, and values from the first alone.
LIKE: frozenset[Callable[..., Any]] = frozenset(aliases("expand_as", "reshape_as", "view_as", "type_as", "to"))
