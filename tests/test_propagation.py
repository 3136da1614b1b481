"""How beliefs travel, and that nothing of it stays behind."""

import copy
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import kalmannorm as kn
from kalmannorm.evaluation import prior_of
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.propagation import attach, is_open
from kalmannorm.steps import Step, step_of


def conv_net(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    )  # fmt: skip
    return kn.convert(model, **options)


class Net(nn.Module):
    """Two norms with ``between`` applied in the middle."""

    def __init__(self, between, channels=4, rank=4):
        super().__init__()
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[rank]
        self.first, self.second = norm(channels), norm(channels)
        self.between = between
        self.constant = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def prior_after(between, **kwargs):
    model = kn.convert(Net(between, **kwargs))
    return kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1]


def assign(net, y):
    z = torch.zeros(y.shape)
    z[:, :2] = y[:, :2]
    return z


def assign_through_a_view(net, y):
    y[:, :2][:, 1:] = y[:, 2:3]
    return y


def relu_on_a_view(net, y):
    y.view(2, 4, 36).relu_()
    return y


def overwrite_in_place(net, y):
    y *= 2
    return y.add_(1)


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (lambda net, y: y + net.constant, "Tensor.add"),
        (overwrite_in_place, "Tensor.add_"),
        (lambda net, y: F.interpolate(y, scale_factor=2), "nn.functional.interpolate"),
        (lambda net, y: torch.cat([y[:, 2:], y[:, :2]], 1), "cat"),
        (lambda net, y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), "Tensor.permute"),
        (lambda net, y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)), "Tensor.mul"),
        (lambda net, y: F.channel_shuffle(y, 2), "nn.functional.channel_shuffle"),
        (lambda net, y: y.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6), "Tensor.reshape"),
    ],
)
def test_a_belief_crosses(between, expected):
    row = prior_after(between)
    assert row.prior_from == ("first",)
    assert row.through[-1].endswith(expected)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda net, y: torch.cumsum(y, 1), "no rule for torch.cumsum"),
        (lambda net, y: 1 / y, "no rule for torch.Tensor.__rtruediv__"),
        (assign, "assigned in place"),
        (assign_through_a_view, "assigned in place"),
        (relu_on_a_view, "a view of it was changed in place"),
        (lambda net, y: torch.ones(2, 4, 6, 6), "does not depend on the network's input"),
        (lambda net, y: y + (y.cumsum(1) > 0), "no rule for torch.Tensor.cumsum"),
    ],
)
def test_what_cannot_be_followed_says_why(between, reason):
    row = prior_after(between)
    assert row.prior_from == ()
    assert reason in row.reason


def test_an_unknown_activation_is_not_taken_for_a_constant():
    """x + y with y of unknown belief: no prior, although y carries none."""
    row = prior_after(lambda net, y: y + torch.cumsum(y, 1))
    assert row.reason.startswith("no rule for")


def test_rules_for_a_residual_block_add_up():
    model = kn.convert(Net(lambda net, y: y + F.relu(y), channels=4), process_noise=False)
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
            lambda layer, args, e=estimator: priors.update({e: prior_of(args[0], 1, e)})
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
    row = prior_after_monte_carlo(lambda net, y: y.reshape(2, -1).reshape(2, 4, 6, 6))
    assert "fails on draws" in row.reason  # the batch size is written into the network


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
        lambda layer, args: seen.update(prior=prior_of(args[0], 1, "monte_carlo"))
    )
    model(torch.randn(2, 4, 32, 32))
    assert (seen["prior"].var > 0.2).all()


# -- opening and closing ---------------------------------------------------------------------------


def test_nothing_is_watched_in_eval():
    model = conv_net().eval()
    inside = []
    model[2].register_forward_hook(lambda *args: inside.append(is_open()))
    y = model(torch.randn(2, 3, 8, 8))
    assert inside == [False]
    assert step_of(y) is None


def test_group_layers_are_watched_in_eval_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
    model = kn.convert(model, layers=("group",))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    assert kn.describe(model, x).with_prior == 1


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_on_the_meta_device(estimator):
    model = conv_net(estimator=estimator).to("meta")
    y = model(torch.randn(2, 3, 8, 8, device="meta"))
    assert y.shape == (2, 4, 8, 8)
    y.sum().backward()
    assert kn.describe(model, torch.randn(2, 3, 8, 8, device="meta")).with_prior == 1


def test_an_error_in_the_middle_leaves_nothing_open():
    model, fresh = conv_net(), conv_net()
    x = torch.randn(2, 3, 8, 8)

    def fail(layer, args, output):
        raise RuntimeError("stop")

    handle = model[3].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    assert not is_open()
    handle.remove()
    fresh[1].load_state_dict(model[1].state_dict())
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)


def test_an_interrupt_leaves_the_mode_open_no_longer_than_to_the_next_call():
    model = conv_net()
    x = torch.randn(2, 3, 8, 8)

    def interrupt(layer, args, output):
        raise KeyboardInterrupt

    handle = model[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    model(x)
    assert not is_open()


def test_a_module_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))

        def forward(self, x, depth=2):
            if depth:
                x = self(self.norms[depth](x), depth - 1)
            return self.norms[0](x)

    model = kn.convert(Recursive())
    rows = {row.name: row for row in kn.describe(model, torch.randn(2, 3, 4, 4)).rows}
    assert rows["norms.1"].prior_from == ("norms.2",)
    assert not is_open()
    model(torch.randn(2, 3, 4, 4))  # warns where a layer sees no propagation
    assert not is_open()


def test_a_part_of_a_network_can_be_called_alone():
    model = nn.Sequential(conv_net(), nn.ReLU(), conv_net_like(4))
    kn.connect(model)
    x = torch.randn(2, 3, 8, 8)
    whole = model(x)
    kn_free = model[2](model[1](model[0](x)))
    assert whole.shape == kn_free.shape
    # Outside of the mode the belief is not followed through the ReLU; inside each part it is.
    assert step_of(model[0](x)) is not None
    assert not is_open()


def conv_net_like(channels):
    return kn.convert(nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))


def test_two_threads_do_not_see_each_other():
    results, barrier = {}, threading.Barrier(2)
    models = [conv_net(), conv_net()]  # made here, as all threads share one random state

    def work(key):
        model = models[key]
        model[2].register_forward_hook(lambda *args: (barrier.wait(10), None)[1])
        results[key] = model(torch.ones(2, 3, 8, 8) * torch.arange(8.0)).detach(), is_open()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    torch.testing.assert_close(results[0][0], results[1][0])
    assert not results[0][1]
    assert not is_open()


# -- gradients -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(4) for _ in range(3))
        self.use = use

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.use else block(x)
        return x


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.side, self.side_norm = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + self.side_norm(self.side(x)))


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_a_checkpoint_changes_no_bit(estimator):
    plain, saving = (kn.convert(Checkpointed(use), estimator=estimator) for use in (False, True))
    x = torch.randn(2, 3, 10, 10)
    outputs = []
    for model in (plain, saving):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_belief_asked_for_inside_a_checkpoint_and_after_it():
    """``norm(x + block(x))``: both ask for the belief of ``x``, the block twice."""

    class Both(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.block, self.norm, self.use = Residual(4), nn.BatchNorm2d(4), use

        def forward(self, x):
            x = self.stem(x)
            y = checkpoint(self.block, x, use_reentrant=False) if self.use else self.block(x)
            return self.norm(x + y)

    plain, saving = (kn.convert(Both(use)).double() for use in (False, True))
    x = torch.randn(2, 3, 10, 10).double()
    for model in (plain, saving):
        model(x).square().mul(torch.arange(64).view(8, 8)).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")


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


def test_a_state_that_feeds_itself_does_not_grow_without_end():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.state = torch.zeros(2, 4)

        def forward(self, x):
            y = self.norm(x)
            self.state = (self.state + y).detach()
            return y

    model = kn.convert(Recurrent())
    for _ in range(1500):  # two calls each
        model(torch.randn(2, 4))
    assert step_of(model.state).depth <= 2000


def test_no_memory_grows_over_200_steps():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x = torch.randn(2, 3, 8, 8)

    def count():
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(o), torch.Tensor | Step | Gaussian) for o in objects)

    counts = []
    for step in range(200):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step in (20, 199):
            counts.append(count())
    assert counts[1] <= counts[0]


def test_a_tensor_with_a_belief_can_be_saved_and_copied(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    y = conv_net()(x).detach()
    attach(x, Unknown("a test"), "input")
    attach(y, Gaussian(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)), "layer")
    torch.save([x, y], tmp_path / "tensors.pt")
    loaded = torch.load(tmp_path / "tensors.pt", weights_only=True)
    torch.testing.assert_close(loaded[0], x)
    assert step_of(loaded[1]) is None
    torch.testing.assert_close(copy.deepcopy(x), x)


def test_a_rule_of_the_wrong_kind_is_named():
    from kalmannorm.rules import RULES

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


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["output", "posterior"])
def test_compiles_as_one_graph_without_recompiling(carry):
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager = kn.convert(Checkpointed(False), carry=carry).double()
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 3, 10, 10, dtype=torch.float64)  # in double: rounding adds up over layers
        a, b = eager(x), fast(x)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for model, y in ((eager, a), (compiled, b)):
            model.zero_grad()
            y.square().sum().backward()
        for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
    assert counters["stats"]["unique_graphs"] == 1
    for p, q in zip(eager.buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert not is_open()


@pytest.mark.slow
def test_a_graph_break_in_the_middle_changes_nothing():
    import torch._dynamo

    class Break(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x * 1.0

    torch._dynamo.reset()
    model = Checkpointed(False)
    model.blocks.insert(1, Break())
    eager = kn.convert(model).double()
    compiled = copy.deepcopy(eager)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    a, b = eager(x), torch.compile(compiled, backend="aot_eager")(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
    assert not is_open()


def test_what_does_not_depend_on_values_is_a_constant():
    """Stochastic depth draws its mask by ``x.new_empty``."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.first(x)
            mask = x.new_empty((2, 1, 1, 1)).fill_(1.0)
            mask[0] = 0.0
            return self.second(x * mask + torch.zeros_like(x))

    model = kn.convert(Dropped())
    assert kn.describe(model, torch.randn(2, 4, 5, 5)).rows[1].through == (
        "torch.Tensor.mul", "torch.Tensor.add",
    )  # fmt: skip


def test_input_stats_reach_the_batch_of_a_detector():
    """Which gets a list of images of different sizes, and gives its first part a batch."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

        def forward(self, images):
            return self.backbone(torch.stack([image[:, :8, :8] for image in images]))

    model = kn.convert(Detector(), input_stats=([0.0] * 3, [1.0] * 3))
    rows = kn.describe(model, [torch.randn(3, 8, 9), torch.randn(3, 9, 8)]).rows
    assert [row.prior_from for row in rows] == [("input",), ("backbone.1",)]
    model([torch.randn(3, 8, 9)])  # the mode does not keep it
    assert kn.describe(model, [torch.randn(3, 8, 9), torch.randn(3, 9, 8)]).rows[0].prior_from == ("input",)
