"""How each torch function moves a belief: one pure function an operation, and a table of them."""

from kalmannorm.rules import (
    arithmetic,
    attention,
    linear,
    normalization,
    pointwise,
    pooling,
    rectified,
    recurrent,
    reductions,
    sampling,
    scatter,
    shape,
)  # fmt: skip
from kalmannorm.rules.table import RULES, Belief, Rule, aliases, rule

__all__ = [
    "RULES", "Belief", "Rule", "aliases", "arithmetic", "attention", "linear", "normalization", "pointwise", "pooling",
    "rectified", "recurrent", "reductions", "rule", "sampling", "scatter", "shape",
]  # fmt: skip
