"""Products of activations, softmax and attention, against draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from drawing import agree, believe, check_alias, check_draws, check_unknown, covers, draw_through, values
from hypothesis import given
from hypothesis import strategies as st
from networks import made_of, prior_of
from torch import nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian, Shares
from kalmannorm.recording import Recorder, attach
from kalmannorm.rules import RULES, aliases


@covers(*aliases("matmul", "__matmul__", "mm"))
def test_products_with_a_matrix(function):
    check_draws(function, believe((2**18, 4), groups=2), values(4, 3), groups=2)


def test_products_of_sequences_with_a_matrix():
    check_draws(torch.matmul, believe((2**16, 5, 4), axes=(1, 2)), values(4, 3), channel=-1)
    check_alias(torch.Tensor.matmul, torch.matmul, believe((6, 5, 4), axes=(1, 2)), values(4, 3))


@covers(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, *aliases("bmm"))
@given(axes=st.sampled_from([(), (1,), (2,), (1, 2)]), groups=st.sampled_from([(1, 1), (2, 2), (1, 2), (4, 2)]))
def test_products_of_two_activations(function, axes, groups):
    """The elements of one product share their factors: they count as one."""
    x = believe((2**15, 3, 4), axes=axes, groups=groups[0])
    y = believe((2**15, 4, 5), seed=1, axes=axes, groups=groups[1])
    check_draws(function, x, y, effective=1 / 15, groups=groups[1])


def test_a_known_matrix_on_the_left():
    y, w = believe((2**15, 4, 5), axes=(1, 2)), values(3, 4)
    check_draws(torch.matmul, w, y, effective=1 / 5)
    other = RULES[torch.matmul](w, y.full([1, 2]))
    torch.testing.assert_close(other.mean, RULES[torch.matmul](w, y).mean)
    torch.testing.assert_close(other.var, RULES[torch.matmul](w, y).var)


def test_heads_and_constant_batches():
    q, k = believe((2**13, 2, 4, 3), axes=(1, 3)), believe((2**13, 2, 3, 6), seed=1, axes=(1, 2))
    check_draws(torch.matmul, q, k, effective=1 / 24)
    check_draws(torch.matmul, q, values(2, 3, 6), effective=1 / 6)
    check_draws(torch.matmul, q, values(1, 2, 3, 6), effective=1 / 6)


def test_products_without_a_rule():
    check_unknown("1-d", torch.matmul, believe((6, 4)), values(4))


@covers(*aliases("baddbmm", "addmm"))
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_baddbmm(function, beta):
    if "baddbmm" in function.__name__:
        x, y, given_ = believe((2**15, 3, 4)), believe((2**15, 4, 5), seed=1), believe((2**15, 3, 5), seed=2)
        check_draws(function, given_, x, y, beta=beta, alpha=0.7, effective=1 / 15)
    else:  # GPT-2's linear layer
        check_draws(function, values(5), believe((2**16, 4)), values(4, 5), beta=beta, alpha=0.7, effective=1 / 5)


@covers(*aliases("einsum"))
@pytest.mark.parametrize("equation", ["bhqd,bhkd->bhqk", "b h q d, b h k d -> b h q k", "...qd,...kd->...qk"])
def test_einsum_of_two_activations(function, equation):
    q, k = believe((2**13, 2, 4, 3), axes=(1, 3)), believe((2**13, 2, 5, 3), seed=1, axes=(1, 3), groups=2)
    _check_einsum(function, equation, q, k, effective=1 / 20, groups=2)
    again = RULES[function](equation, [q, k])
    assert torch.equal(again.mean, RULES[function](equation, q, k).mean)


def _check_einsum(function, equation, *operands, effective, groups=1):
    """As check_draws, but the first argument is no tensor."""
    belief, output = RULES[function](equation, *operands), draw_through(function, (equation, *operands), {})
    agree(Gaussian(belief.mean, belief.var, output.shape), output, groups, effective)


def test_einsum_with_a_known_tensor():
    x = believe((2**14, 2, 4, 3), axes=(1, 3))
    _check_einsum(torch.einsum, "bhqd,hdk->bhqk", x, values(2, 3, 5), effective=1 / 5)
    _check_einsum(torch.einsum, "bhqd,dk->bhqk", x, values(3, 5), effective=1 / 5)


def test_einsum_without_an_arrow():
    x, y = believe((6, 3)), believe((5, 3), seed=1)
    got, want = RULES[torch.einsum]("qd,kd", x, y), RULES[torch.einsum]("qd,kd->kq", x, y)
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.var, want.var)


def test_einsum_without_a_rule():
    x = believe((4, 3, 3))
    check_unknown("einsum of 3 operands", torch.einsum, "abc,abc,abc->a", x, x, x)
    check_unknown("along a diagonal", torch.einsum, "abb,abc->ac", x, x)


def _near(belief, output, tolerance):
    """For rules that are exact up to an integration error."""
    got, want = belief.per_channel(1), Gaussian.of_draws(output, 1)
    assert ((got.mean - want.mean).abs() <= tolerance * want.mean.abs() + 1e-3 * want.std).all(), (got.mean, want.mean)
    assert ((got.std / want.std - 1).abs() <= tolerance).all(), (got.std, want.std)


@covers(*aliases("softmax"))
@pytest.mark.parametrize(("n", "std"), [(2, 0.3), (2, 4.0), (16, 1.0), (16, 4.0), (64, 2.0)])
def test_softmax_of_alike_elements(function, n, std):
    x = Gaussian(torch.full((1, 1), 3.0), torch.full((1, 1), std**2), (2**22 // n, n))
    belief = RULES[function](x, 1)
    assert torch.allclose(belief.mean, torch.tensor(1 / n))
    _near(Gaussian(belief.mean, belief.var, (1, 1)), draw_through(function, (x, 1), {}).reshape(-1, 1), 0.02)


@covers(F.gumbel_softmax)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_gumbel_softmax(function, hard, tau):
    """Against draws; the noise counts as Gaussian."""
    x = believe((2**16, 5, 3), axes=(1,))
    belief = RULES[function](x, tau, hard, dim=1)
    assert isinstance(belief, Shares)
    assert belief.dim == 1
    drawn = draw_through(function, (x,), {"tau": tau, "hard": hard, "dim": 1})
    var, mean = torch.var_mean(drawn, (0, 2))
    torch.testing.assert_close(belief.mean.flatten(), mean, rtol=0.05, atol=0.01)
    torch.testing.assert_close(belief.var.flatten(), var, rtol=0.15, atol=0.006)


@covers(*aliases("softmin"))
def test_softmin(function):
    x = believe((8, 5))
    y, expected = RULES[function](x, 1), RULES[F.softmax](RULES[torch.neg](x).of(x.shape), 1)
    assert torch.equal(y.mean, expected.mean)
    assert torch.equal(y.var, expected.var)


@pytest.mark.parametrize("n", [2, 5, 16])
def test_softmax_of_different_elements(n):
    x = believe((2**22 // n, n))
    belief = RULES[torch.softmax](x, -1)
    torch.testing.assert_close(belief.mean.sum(), torch.tensor(1.0, dtype=torch.float64))
    _near(belief, draw_through(torch.softmax, (x, -1), {}), 0.03)


def test_softmax_along_the_channels_of_an_image():
    x = believe((2**10, 3, 16, 16), groups=2)
    check_draws(torch.softmax, x, 1, groups=2)


def test_softmax_of_a_large_map_has_one_mean():
    x = believe((2, 1, 64, 64), axes=(2, 3))
    belief = RULES[torch.softmax](x, -1)
    assert belief.mean.shape == (1, 1, 64, 1)
    torch.testing.assert_close(belief.mean, torch.full_like(belief.mean, 1 / 64))
    output = F.softmax(x.draw((2**9, 1, 64, 64)), -1)
    assert belief.var.mean().sqrt() == pytest.approx(output.std().item(), rel=0.1)


def test_softmax_of_one_element_and_of_anything_is_finite():
    one = RULES[torch.softmax](believe((8, 3, 1)), -1)
    assert torch.allclose(one.mean, torch.ones(()).double())
    assert (one.var < 1e-6).all()
    for mean, var in ((0.0, 0.0), (1e18, 1e36), (-1e18, 0.0), (0.0, 1e36)):
        x = Gaussian(torch.full((1, 2), mean, requires_grad=True), torch.full((1, 2), var, requires_grad=True), (4, 2))
        y = RULES[torch.softmax](x, 1)
        (y.mean.sum() + y.var.sum()).backward()
        for t in (y.mean, y.var, x.mean.grad, x.var.grad):
            assert t.isfinite().all()
    check_unknown("without a dim", F.softmax, believe((4, 3)))


def test_softmax_has_the_gradients_of_its_moments():
    torch.manual_seed(0)
    mean, var = torch.randn(1, 3).double().requires_grad_(), torch.rand(1, 3).double().requires_grad_()

    def moments(m, v):
        y = RULES[torch.softmax](Gaussian(m, v, (4, 3)), 1)
        return y.mean, y.var

    # The range of integration moves with the largest element, and that is no gradient.
    assert torch.autograd.gradcheck(moments, (mean, var), rtol=1e-2, atol=1e-3)


@covers(F.scaled_dot_product_attention)
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 1.0}, {"dropout_p": 0.3}, {"attn_mask": torch.zeros(16, 16).double()}],
    ids=["plain", "scale", "dropout", "mask"],
)
def test_attention(function, options):
    """Against draws of every token on its own, as the rule takes them."""
    q, k, v = (believe((2**12, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    q, k = (Gaussian(t.mean * 0.3, t.var, t.shape) for t in (q, k))
    belief = RULES[function](q, k, v, **options)
    assert belief.mean.shape == (1, 2, 1, 4)
    output = draw_through(function, (q, k, v), options)
    want_var, want_mean = torch.var_mean(output, (0, 2), keepdim=True)
    # Keys meet every query, which the rule does not know.
    assert ((belief.mean - want_mean).abs() < 0.05 * want_var.sqrt() + 0.02).all()
    assert ((belief.var / want_var - 1).abs() < 0.25).all(), belief.var / want_var


def test_attention_with_a_bias():
    q, k, v = (believe((2, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    plain = RULES[F.scaled_dot_product_attention](q, k, v)
    sharp = RULES[F.scaled_dot_product_attention](q, k, v, attn_mask=10 * values(2, 16, 16))
    assert (sharp.var > plain.var).all()


_PADDED = torch.arange(16) < torch.tensor([5, 16]).repeat(2**11)[:, None]  # (N, keys)
_TRIANGLE = torch.ones(16, 16, dtype=torch.bool).tril()
_BIAS = (values(16, 16) * 2).masked_fill(~_TRIANGLE, -math.inf)


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"attn_mask": _TRIANGLE}, {"attn_mask": _PADDED[:, None, None]}, {"attn_mask": _BIAS},
     {"attn_mask": torch.zeros(16, 16).double().masked_fill(~_TRIANGLE, -1e9), "dropout_p": 0.3}],
    ids=["causal", "triangle", "padding", "bias", "dropout"],
)  # fmt: skip
def test_attention_where_queries_meet_different_numbers_of_keys(options):
    q, k, v = (believe((2**12, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    q, k = (Gaussian(t.mean * 0.3, t.var, t.shape) for t in (q, k))
    belief = RULES[F.scaled_dot_product_attention](q, k, v, **options)
    output = draw_through(F.scaled_dot_product_attention, (q, k, v), options)
    want_var, want_mean = torch.var_mean(output, (0, 2), keepdim=True)
    assert ((belief.mean - want_mean).abs() < 0.05 * want_var.sqrt() + 0.02).all()
    assert ((belief.var / want_var - 1).abs() < 0.25).all(), belief.var / want_var


def test_masks_over_keys_whose_beliefs_differ():
    q, k, v = (believe((2**12, 2, 16, 4), seed=s, axes=(1, 2, 3)) for s in range(3))
    q, k = (Gaussian(t.mean * 0.3, t.var, t.shape) for t in (q, k))
    belief = RULES[F.scaled_dot_product_attention](q, k, v, is_causal=True)
    output = draw_through(F.scaled_dot_product_attention, (q, k, v), {"is_causal": True})
    belief = belief.pool([2])
    want_var, _ = torch.var_mean(output, (0, 2), keepdim=True)
    assert ((belief.var / want_var).log2().abs() < 0.8).all(), belief.var / want_var


def test_a_causal_mask_of_more_queries_than_keys():
    q, k, v = (believe((2, 2, n, 4), seed=s, axes=(1, 3)) for s, n in ((0, 16), (1, 4), (2, 4)))
    causal = RULES[F.scaled_dot_product_attention](q, k, v, is_causal=True)
    masked = RULES[F.scaled_dot_product_attention](q, k, v, attn_mask=torch.ones(16, 4, dtype=torch.bool).tril())
    torch.testing.assert_close((causal.mean, causal.var), (masked.mean, masked.var))


def test_masks_that_leave_all_keys_change_nothing():
    q, k, v = (believe((2, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    plain = RULES[F.scaled_dot_product_attention](q, k, v)
    for mask in (torch.ones(16, 16, dtype=torch.bool), torch.ones(2, 1, 1, 1, dtype=torch.bool)):
        masked = RULES[F.scaled_dot_product_attention](q, k, v, attn_mask=mask)
        torch.testing.assert_close((masked.mean, masked.var), (plain.mean, plain.var))


def test_queries_that_meet_no_key_leave_a_belief_finite():
    x = believe((2, 2, 4, 3), axes=(1, 3))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    assert RULES[F.scaled_dot_product_attention](x, x, x, attn_mask=mask).var.isfinite().all()


def test_attention_without_a_rule():
    x = believe((2, 2, 4, 3), axes=(1, 3))
    check_unknown("does not depend on the input", F.scaled_dot_product_attention, x, values(2, 2, 4, 3), x)


def test_baddbmm_with_a_known_summand():
    """As of a bias by distance (ALiBi)."""
    known, x, y = values(2, 3, 5), believe((2, 3, 4)), values(2, 4, 5)
    belief = RULES[torch.baddbmm](known, x, y, beta=0.5, alpha=2.0)
    product = RULES[torch.bmm](x, y)
    torch.testing.assert_close(belief.var.expand(2, 3, 5).mean(), 4 * product.var.expand(2, 3, 5).mean())
    expected = 0.5 * known.mean() + 2 * product.mean.expand(2, 3, 5).mean()
    torch.testing.assert_close(belief.mean.expand(2, 3, 5).mean(), expected)


def test_attention_with_a_bias_that_is_computed_from_the_input():
    """As of relative positions in a conformer: a belief about the scores' summand."""
    q, k, v = (believe((2, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    plain = RULES[F.scaled_dot_product_attention](q, k, v)
    wide = Gaussian(torch.zeros(1, 2, 1, 1).double(), torch.full((1, 2, 1, 1), 4.0).double(), (2, 2, 16, 16))
    sharp = RULES[F.scaled_dot_product_attention](q, k, v, attn_mask=wide)
    assert (sharp.var > plain.var).all()
    torch.testing.assert_close(sharp.mean, plain.mean)


@covers(*aliases("glu"))
@pytest.mark.parametrize("dim", [1, -2])
def test_glu(function, dim):
    check_draws(function, believe((2**14, 6, 8), groups=2), dim, groups=2)
    check_draws(function, believe((2**12, 3, 8), axes=(1, 2)), -1)


@covers(F.multi_head_attention_forward)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention(function, need_weights):
    """Against tokens drawn each on its own, in the layout ``(time, N, channels)`` of its function."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2).double()
    arguments = (8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0, layer.out_proj.weight,
                 layer.out_proj.bias)  # fmt: skip
    q, k, v = (believe((16, 2**11, 8), seed=s, axes=(2,)) for s in range(3))
    belief, weights = RULES[function](q, k, v, *arguments, need_weights=need_weights)
    assert belief.mean.shape == (1, 1, 8)
    assert "weights" in weights.reason
    with torch.no_grad():
        output, _ = function(*(x.draw(x.shape) for x in (q, k, v)), *arguments)
    want_var, want_mean = torch.var_mean(output, (0, 1))
    assert ((belief.mean[0, 0] - want_mean).abs() < 0.2 * want_var.sqrt() + 0.02).all()
    # Channels that one linear map made depend on each other, which the next one's rule does not know.
    assert ((belief.var[0, 0] / want_var).log2().abs() < 1).all(), belief.var[0, 0] / want_var
    check_unknown("another size", function, q, k, v, 8, 2, None, *arguments[3:])
    check_unknown("without a batch", function, q, values(16, 2, 8), v, *arguments)


@pytest.mark.parametrize("masked", [
    lambda x, mask: torch.softmax(x @ x.transpose(-1, -2) + mask, -1) @ x,
    lambda x, mask: torch.softmax(x @ x.transpose(-1, -2) + mask[0], -1) @ x,
])  # fmt: skip
def test_a_mask_of_minus_infinity_leaves_the_prior_finite(masked):
    def forward(self, x):
        mask = torch.full((5, 5), -math.inf).triu(1)
        return self.norm(masked(self.query(x), mask).transpose(1, 2))

    model = kn.convert(made_of(forward, query=nn.Linear(8, 8), norm=nn.BatchNorm1d(8)), input_stats=(0.0, 1.0))
    assert model(torch.randn(4, 5, 8)).isfinite().all()
    assert kn.describe(model, torch.randn(4, 5, 8)).with_prior == 1


def test_networks_with_multi_head_attention_have_priors_behind_it():
    model = made_of(
        lambda self, x: self.norm((x + self.attention(x, x, x)[0]).transpose(1, 2)),
        attention=nn.MultiheadAttention(8, 2, batch_first=True), norm=nn.BatchNorm1d(8),
    )  # fmt: skip
    model = kn.convert(model, input_stats=(0.0, 1.0))
    description = kn.describe(model, torch.randn(2, 5, 8))
    assert description.with_prior == 1, description


def test_glu_halves_the_last_axis_by_default():
    check_draws(F.glu, believe((2**12, 3, 8), axes=(1, 2)))


def test_softmin_counts_alike_elements():
    x = believe((8, 3, 5))
    torch.testing.assert_close(RULES[F.softmin](x, 2).mean, torch.full((1, 3, 1), 0.2).double())


def test_addmm_of_an_activation_and_two_known_matrices():
    check_draws(torch.addmm, believe((2**16, 4)), values(2**16, 2), values(2, 4), beta=0.5, alpha=2.0)


def test_baddbmm_ignores_its_input_for_a_beta_of_zero():
    nothing, x, y = torch.full((2, 3, 5), math.nan).double(), believe((2, 3, 4)), values(2, 4, 5)
    torch.testing.assert_close(RULES[torch.baddbmm](nothing, x, y, beta=0).mean, RULES[torch.bmm](x, y).mean)


def _heads(bias=0.0, **options):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2).double()
    nn.init.normal_(layer.in_proj_bias, 1, bias)
    nn.init.normal_(layer.out_proj.bias, 1, bias)
    x = believe((16, 2**8, 8), axes=(2,))
    arguments = {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0, **options}
    return x, lambda f, q: f(
        q,
        q,
        q,
        8,
        2,
        layer.in_proj_weight,
        layer.in_proj_bias,
        **arguments,
        out_proj_weight=layer.out_proj.weight,
        out_proj_bias=layer.out_proj.bias,
    )


def test_biases_of_multi_head_attention():
    """The weights add up to 1, so a bias of the values passes unchanged."""
    x, _ = _heads()
    bias, out = values(8), values(8, seed=1)
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2).double()
    rest = (None, None, False, 0.0, layer.out_proj.weight)
    plain, _ = RULES[F.multi_head_attention_forward](x, x, x, 8, 2, layer.in_proj_weight, None, *rest, None)
    biased, _ = RULES[F.multi_head_attention_forward](
        x, x, x, 8, 2, layer.in_proj_weight, torch.cat([torch.zeros(16).double(), bias]), *rest, out
    )
    torch.testing.assert_close(biased.mean[0, 0] - plain.mean[0, 0], layer.out_proj.weight @ bias + out)


@pytest.mark.parametrize(
    "options", [{"bias_k": torch.zeros(1, 1, 8), "bias_v": torch.zeros(1, 1, 8)}, {"add_zero_attn": True}]
)
def test_added_keys_are_unknown(options):
    x, call = _heads(**options)
    assert "with added ones" in call(RULES[F.multi_head_attention_forward], x).reason


def test_multi_head_attention_drops_nothing_in_evaluation():
    x, call = _heads()
    _, dropping = _heads(dropout_p=0.5, training=False)
    plain, _ = call(RULES[F.multi_head_attention_forward], x)
    assert torch.equal(dropping(RULES[F.multi_head_attention_forward], x)[0].var, plain.var)


@pytest.mark.parametrize("attn_kind", [None, "bool", "float", "heads"])
@pytest.mark.parametrize("padding_kind", [None, "bool", "float"])
def test_masks_of_multi_head_attention(attn_kind, padding_kind):
    """By how much they widen the output, as torch itself has it. True leaves a key out, of two kinds of masks."""
    left_out, padded = torch.ones(16, 16, dtype=torch.bool).triu(1), (torch.arange(16) >= 4).expand(2**8, 16)
    masks = {
        "attn_mask": {None: None, "bool": left_out, "heads": left_out.expand(2**9, 16, 16),
                      "float": torch.zeros(16, 16).double().masked_fill(left_out, -math.inf)}[attn_kind],
        "key_padding_mask": {None: None, "bool": padded,
                             "float": torch.zeros(2**8, 16).double().masked_fill(padded, -math.inf)}[padding_kind],
    }  # fmt: skip
    believed, drawn = [], []
    for options in ({}, masks):
        x, call = _heads(**options)
        believed.append(call(RULES[F.multi_head_attention_forward], x)[0].var.mean())
        with torch.no_grad():
            drawn.append(call(F.multi_head_attention_forward, x.draw(x.shape, torch.Generator().manual_seed(0)))[0]
                         .var((0, 1)).mean())  # fmt: skip
    widened = believed[1] / believed[0]
    assert (widened > 1.2) == (attn_kind is not None or padding_kind is not None)
    assert abs(widened / (drawn[1] / drawn[0]) - 1) < 0.25


def test_grouped_queries():
    """Heads of keys serve several heads of queries, in blocks."""
    q, k = believe((2, 4, 4, 3), axes=(1, 3)), believe((2, 2, 4, 3), axes=(1, 3))
    grouped = RULES[F.scaled_dot_product_attention](q, k, k, enable_gqa=True)
    repeated = k.map(lambda t: t.repeat_interleave(2, 1)).of((2, 4, 4, 3))
    expected = RULES[F.scaled_dot_product_attention](q, repeated, repeated)
    torch.testing.assert_close((grouped.mean, grouped.var), (expected.mean, expected.var))


def test_a_penalty_that_leaves_no_key_out_is_a_bias():
    x = believe((2, 2, 4, 3), axes=(1, 3))
    penalty = torch.zeros(4, 4).double().index_fill(1, torch.tensor([0]), -500.0)
    assert isinstance(RULES[F.scaled_dot_product_attention](x, x, x, attn_mask=penalty), Gaussian)


@pytest.mark.parametrize(("penalty", "leaves_out"), [(-9999.0, False), (-1e4, True), (-math.inf, True)])
def test_a_penalty_from_ten_thousand_on_leaves_out_keys(penalty, leaves_out):
    """As BERT's masks have it, and those of half precision; in a transform too, where nothing can be looked at."""
    mask = torch.zeros(4, 4).double().masked_fill(torch.ones(4, 4).triu(1) > 0, penalty)
    x = believe((2, 2, 4, 3), axes=(1, 3))
    found = RULES[F.scaled_dot_product_attention](x, x, x, attn_mask=mask)
    causal = RULES[F.scaled_dot_product_attention](x, x, x, is_causal=True)
    assert torch.allclose(found.var, causal.var) == leaves_out
    batched = torch.func.vmap(lambda m: RULES[F.scaled_dot_product_attention](x, x, x, attn_mask=m).var)(mask[None])
    torch.testing.assert_close(batched[0], found.var)


def test_dropout_of_attention_scales_the_values_common_mean():
    q, k, v = (believe((2**10, 2, 16, 4), seed=s, axes=(1, 3)) for s in range(3))
    v = Gaussian(v.mean + 10, v.var, v.shape)
    belief = RULES[F.scaled_dot_product_attention](q, k, v, dropout_p=0.5)
    output = draw_through(F.scaled_dot_product_attention, (q, k, v), {"dropout_p": 0.5})
    assert ((belief.var / output.var((0, 2), keepdim=True)).log2().abs() < 0.5).all()


def test_softmax_of_scores_of_a_large_deviation():
    """There the nodes of the integral would be too far apart: a part of the variance would be lost."""
    x = Gaussian(torch.zeros(1, 1).double(), torch.full((1, 1), 15.0**2).double(), (2**12, 64))
    drawn = torch.softmax(15 * torch.randn(2**12, 64, generator=torch.Generator().manual_seed(0)), 1).var()
    assert 0.8 < float(RULES[torch.softmax](x, 1).var / drawn) < 1.2


@pytest.mark.parametrize("by_hand", [
    lambda q, k, v: (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v,
    lambda q, k, v: torch.einsum("bqk,bkc->bqc", torch.einsum("bqc,bkc->bqk", q, k).mul(0.5).softmax(-1), v),
    lambda q, k, v: (v.mT @ (q @ k.mT * 0.5).softmax(-1).transpose(1, 2)).permute(0, 2, 1),
    lambda q, k, v: torch.einsum("bkc,qbk->bqc", v, F.softmax(q @ k.mT * 0.5, 2).cpu().movedim(1, 0)),
])  # fmt: skip
def test_attention_by_hand_is_as_torchs_own_function(by_hand):
    """Its weights add up to 1, so what all values share passes unchanged."""
    x = believe((2, 6, 4), axes=(2,))
    with Recorder():
        q, k, v = (F.linear(attached(x), values(4, 4, seed=s), values(4, seed=s + 5)) for s in range(3))
        found = prior_of(by_hand(q, k, v).transpose(1, 2), 1)
        expected = prior_of(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2), 1)
    torch.testing.assert_close((found.mean, found.var), (expected.mean, expected.var))


def test_attention_by_hand_is_the_same_without_gradients():
    found = []
    for grad in (True, False):
        with Recorder(), torch.set_grad_enabled(grad):
            q = attached(believe((2, 6, 4), axes=(2,)))
            found.append(prior_of(((q @ q.mT).softmax(-1) @ q).transpose(1, 2), 1).var)
    assert torch.equal(*found)


def test_a_softmax_along_another_axis_is_no_weight():
    """Its sum over the axis that is summed is not 1."""
    scores, v = believe((2, 6, 5), axes=(1, 2)), believe((2, 5, 4), 1, axes=(1, 2))
    weights = RULES[torch.softmax](scores, 1)
    plain = Gaussian(weights.mean, weights.var, weights.shape)
    assert torch.equal(RULES[torch.matmul](weights, v).var, RULES[torch.matmul](plain, v).var)


def attached(x):
    activation = torch.zeros(x.shape, dtype=x.mean.dtype)
    attach(activation, x, "layer")
    return activation
