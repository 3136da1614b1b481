"""Sums, products, the larger of two and dropout against draws."""

import operator

import pytest
import torch
import torch.nn.functional as F
from drawing import agree, believe, check_alias, check_draws, check_unknown, covers, draw_through, values
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES, aliases

SHAPE = (2**13, 3, 16, 8)
ADDS = aliases("add", "add_", "__add__", "__radd__", "__iadd__")
SUBS = aliases("sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__")
RSUBS = aliases("rsub", "__rsub__")
MULS = aliases("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")
DIVS = aliases("div", "div_", "divide", "divide_", "true_divide", "__truediv__", "__itruediv__")

# What may stand on the other side; each is known, or a belief of its own.
OPERANDS = {
    "number": lambda seed: -1.7,
    "whole number": lambda seed: 2,
    "0-d": lambda seed: values(seed=seed),
    "one element": lambda seed: values(1, seed=seed),
    "channels": lambda seed: values(3, 1, 1, seed=seed),
    "channels of a batch": lambda seed: values(1, 3, 1, 1, seed=seed),
    "pixels": lambda seed: values(16, 8, seed=seed),
    "map": lambda seed: values(1, 3, 16, 8, seed=seed),
    "activation": lambda seed: believe(SHAPE, seed + 1),
    "activation in groups": lambda seed: believe(SHAPE, seed + 1, groups=2),
    "activation in four groups": lambda seed: believe(SHAPE, seed + 1, groups=4),
    "alike in all channels": lambda seed: believe(SHAPE, seed + 1, axes=()),
}
_KNOWN = [name for name in OPERANDS if "activation" not in name and "alike" not in name]

_operands = st.sampled_from(sorted(OPERANDS))
_seeds = st.integers(0, 1000)


@covers(torch.add, torch.sub, torch.mul)
@given(kind=_operands, seed=_seeds, groups=st.integers(1, 2))
def test_two_operands(function, kind, seed, groups):
    x, y = believe(SHAPE, seed, groups), OPERANDS[kind](seed)
    check_draws(function, x, y, groups=2)
    if isinstance(y, torch.Tensor | Gaussian):
        check_draws(function, y, x, groups=2)


@covers(torch.add, torch.sub, torch.rsub)
@given(kind=_operands, seed=_seeds, alpha=st.floats(-2, 2))
def test_alpha(function, kind, seed, alpha):
    check_draws(function, believe(SHAPE, seed), OPERANDS[kind](seed), alpha=alpha)


@pytest.mark.parametrize("kind", _KNOWN)
@covers(torch.div)
def test_division_by_what_is_known(function, kind):
    y = OPERANDS[kind](5)
    y = y.abs() + 0.5 if isinstance(y, torch.Tensor) else y
    check_draws(function, believe(SHAPE, 1, 2), y, groups=2)


@pytest.mark.parametrize("axes", [(), (1,), (2,), (1, 2), (1, 2, 3)])
def test_gates(axes):
    """One value for each sample and channel, for each channel, for each pixel."""
    x = believe(SHAPE, 1, 2)
    gate = believe(tuple(n if d == 0 or d in axes else 1 for d, n in enumerate(SHAPE)), 2, 2, axes)
    # A gate that meets many pixels is drawn once for all of them.
    share = 1 if len(axes) == 3 else 1 / (16 * 8) if 2 not in axes else 1 / 8
    share = share if 1 in axes or not axes else share / 3
    for function in (torch.mul, torch.add):
        check_draws(function, x, gate, groups=2, effective=share)


def test_ranks_broadcast():
    x, bias = believe((2**16, 5, 3), axes=(1, 2)), values(3)
    for function in (torch.add, torch.mul, torch.sub):
        check_draws(function, x, bias, channel=-1)
        check_draws(function, bias, x, channel=-1)
    check_draws(torch.add, believe((2**16, 5), axes=()), believe((2, 2**16, 5), axes=()), effective=0.25, channel=2)


@covers(*ADDS, *SUBS, *RSUBS, *MULS, *DIVS)
def test_aliases(function):
    families = {torch.add: ADDS, torch.sub: SUBS, torch.rsub: RSUBS, torch.mul: MULS, torch.div: DIVS}
    main = next(main for main, family in families.items() if function in family)
    x = believe((40, 3, 4, 2))
    for other in (1.5, values(3, 1, 1)):
        check_alias(function, main, x, other)
    if function not in DIVS:
        check_alias(function, main, x, believe((40, 3, 4, 2), 7))


@covers(*aliases("addcmul", "addcmul_", "lerp", "lerp_"))
def test_sums_of_products(function):
    x, y, by = believe(SHAPE), believe(SHAPE, 7), values(3, 1, 1, seed=3)
    if "lerp" in function.__name__:
        for weight in (0.3, by.sigmoid()):
            check_draws(function, x, y, weight)
        assert torch.equal(RULES[function](x, x, 0.5).var, x.var)
        check_unknown("an interpolation by an activation", function, x, y, believe(SHAPE, 8))
    else:
        for first, second in ((y, by), (by, y), (by, by), (y, believe(SHAPE, 8))):
            check_draws(function, x, first, second, value=0.7)


@covers(*aliases("addcdiv", "addcdiv_"))
def test_sums_of_quotients(function):
    x, y, by = believe(SHAPE), believe(SHAPE, 7), values(3, 1, 1, seed=3).abs() + 0.5
    for first in (y, by):
        check_draws(function, x, first, by, value=0.7)


@pytest.mark.parametrize("function", [torch.addcmul, torch.addcdiv])
def test_one_and_the_same_activation_in_a_sum_of_products(function):
    x, by = believe((2**18, 3), 3), values(3).abs() + 0.5
    check_draws(function, x, x, by, value=0.7)
    check_draws(function, by, x, by, value=0.7)
    if function is torch.addcmul:
        check_draws(function, x, by, x, value=0.7)
        check_draws(function, x, x, x, value=0.3)
        check_draws(function, by, x, x, value=0.3)
        check_draws(function, x, x, believe((2**18, 3), 4), value=0.7)


def test_aliases_take_alpha():
    x, y = believe((40, 3)), believe((40, 3), 7)
    for function, main in ((torch.Tensor.add_, torch.add), (torch.Tensor.sub_, torch.sub)):
        check_alias(function, main, x, y, alpha=0.3)


class _Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operation", [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    operator.itruediv, operator.pow, lambda x, y: y + x, lambda x, y: y - x, lambda x, y: y * x,
    lambda x, y: -x, lambda x, y: abs(x), lambda x, y: x @ torch.ones(3, 3), lambda x, y: x[:, :2],
    lambda x, y: x.T, lambda x, y: x.mT, lambda x, y: x.data,
])  # fmt: skip
def test_operators_are_in_the_table(operation):
    """What the propagation sees when a network is written with operators."""
    with _Recorder() as recorder:
        operation(torch.ones(3, 3), 2)
    calls = [f for f in recorder.called if f is not torch.ones]
    assert calls
    assert all(f in RULES for f in calls), calls


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.rsub, torch.mul])
def test_one_and_the_same_activation_on_both_sides(function):
    x = believe((2**18, 3), 3)
    check_draws(function, x, x)
    if function is not torch.mul:
        check_draws(function, x, x, alpha=0.6)


@covers(*aliases("neg", "neg_", "negative", "__neg__"))
def test_negative(function):
    check_draws(function, believe((2**16, 3), groups=2), groups=2)


@covers(torch.div)
def test_division_by_an_activation(function):
    """Right where it varies little, as norms and deviations do; finite where it passes through zero."""
    x, y = believe((2**16, 3), groups=2), believe((2**16, 3), 1)
    narrow = Gaussian(10 + y.mean.abs(), 0.01 * y.var, y.shape)
    for numerator in (x, values(3), 2.0):
        found, drawn = RULES[function](numerator, narrow), draw_through(function, (numerator, narrow), {})
        torch.testing.assert_close(found.mean.mean(0), drawn.mean(0), rtol=0.02, atol=2e-3)
        if numerator is x:
            torch.testing.assert_close(found.var.mean(0), drawn.view(2, -1, 3).var(1).mean(0), rtol=0.05, atol=0)
    under = RULES[function](x, Gaussian(-narrow.mean, narrow.var, y.shape))
    torch.testing.assert_close(under.mean, -RULES[function](x, narrow).mean)
    nothing = RULES[function](x, Gaussian(torch.zeros(1, 3), torch.zeros(1, 3), y.shape))
    assert nothing.mean.isfinite().all()
    check_unknown("rounds", function, x, 2.0, rounding_mode="floor")


@covers(*aliases("__rtruediv__"))
def test_a_number_over_an_activation(function):
    x = believe((2**16, 3), groups=2)
    check_draws(function, Gaussian(10 + x.mean.abs(), x.var, x.shape), 3.0, groups=2)


@covers(torch.maximum, torch.minimum)
@given(kind=st.sampled_from([k for k in OPERANDS if k not in ("map", "pixels")]), seed=_seeds, groups=st.integers(1, 2))
def test_the_larger_and_the_smaller_of_two(function, kind, seed, groups):
    """But for known pixels, which are summarized: their values are not normal."""
    x, y = believe(SHAPE, seed, groups), OPERANDS[kind](seed)
    if isinstance(y, torch.Tensor | Gaussian):
        check_draws(function, x, y, groups=2)
        check_draws(function, y, x, groups=2)
    itself = RULES[function](x, x)
    assert torch.equal(itself.mean, x.mean)
    assert torch.equal(itself.var, x.var)


@covers(*aliases("maximum", "fmax", "minimum", "fmin"))
def test_other_names_of_the_larger_and_the_smaller(function):
    main = torch.maximum if "max" in function.__name__ else torch.minimum
    for other in (believe((40, 3, 4, 2), 7), values(3, 1, 1)):
        check_alias(function, main, believe((40, 3, 4, 2)), other)


def test_the_larger_of_two_that_lie_far_apart_is_the_one():
    far, near = believe((4, 3)), believe((4, 3), 1)
    far = Gaussian((1e4 + far.mean).float(), far.var.float())
    larger = RULES[torch.maximum](near.map(torch.Tensor.float), far)
    assert torch.equal(larger.mean, far.mean)
    torch.testing.assert_close(larger.var, far.var)


# -- dropout -----------------------------------------------------------------------------------------

_CHANNEL_WISE = [f for n in ("dropout1d", "dropout2d", "dropout3d", "feature_dropout") for f in aliases(n)]


@covers(*(f for f in aliases("dropout", "dropout_")))
@given(p=st.floats(0, 0.9), seed=_seeds)
def test_dropout(function, p, seed):
    check_draws(function, believe((2**18, 3), seed, 2), p, True, groups=2)


@covers(*_CHANNEL_WISE)
@given(p=st.floats(0, 0.9), seed=_seeds)
def test_dropout_of_channels(function, p, seed):
    rank = {F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}.get(function, 2)
    shape = (2**17, 3, *[2] * rank)
    check_draws(function, believe(shape, seed, 2), p, True, groups=2, effective=1 / 2**rank)


@covers(*aliases("dropout", "dropout_"), *_CHANNEL_WISE)
def test_dropout_at_its_ends(function):
    x = believe((8, 3, 4, 4))
    for p, training in ((0.5, False), (0.0, True)):
        y = RULES[function](x, p, training)
        assert torch.equal(y.mean, x.mean)
        assert torch.equal(y.var, x.var)
    nothing = RULES[function](x, 1.0, True)
    assert not nothing.mean.any()
    assert not nothing.var.any()


def test_a_difference_of_packed_beliefs():
    x, y = believe((4, 3)).packed(), believe((4, 3), 1).packed()
    torch.testing.assert_close(RULES[torch.sub](x, y).mean, x.mean - y.mean)


@covers(*aliases("logical_and", "logical_and_", "bitwise_and", "bitwise_and_", "__and__", "__iand__", "logical_or",
                 "logical_or_", "bitwise_or", "bitwise_or_", "__or__", "__ior__"))  # fmt: skip
def test_two_masks(function):
    x, y = believe((2**16, 3), groups=2), believe((2**16, 3), 5, groups=2)
    known = torch.tensor([True, False, True])
    drawn = draw_through(lambda x, y: (function(x > 0, y > 0.5).double(), function(x > 0, known).double()), (x, y), {})
    masks = RULES[torch.gt](x, 0.0), RULES[torch.gt](y, 0.5)
    for belief, each in zip((RULES[function](*masks), RULES[function](masks[0], known)), drawn, strict=True):
        agree(Gaussian(belief.mean, belief.var, each.shape), each, 2)


@covers(*aliases("logical_not", "logical_not_", "bitwise_not", "bitwise_not_", "__invert__"))
def test_the_opposite_of_a_mask(function):
    x = believe((2**16, 3), groups=2)
    drawn = draw_through(lambda x: function(x > 0).double(), (x,), {})
    belief = RULES[function](RULES[torch.gt](x, 0.0))
    agree(Gaussian(belief.mean, belief.var, drawn.shape), drawn, 2)


@covers(*aliases("eq", "ne", "not_equal"), torch.Tensor.__eq__, torch.Tensor.__ne__)
def test_equality_of_what_has_a_density(function):
    x = believe((2**10, 3))
    belief, drawn = RULES[function](x, 0.5), draw_through(function, (x, 0.5), {})
    assert torch.equal(belief.mean, drawn.double().mean(0, keepdim=True))
    assert (belief.var == 0).all()


@covers(*aliases("heaviside"))
def test_spikes(function):
    check_draws(function, believe((2**16, 3), groups=2), torch.zeros(()).double(), groups=2)


def test_comparisons_without_a_variance_have_slopes():
    mean, var = torch.tensor([[-1.0, 0.0, 200.0]], requires_grad=True), torch.zeros(1, 3, requires_grad=True)
    y = RULES[torch.gt](Gaussian(mean, var), 0.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad((y.mean + y.var).sum(), [mean, var]))


@covers(*aliases("gt", "ge", "greater", "greater_equal", "lt", "le", "less", "less_equal"),
        *(getattr(torch.Tensor, name) for name in ("__gt__", "__ge__", "__lt__", "__le__")))  # fmt: skip
def test_comparisons(function):
    x = believe((2**16, 3), groups=2)
    for other in (0.3, values(3), believe((2**16, 3), 5, groups=2)):
        belief, drawn = RULES[function](x, other), draw_through(function, (x, other), {})
        agree(Gaussian(belief.mean, belief.var, drawn.shape), drawn.double(), 2)


@pytest.mark.parametrize("function", [torch.eq, torch.ne])
def test_two_activations_may_be_equal(function):
    """As a peak is to the largest around it."""
    check_unknown("two activations are equal", function, believe((4, 3)), believe((4, 3), seed=1))
