"""The link, against the plain expression. The backends have tests of their own."""

import pytest
import torch
from drawing import values
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from kalmannorm.kernels.activation import rectify
from kalmannorm.kernels.link import link


def plain(moments, weight, bias, relu):
    after = torch.stack(rectify(*moments)) if relu else moments
    taps = weight.reshape(*weight.shape[:2], -1)
    mean, var = after
    out = torch.stack([mean @ taps.sum(-1).T + (0 if bias is None else bias), var @ taps.square().sum(-1).T])
    return (out, after) if relu else (out,)


def inputs(groups, ins, outs, taps=(), dtype=torch.float64):
    moments = torch.stack([values(groups, ins, seed=0), values(groups, ins, seed=1).square() + 0.1])
    tensors = (moments, values(outs, ins, *taps, seed=2), values(outs, seed=3))
    return [t.to(dtype).requires_grad_() for t in tensors]


def results(function, tensors, relu):
    """Outputs, and gradients for some gradient that comes in."""
    found = [t for t in function(*tensors, relu) if t is not None]
    incoming = [values(*o.shape, seed=7 + i).to(o.dtype) for i, o in enumerate(found)]
    given = [t for t in tensors if t is not None]
    return [*found, *torch.autograd.grad(found, given, incoming)]


@given(groups=st.integers(1, 4), ins=st.integers(1, 9), outs=st.integers(1, 9),
       taps=st.sampled_from([(), (1,), (3,), (2, 3), (1, 2, 2)]), relu=st.booleans(), bias=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float64]))  # fmt: skip
def test_any_size(groups, ins, outs, taps, relu, bias, dtype):
    tensors = inputs(groups, ins, outs, taps, dtype)
    tensors = tensors if bias else [*tensors[:2], None]
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for got, expected in zip(results(link, tensors, relu), results(plain, tensors, relu), strict=True):
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_and_gradgradcheck(groups, relu):
    def run(*tensors):
        return tuple(t for t in link(*tensors, relu) if t is not None)

    tensors = inputs(groups, 3, 2, (2,))
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


def test_the_rank_is_kept():
    moments, weight, _ = inputs(2, 3, 5, (3, 3))
    out, rectified = link(moments.view(2, 2, 3, 1, 1), weight, relu=True)
    assert out.shape == (2, 2, 5, 1, 1)
    assert rectified.shape == (2, 2, 3, 1, 1)


@pytest.mark.parametrize("relu", [False, True])
def test_only_one_moment_is_used(relu):
    """What nobody asked for has a gradient of zero, not none at all."""
    moments, weight, bias = inputs(1, 3, 2)
    ours = torch.autograd.grad(link(moments, weight, bias, relu)[0][1].sum(), (moments, weight))
    theirs = torch.autograd.grad(plain(moments, weight, bias, relu)[0][1].sum(), (moments, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_it_stays_one_operator(relu, dtype):
    tensors = inputs(2, 3, 5, (3,), dtype)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    run = torch.compile(lambda *t: tuple(link(*t, relu)), fullgraph=True, backend=backend)
    for got, expected in zip(results(lambda *t: run(*t[:3]), tensors, relu), results(link, tensors, relu), strict=True):
        torch.testing.assert_close(got, expected)
    assert sum("kalmannorm" in name and "link" in name for name in seen) == 1


def test_torch_knows_the_operators():
    moments, weight, bias = inputs(1, 3, 5, (3,), torch.float32)
    for relu in (False, True):
        torch.library.opcheck(torch.ops.kalmannorm.link.default, (moments, weight, bias, relu))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_of_a_larger_weight(compiled):
    moments, weight, bias = inputs(1, 4, 5, (3,), torch.float32)
    larger = torch.cat([weight.detach(), torch.randn(5, 2, 3)], 1)
    function = torch.compile(link, fullgraph=True, backend="aot_eager") if compiled else link
    ours = function(moments, larger[:, :4], bias, relu=True)
    for got, expected in zip(ours, link(moments, weight, bias, relu=True), strict=True):
        torch.testing.assert_close(got, expected)
