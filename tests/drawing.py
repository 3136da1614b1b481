"""Rules against draws through the real torch functions, and the list of functions so tested."""

import math

import pytest
import torch
from torch import Tensor

from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.propagation import exact, function_name
from kalmannorm.rules import RULES
from kalmannorm.steps import Step

# Elements to draw, as near as the shape allows.
DRAWS = 2**20

# Standard errors that a rule may be off.
ERRORS = 5

# Every function that some test was made for; test_table.py compares it with RULES.
COVERED = set()


def covers(*functions):
    """Run a test once for each torch function, handed to it as ``function``."""
    COVERED.update(functions)
    return pytest.mark.parametrize("function", functions, ids=[function_name(f) for f in functions])


def believe(shape, seed=0, groups=1, axes=(1,), dtype=torch.float64):
    """Some belief about an activation of ``shape``, that varies along ``axes`` and over the groups."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [groups, *(n if d in axes else 1 for d, n in enumerate(shape) if d > 0)]
    mean = torch.randn(sizes, generator=generator, dtype=dtype)
    var = 0.1 + 1.5 * torch.rand(sizes, generator=generator, dtype=dtype)
    return Gaussian(mean, var, shape)


def values(*sizes, seed=0):
    """Some weights."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + 1000), dtype=torch.float64)


def samples(elements_a_sample, groups=1, draws=DRAWS):
    """How many samples give about ``draws`` elements, in ``groups`` equal blocks."""
    return groups * max(2, draws // (elements_a_sample * groups))


def replaced(value, by):
    """``value`` with each Gaussian in it, in lists too, replaced."""
    if isinstance(value, Gaussian):
        return by(value)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(replaced(v, by) for v in value)
    return value


def draw_through(function, args, kwargs, seed=0):
    """Call the real function on draws; one belief that occurs twice is drawn once."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}

    def draw(x):
        if id(x) not in drawn:
            drawn[id(x)] = x.draw(x.shape, generator)
        return drawn[id(x)]

    args, kwargs = replaced(args, draw), {k: replaced(v, draw) for k, v in kwargs.items()}
    # For what is random itself: not the stream of the draws above, nor where the last test left it.
    torch.manual_seed(seed + 1)
    return function(*args, **kwargs)


def check_draws(function, *args, effective=1.0, crop=None, channel=1, groups=1, **kwargs):
    """A rule's moments lie within 5 standard errors of those of draws through its function.

    Args:
        function: the torch function.
        *args: its arguments, a Gaussian for each activation.
        effective: independent output values, as a share of all: less than 1 where windows overlap.
        crop: leaves out of the output what the rule says it ignores.
        channel: the output's channel axis.
        groups: statistic groups to compare one by one.
        **kwargs: its keyword arguments.
    """
    belief = RULES[function](*args, **kwargs)
    output = draw_through(function, args, kwargs)
    if isinstance(output, tuple):
        output = output[0]
    output = output if crop is None else crop(output)
    assert isinstance(belief, Gaussian), belief
    assert belief.mean.ndim == belief.var.ndim == output.ndim
    belief = belief.map(lambda t: t.movedim(channel, 1))
    output = output.movedim(channel, 1)
    scale = max(x.std.max().item() for x in _gaussians((args, tuple(kwargs.values()))))
    agree(Gaussian(belief.mean, belief.var, output.shape), output, groups, effective, scale)


def _gaussians(value):
    if isinstance(value, Gaussian):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _gaussians(v)


def agree(belief, output, groups=1, effective=1.0, scale=1.0):
    """A belief lies within 5 standard errors of the moments of draws ``(N, C, *)``.

    Events rarer than the draws can show are allowed for by a floor of two of them, of the input's
    ``scale``.
    """
    believed = belief.per_channel(groups)
    blocks = output.reshape(groups, -1, output.shape[1], math.prod(output.shape[2:]))
    count = blocks.shape[1] * blocks.shape[3]
    var, mean = torch.var_mean(blocks, (1, 3), correction=0, keepdim=True)
    fourth = (blocks - mean).square_().square_().mean((1, 3))
    var, mean = var[:, 0, :, 0], mean[:, 0, :, 0]
    n = count * effective
    mean_error = (var / n).sqrt() * ERRORS + 2 * scale / n + 1e-9 * (1 + mean.abs())
    var_error = ((fourth - var.square()).clamp_min(0) / n).sqrt() * ERRORS + 2 * scale**2 / n + 1e-9 * (1 + var)
    assert ((believed.mean - mean).abs() <= mean_error).all(), (believed.mean, mean, mean_error)
    assert ((believed.var - var).abs() <= var_error).all(), (believed.var, var, var_error)
    assert (believed.var >= 0).all()


def written_out(x, shape=None):
    """Mean and variance of every single element."""
    x = x if shape is None else Gaussian(x.mean, x.var, shape)
    full = x.full(range(x.ndim))
    return full.mean.contiguous(), full.var.contiguous()


def check_moved(function, *args, **kwargs):
    """A rule that only moves elements does to each element's moments what its function does."""
    result = RULES[function](*args, **kwargs)
    means = function(*replaced(args, lambda x: written_out(x)[0]), **kwargs)
    variances = function(*replaced(args, lambda x: written_out(x)[1]), **kwargs)
    if isinstance(means, Tensor):
        result, means, variances = [result], [means], [variances]
    assert len(result) == len(means)
    for belief, mean, var in zip(result, means, variances, strict=True):
        assert isinstance(belief, Gaussian), belief
        assert belief.mean.ndim == mean.ndim
        got = written_out(belief, mean.shape)
        assert got[0].shape == mean.shape
        assert torch.equal(got[0], mean)
        assert torch.equal(got[1], var)


def check_unknown(reason, function, *args, **kwargs):
    """A rule says why it does not follow."""
    belief = RULES[function](*args, **kwargs)
    assert isinstance(belief, Unknown)
    assert reason in belief.reason


def check_refused(function, *args, **kwargs):
    """The rule is not called, as an argument that must be known is a belief."""
    args, kwargs = replaced(args, _step), {name: replaced(value, _step) for name, value in kwargs.items()}
    belief = exact(Step(function, args, kwargs, ()))
    assert belief.reason == f"{function_name(function)} with an argument that is computed from the input"


def _step(belief):
    return Step(None, (), {}, belief.shape, belief=belief)


def check_alias(function, main, *args, **kwargs):
    """Two functions of one rule do the same with the same arguments, and so does the rule."""
    first, second = (draw_through(f, args, kwargs) for f in (function, main))
    assert torch.equal(first.to(second.dtype), second)
    first, second = (RULES[f](*args, **kwargs) for f in (function, main))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.var, second.var)
