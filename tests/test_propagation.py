"""What a chain of steps comes to: by rules, by draws, with gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Net, conv_net, made_of, prior_after, prior_of
from torch import nn
from torchvision.ops import roi_align

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.rules import RULES


def test_rules_for_a_residual_block_add_up():
    model = kn.convert(Net(lambda net, y: y + F.relu(y).roll(1, 3), channels=4), process_noise=False)
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    seen = {}
    model.second.register_forward_pre_hook(lambda layer, args: seen.update(prior=prior_of(args[0], 1)))
    model(torch.randn(8, 4, 16, 16))
    # relu of N(0, 1): mean 1/sqrt(2 pi), variance 1/2 - 1/(2 pi)
    pi = torch.pi
    torch.testing.assert_close(seen["prior"].mean, torch.full((1, 4), (2 * pi) ** -0.5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen["prior"].var, torch.full((1, 4), 1.5 - 1 / (2 * pi)), rtol=1e-3, atol=1e-3)


def test_monte_carlo_approximates_exact():
    torch.manual_seed(0)
    priors = {}
    for estimator in ("exact", "monte_carlo"):
        model = conv_net(estimator=estimator)
        model[3].padding = (0, 0)  # its border is the one thing they differ in
        model[4].register_forward_pre_hook(
            lambda layer, args, e=estimator: priors.update({e: layer.belief(args[0], 1).per_channel(1)})
        )
        torch.manual_seed(1)
        model(torch.randn(2, 3, 128, 128))
    exact, drawn = priors["exact"], priors["monte_carlo"]
    torch.testing.assert_close(drawn.mean, exact.mean, rtol=0.05, atol=0.02)
    torch.testing.assert_close(drawn.var, exact.var, rtol=0.05, atol=0.02)


def test_monte_carlo_needs_no_rule():
    row = prior_after_monte_carlo(lambda net, y: torch.cumsum(y, 1))
    assert row.prior_from == ("first",)
    row = prior_after_monte_carlo(lambda net, y: y.clone() + F.relu(y, inplace=True))
    assert row.prior_from == ("first",)
    row = prior_after_monte_carlo(lambda net, y: y.unflatten(0, (2, 1)).flatten(0, 1))
    assert "fails on draws" in row.reason  # the batch size is written into the network


@pytest.mark.parametrize("between", [
    lambda net, y: y.view(4, 4, -1), lambda net, y: y.reshape((y.shape[0], 4, 36)),
    lambda net, y: y.view(4, -1).reshape(shape=(-1, 4, 36)), lambda net, y: y.view(16, 6, 6).view(-1, 4, 36),
])  # fmt: skip
def test_draws_keep_their_channels_where_a_batch_size_is_written_down(between):
    model = made_of(
        lambda self, x: self.second(between(self, self.first(x))), first=nn.BatchNorm2d(4), second=nn.BatchNorm1d(4)
    )
    model = kn.convert(model, estimator="monte_carlo", process_noise=False)
    expected = torch.tensor([-10.0, 0.0, 10.0, 20.0])
    model.first.bias.data.copy_(expected)
    seen = {}
    model.second.register_forward_pre_hook(lambda layer, args: seen.update(prior=layer.prior(args[0], 1)))
    model(torch.randn(4, 4, 6, 6))
    torch.testing.assert_close(seen["prior"].mean, expected[None], rtol=0, atol=1.0)
    assert seen["prior"].var.max() < 4


@pytest.mark.parametrize(("between", "reason"), [
    (lambda net, y: y.view(1, -1).view(2, 72, 2), "it puts several samples into one"),
    (lambda net, y: y.transpose(0, 1).reshape(2, -1, 2), "its draws have another shape than the activation"),
])  # fmt: skip
def test_draws_are_not_mixed(between, reason):
    model = Net(between)
    model.second = nn.BatchNorm1d(72)
    model = kn.convert(model, estimator="monte_carlo")
    assert reason in kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1].reason


@pytest.mark.parametrize(("norm", "shape"), [
    (nn.BatchNorm1d, (1, 4)), (nn.BatchNorm2d, (1, 4, 1, 1)), (nn.BatchNorm2d, (3, 4, 1, 1)),
])  # fmt: skip
@pytest.mark.parametrize("size", [None, 1])
def test_draws_of_one_value_a_channel_have_a_variance(norm, shape, size):
    options = {"estimator": "monte_carlo", "stats_batch_size": size, "input_stats": (0.0, 1.0)}
    model = kn.convert(nn.Sequential(norm(4), nn.ReLU(), norm(4)), **options)
    seen = {}
    model[2].register_forward_pre_hook(
        lambda layer, args: seen.update(prior=layer.prior(args[0], layer.statistic_groups(shape[0])))
    )
    model(torch.randn(shape))
    assert seen["prior"].var.mean() > 0.05


def test_a_torch_function_that_asserts_shapes_fails_on_draws_and_the_network_goes_on():
    """As `nn.MultiheadAttention` with a padding mask, whose first axis has the samples of the batch."""
    attention, padded = nn.MultiheadAttention(4, 2, batch_first=True), torch.zeros(2, 36, dtype=torch.bool)

    def between(net, y):
        tokens = y.flatten(2).transpose(1, 2)
        mixed, _ = attention(tokens, tokens, tokens, key_padding_mask=padded)
        return mixed.transpose(1, 2).unflatten(2, (6, 6))

    assert "fails on draws" in prior_after_monte_carlo(between).reason


def assigned(net, y):
    z = y.clone()
    z[:, :2] = 0.0
    return z


@pytest.mark.parametrize("between", [
    assigned, lambda net, y: F.grid_sample(y, torch.zeros(2, 6, 6, 2), align_corners=False),
    lambda net, y: roi_align(y, [torch.tensor([[0.0, 0, 6, 6]])] * 2, 6),
])  # fmt: skip
def test_places_in_these_samples_are_not_those_of_draws(between):
    """An index of a sample may lie outside of the draws, which `roi_align` does not check."""
    assert "is told places in these samples" in prior_after_monte_carlo(between).reason


def prior_after_monte_carlo(between):
    model = kn.convert(Net(between), estimator="monte_carlo")
    return kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1]


def test_draws_are_not_changed_by_functions_that_work_in_place():
    def between(net, y):
        rectified = F.relu(y)
        return y.mul_(0) + rectified  # the product is evaluated first, and must leave the draws of y to the ReLU

    model = kn.convert(Net(between), estimator="monte_carlo", process_noise=False)
    seen = {}
    model.second.register_forward_pre_hook(
        lambda layer, args: seen.update(prior=layer.belief(args[0], 1).per_channel(1))
    )
    model(torch.randn(2, 4, 32, 32))
    assert (seen["prior"].var > 0.2).all()


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_on_the_meta_device(estimator):
    model = conv_net(estimator=estimator).to("meta")
    y = model(torch.randn(2, 3, 8, 8, device="meta"))
    assert y.shape == (2, 4, 8, 8)
    y.sum().backward()
    assert kn.describe(model, torch.randn(2, 3, 8, 8, device="meta")).with_prior == 1


def test_features_computed_without_grad_give_none_to_the_backbone():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = kn.convert(nn.ModuleList([backbone, head]))
    with torch.no_grad():
        features = model[0](torch.randn(2, 3, 8, 8))
    model[1](features).square().sum().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert head[0].weight.grad is not None


def test_detach_cuts_the_belief_too():
    model = kn.convert(Net(lambda net, y: y.detach()), process_noise=False)
    model(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert model.first.weight.grad is None
    assert model.second.weight.grad.any()


def test_a_rule_of_the_wrong_kind_is_named():
    @kn.rule(torch.frac)
    def wrong(x):
        return x.mean

    try:
        with pytest.raises(TypeError, match=r"the rule for torch.frac returned Tensor, expected Gaussian or Unknown"):
            prior_after(lambda net, y: torch.frac(y))
        kn.rule(torch.frac)(lambda x: Gaussian(x.mean[0], x.var[0]))
        with pytest.raises(ValueError, match=r"the rule for torch.frac returned a belief of shape \(4, 1, 1\)"):
            prior_after(lambda net, y: torch.frac(y))
        kn.rule(torch.frac)(lambda x: x)
        assert prior_after(lambda net, y: torch.frac(y)).through == ("torch.frac",)
    finally:
        del RULES[torch.frac]


def test_layers_may_draw_in_groups_of_different_sizes():
    def forward(self, x):
        x = self.conv(self.first(x))
        return self.batch(x), self.group(x)

    model = made_of(
        forward, first=nn.BatchNorm2d(2), conv=nn.Conv2d(2, 4, 1), batch=nn.BatchNorm2d(4), group=nn.GroupNorm(2, 4)
    )
    model = kn.convert(model, layers=("batch", "group"), estimator="monte_carlo")
    for y in model(torch.randn(3, 2, 8, 8)):
        assert y.isfinite().all()


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_who_asks_first_without_gradients_takes_none_from_the_others(mode, estimator):
    def gradient(asks_before):
        torch.manual_seed(0)
        stem = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), estimator=estimator)
        teacher, student = (
            kn.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), estimator=estimator) for _ in range(2)
        )
        h = stem(torch.randn(2, 3, 8, 8))
        if asks_before:
            with mode():
                torch.manual_seed(1)
                teacher(h)
        torch.manual_seed(1)
        student(h).pow(3).sum().backward()
        return stem[1].weight.grad, student[1].process_noise.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_hook_that_asks_without_gradients_takes_none_from_its_layer():
    """A step's belief has the step's gradients, whoever asks for it first."""
    parts = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = kn.convert(nn.Sequential(*parts), input_stats=([0.0] * 3, [1.0] * 3))
    asked = copy.deepcopy(model)
    asked[4].register_forward_pre_hook(torch.no_grad()(lambda layer, args: (layer.belief(args[0], 1), None)[1]))
    x = torch.randn(2, 3, 8, 8)
    for each in (model, asked):
        each(x).pow(3).sum().backward()
    torch.testing.assert_close(asked[1].bias.grad, model[1].bias.grad)


def test_what_was_called_without_gradients_gives_none_to_the_layers_below():
    def between(net, y):
        with torch.no_grad():
            return y.clone()

    model = kn.convert(Net(between))
    model(torch.randn(2, 4, 6, 6)).pow(3).sum().backward()
    assert model.first.bias.grad is None
    assert model.second.process_noise.grad.any()


def test_a_rule_without_memory_ends_the_call(monkeypatch):
    def rule(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setitem(RULES, F.silu, rule)
    with pytest.raises(torch.OutOfMemoryError):
        prior_after(lambda net, y: F.silu(y))


@pytest.mark.parametrize("name", ["paper", "released"])
def test_draws_that_lose_an_axis_give_no_prior(name):
    """`squeeze` and `unbind` see one drawn map, where the batch has several samples."""
    for between in (
        lambda net, y: F.adaptive_avg_pool2d(y, 1).squeeze()[:, :, None, None],
        lambda net, y: torch.stack([F.relu(t) for t in y]),
        lambda net, y: torch.stack([F.relu(t) for t in y.unbind(0)]),
    ):
        model = kn.convert(Net(between), **kn.preset(name))
        model(torch.randn(2, 4, 6, 6)).sum().backward()
        assert model.second.weight.grad.isfinite().all()
    model = Net(lambda net, y: F.avg_pool2d(y, (1, 6)).squeeze())
    model.second = nn.BatchNorm1d(4)
    model = kn.convert(model, **kn.preset(name))
    reason = kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1].reason
    assert reason == "torch.Tensor.squeeze gives draws of another rank than the activation's"


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_filters_makes_no_difference(scale):
    """As with BatchNorm: the process noise is a share of what is predicted."""

    def output(scale):
        model = conv_net(input_stats=(0.0, 1.0))  # from a seed
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight.data.mul_(scale)
                nn.init.zeros_(layer.bias)
            layer.eps = 1e-20
        return model(torch.randn(2, 3, 8, 8))

    torch.testing.assert_close(output(scale), output(1.0), rtol=1e-3, atol=1e-4)
