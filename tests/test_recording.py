"""How beliefs travel."""

import copy
import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Checkpointed, Net, conv_net_like, made_of, prior_after, prior_of
from torch import nn

import kalmannorm as kn
from kalmannorm import rules
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.propagation import belief_for, exact
from kalmannorm.recording import Recorder, attach, is_open
from kalmannorm.steps import Step, ancestors, step_of


def assign(net, y):
    z = torch.zeros(y.shape)
    z[:, :2] = y[:, :2]
    z[:, 2:3, 1:] = y[:, :1, :-1]
    return z


def assign_into(z, number=None):
    """Assign an activation to a part of ``z``, perhaps after a number."""

    def between(net, y):
        target = z.clone() if z.numel() > 0 else torch.zeros(y.shape)
        if number is not None:
            target[:, 3] = number
        target[:, :2] = y[:, :2]
        return target

    return between


def assign_by_a_tensor(net, y):
    y[:, torch.tensor([0, 1])] = y[:, 2:] * 2
    return y


def put_into_rows(net, y):
    z = torch.zeros(4, 4, 6, 6)
    z.index_put_((torch.tensor([0, 2]),), y)
    z[torch.tensor([1])] = y[:1]
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
        (assign, "Tensor.__setitem__"),
        (put_into_rows, "Tensor.__setitem__"),
        (lambda net, y: y[y.mean((1, 2, 3)).argsort()], "Tensor.__getitem__"),
        (lambda net, y: y.gather(3, index=y.argsort(3)), "Tensor.gather"),
        (lambda net, y: y.max(3, keepdim=True)[0], "Tensor.max"),
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
        (lambda net, y: 1 // y, "no rule for torch.Tensor.__rfloordiv__"),
        (assign_into(torch.ones(2, 4, 6, 6)), "what held no zeros"),
        (assign_into(torch.empty(0), 5.0), "what held no zeros"),
        (assign_through_a_view, "to a view"),
        (assign_by_a_tensor, "other than by numbers, slices"),
        (lambda net, y: torch.ones(2, 4, 6, 6)[y.mean((1, 2, 3)).argsort()], "no rule for torch.Tensor.argsort"),
        (relu_on_a_view, "a view of it was changed in place"),
        (lambda net, y: torch.ones(2, 4, 6, 6), "does not depend on a floating-point input"),
        (lambda net, y: y + (y.cumsum(1) > 0), "no rule for torch.Tensor.cumsum"),
    ],
)
def test_what_cannot_be_followed_says_why(between, reason):
    row = prior_after(between)
    assert row.prior_from == ()
    assert reason in row.reason


def test_an_assignment_is_believed_as_it_was_made():
    """Zeros where nothing was assigned, and a tensor that does not hold itself."""
    seen = []

    def between(net, y):
        z = assign(net, y)
        seen.append((prior_of(y, 1), prior_of(z, 1), weakref.ref(z)))
        return z

    model = kn.convert(Net(between))
    nn.init.normal_(model.first.bias)
    model(torch.randn(2, 4, 6, 6))
    before, after, target = seen.pop()
    assert target() is None
    torch.testing.assert_close(after.mean[0, :2], before.mean[0, :2])
    torch.testing.assert_close(after.mean[0, 2], before.mean[0, 0] * 5 / 6)
    assert after.mean[0, 3] == after.var[0, 3] == 0


def mask_of_the_input(net, y):
    mask = torch.ones_like(y)
    mask[y < 0] = 0.0
    return y * mask


def one_hot_of_the_input(net, y):
    zeros = torch.zeros(2, 4)
    zeros[torch.arange(2), y.mean((2, 3)).argmax(1)] = 1.0
    return y * zeros[:, :, None, None]


def through_itself(net, y):
    z = torch.zeros_like(y)
    part = z[:, 1]
    z[:, 0] = y[:, 0]
    z[:, 2] = part
    return z


@pytest.mark.parametrize(
    ("between", "reason"),
    [(mask_of_the_input, "held no zeros"), (one_hot_of_the_input, "argmax"), (through_itself, "held no zeros")],
)
def test_what_was_assigned_by_an_activation_is_no_constant(between, reason):
    assert reason in prior_after(between).reason


def assign_a_number_first(z):
    z[:, 3] = 1


@pytest.mark.parametrize("change", [
    lambda z: z.add_(1), lambda z: z[:, 1:].add_(1), assign_a_number_first,
    lambda z: z.chunk(2, 1)[0].add_(1),
])  # fmt: skip
def test_changed_zeros_are_not_zeros_in_inference_mode(change):
    with torch.inference_mode(), Recorder():
        y, z = torch.randn(2, 4, 6, 6), torch.zeros(2, 4, 6, 6)
        attach(y, Gaussian(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)), "layer")
        change(z)
        z[:, :2] = y[:, :2]
        assert isinstance(prior_of(z, 1), Unknown)


@pytest.mark.parametrize("training", [True, False])
def test_zeros_are_zeros_where_torch_counts_no_changes(training):
    def every_other(net, y):
        z = torch.zeros_like(y)
        z[:, ::2] = y[:, ::2]
        return z

    model = kn.convert(Net(every_other), track_running_stats=training, stats_batch_size=None).train(training)
    x = torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        found = model(x)
    model.train().train(training)  # forget the priors that are kept
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=0, atol=0)
        if not training:
            torch.testing.assert_close(torch.vmap(model)(x[None])[0], found)


def test_a_memory_that_is_assigned_keeps_no_activations():
    """Without gradients its step is a constant."""

    def between(net, y):
        net.memory = torch.zeros(2, 4)
        with torch.no_grad():
            net.memory[0] = y.mean((0, 2, 3))
        return y + net.memory[0].view(1, -1, 1, 1)

    model = kn.convert(Net(between))
    model(torch.randn(2, 4, 6, 6))
    step = step_of(model.memory)
    assert step is not None
    assert all(each.function is None or each.function is not torch.Tensor.mean for each in ancestors(step) if each.grad)


def test_an_unknown_activation_is_not_taken_for_a_constant():
    """x + y with y of unknown belief: no prior, although y carries none."""
    row = prior_after(lambda net, y: y + torch.cumsum(y, 1))
    assert row.reason.startswith("no rule for")


class PassesOn(nn.Module):
    """A state from call to call, as memory banks and moving averages of features have."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("state", torch.zeros(1, 4, 8, 8))

    def forward(self, x):
        if self.how == "read again":  # before and after a layer has asked for its belief; detached from outside
            before = 0.9 * self.state
            y = self.norm(self.first(x) + self.state).relu()
            after = self.last(self.second(y + self.state))
            self.state = before + 0.1 * y
            return after
        y = self.norm(self.first(x)).relu()
        if self.how == "in place":
            with torch.no_grad():
                self.state.mul_(0.9).add_(y, alpha=0.1)
        elif self.how == "centre":
            self.state = 0.9 * self.state + 0.1 * y.detach()
        elif self.how == "deferred":
            self.state = self.second(y + self.state).relu().detach()
        else:
            self.state = (0.9 * self.state + 0.1 * y).detach()
        return self.last(self.second(y + self.state))


@pytest.mark.parametrize("how", ["average", "centre", "in place", "deferred", "read again"])
@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_a_state_that_is_passed_on_does_not_keep_earlier_passes(how, estimator, monkeypatch):
    def outputs(model):
        torch.manual_seed(0)
        for _ in range(5):
            yield model(torch.randn(1, 3, 10, 10))
            model.state.detach_()

    torch.manual_seed(1)
    model = kn.convert(PassesOn(how), input_stats=(0.0, 1.0), estimator=estimator)
    keeping = copy.deepcopy(model)
    ended = [*outputs(model)]
    found, waiting = set(), [step_of(model.state)]
    while waiting:
        step = waiting.pop()
        found.add(step)
        waiting += step.parents
    assert len(found) < 9
    monkeypatch.setattr("kalmannorm.recording.settle", lambda step: None)
    if estimator == "exact":
        for one, other in zip(ended, outputs(keeping), strict=True):
            assert torch.equal(one, other)


def test_a_detached_tensor_that_is_kept_keeps_nothing_of_its_pass():
    def forward(self, x):
        y = self.norm(x).relu()
        self.kept.append(y.detach())
        return self.last(2 * self.kept[-1])

    model = made_of(forward, norm=nn.BatchNorm2d(3), kept=[], last=nn.BatchNorm2d(3))
    model, x = kn.convert(model, input_stats=(0.0, 1.0)), torch.randn(2, 3, 8, 8)
    assert kn.describe(model, x).rows[1].prior_from == ("norm",)
    model(x).sum().backward()
    assert step_of(model.kept[1]).function is None  # a layer has asked for its belief
    assert not step_of(model.kept[1]).belief.mean.requires_grad


class KeepsFar(nn.Module):
    """What it keeps is behind its last layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.kept = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), []

    def forward(self, x):
        y = self.head(self.norm(x).relu())
        self.kept.append(2 * y.detach())
        return y


@pytest.mark.parametrize("estimator", ["exact", "monte_carlo"])
def test_a_kept_tensor_keeps_no_graph_and_costs_no_rule(estimator):
    model = kn.convert(KeepsFar(), input_stats=(0.0, 1.0), estimator=estimator)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    (kept,) = model.kept
    waiting, beliefs = [step_of(kept)], []
    while waiting:
        step = waiting.pop()
        waiting += step.parents
        beliefs += [step.belief] if step.belief is not None else []
    assert [belief.mean.requires_grad for belief in beliefs] == [False]  # the layer's
    constant = belief_for(kept, 1)
    assert isinstance(constant, Gaussian)
    assert not constant.mean.requires_grad


def test_a_state_that_is_read_before_its_belief_is_known_does_not_end_the_belief(monkeypatch):
    monkeypatch.setattr("kalmannorm.recording._LONGEST", 30)
    model = kn.convert(PassesOn("read again"), input_stats=(0.0, 1.0))
    for _ in range(20):
        model(torch.randn(1, 3, 10, 10))
        model.state.detach_()
    assert kn.describe(model, torch.randn(1, 3, 10, 10)).with_prior == 2


def test_draws_need_no_rule_where_another_layer_has_asked_for_one():
    def forward(self, x):
        y = torch.sinc(self.first(x))
        return self.exact(y) + self.drawn(2 * y)

    model = made_of(
        forward, first=kn.KalmanNorm2d(3), exact=kn.KalmanNorm2d(3), drawn=kn.KalmanNorm2d(3, **kn.preset("paper"))
    )
    rows = kn.describe(kn.connect(model, input_stats=(0.0, 1.0)), torch.randn(2, 3, 8, 8)).rows
    assert [bool(row.reason) for row in rows] == [False, True, False]


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


def test_what_does_not_depend_on_values_is_a_constant():
    """Stochastic depth draws its mask by ``x.new_empty``."""

    def forward(self, x):
        x = self.first(x)
        mask = x.new_empty((2, 1, 1, 1)).fill_(1.0)
        mask[0] = 0.0
        return self.second(x * mask + torch.zeros_like(x))

    model = kn.convert(made_of(forward, first=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)))
    assert kn.describe(model, torch.randn(2, 4, 5, 5)).rows[1].through == (
        "torch.Tensor.mul", "torch.Tensor.add",
    )  # fmt: skip


def test_a_known_tensor_in_an_activations_shape_is_a_constant():
    """torchvision's RPN expands constants to an activation's shape."""
    row = prior_after(lambda net, y: y + net.constant.expand_as(y).type_as(y).to(y))
    assert row.through == ("torch.Tensor.add",)
    row = prior_after(lambda net, y: y + torch.index_select(net.constant, 0, y[0, :, 0, 0].argsort()))
    assert row.reason == "no rule for torch.Tensor.argsort"
    chosen = Step(torch.index_select, (torch.ones(4), 0, Step(None, (), {}, (4,), belief=_a_belief())), {}, (4,))
    assert exact(chosen).reason == "torch.index_select with an argument that is computed from the input"


def _a_belief():
    return Gaussian(torch.zeros(4), torch.ones(4), (4,))


WEIGHT, MATRIX = torch.linspace(-1, 1, 36).view(1, 4, 3, 3), torch.linspace(-1, 1, 12).view(2, 6)


@pytest.mark.parametrize(
    ("by_place", "by_name"),
    [
        (lambda h: F.conv2d(h, WEIGHT), lambda h: F.conv2d(input=h, weight=WEIGHT)),
        (lambda h: F.linear(h, MATRIX), lambda h: F.linear(input=h, weight=MATRIX)),
        (F.gelu, lambda h: F.gelu(input=h)),
        (lambda h: F.max_pool2d(h, 2, 2), lambda h: F.max_pool2d(input=h, kernel_size=2, stride=2)),
        (lambda h: torch.add(h, h * 2, alpha=3), lambda h: torch.add(input=h, other=h * 2, alpha=3)),
        (lambda h: torch.mul(h, 2.0), lambda h: torch.mul(h, other=2.0)),
        (lambda h: torch.mean(h, (2, 3)), lambda h: torch.mean(input=h, dim=(2, 3))),
        (lambda h: torch.matmul(h, MATRIX.T), lambda h: torch.matmul(input=h, other=MATRIX.T)),
        (lambda h: h[:, :, :1].expand(2, 4, 6, 6), lambda h: h[:, :, :1].expand(size=(2, 4, 6, 6))),
        (lambda h: h.repeat(1, 1, 2, 2), lambda h: h.repeat(repeats=(1, 1, 2, 2))),
        (lambda h: torch.transpose(h, 2, 3), lambda h: torch.transpose(input=h, dim0=2, dim1=3)),
        (lambda h: torch.split(h, 2, 1)[1], lambda h: torch.split(tensor=h, split_size_or_sections=2, dim=1)[1]),
        (lambda h: torch.cat([h, h], 1), lambda h: torch.cat(tensors=[h, h], dim=1)),
        (lambda h: h.view(2, 4, 36), lambda h: h.view(size=(2, 4, 36))),
        (lambda h: h[:, [0, 2]], lambda h: h[:, np.array([0, 2])]),
    ],
)
def test_arguments_may_have_torchs_names(by_place, by_name):
    believed = Gaussian(torch.linspace(-1, 1, 4).view(1, 4, 1, 1), torch.linspace(0.5, 2, 4).view(1, 4, 1, 1))
    beliefs = []
    for function in (by_place, by_name):
        x = torch.zeros(2, 4, 6, 6)
        attach(x, believed, "input")
        with Recorder():
            y = function(x)
        beliefs.append(exact(step_of(y)))
    assert torch.equal(beliefs[0].mean, beliefs[1].mean)
    assert torch.equal(beliefs[0].var, beliefs[1].var)


def test_arguments_that_a_rule_does_not_take_end_the_belief():
    @kn.rule(torch.sinc)
    def sinc(x):
        return x

    try:
        assert prior_after(lambda net, y: torch.sinc(y)).prior_from == ("first",)
        row = prior_after(lambda net, y: torch.sinc(y, out=torch.empty(0)))
        assert row.reason == "torch.sinc was called with arguments that its rule does not take"
    finally:
        del rules.RULES[torch.sinc]


@pytest.mark.parametrize("error", [IndexError, StopIteration])
def test_a_rule_that_fails_is_told_of_and_training_goes_on(error):
    @kn.rule(torch.sinc)
    def sinc(x):
        raise error("what is not there")

    said = f"the rule for torch.sinc failed ({error.__name__}: what is not there)"
    try:
        model = kn.convert(Net(lambda net, y: torch.sinc(y)))
        with pytest.warns(UserWarning, match=re.escape(said)):
            y = model(torch.randn(2, 4, 6, 6))
        y.sum().backward()
        with pytest.warns(UserWarning, match="the rule for"):
            reason = kn.describe(model, torch.randn(2, 4, 6, 6)).rows[1].reason
        assert reason == said
    finally:
        del rules.RULES[torch.sinc]


def test_a_change_in_place_that_nobody_watched_ends_the_belief():
    first, second = conv_net_like(3), conv_net_like(4)
    x = torch.randn(2, 3, 8, 8)
    y = first(x)
    assert kn.describe(second, y).rows[0].prior_from == ("3",)
    for change in (lambda t: t.mul_(3), lambda t: F.relu(t, inplace=True), lambda t: t[:, 0].zero_()):
        y = first(x)
        with torch.no_grad():
            change(y)
        row = kn.describe(second, y).rows[0]
        assert (row.prior_from, row.reason) == ((), "it was changed in place where nothing watched")


def test_a_view_taken_before_a_change_in_place_is_not_believed_what_was():
    def between(net, y):
        before = y.view(2, 4, 36)
        y.relu_()
        return before.view(2, 4, 6, 6)

    assert prior_after(between).reason == "it was changed in place where nothing watched"


class Tabular(nn.Module):
    """Classes and numbers of a table, and who is whose neighbour."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(7, 4)])
        self.numbers = nn.BatchNorm1d(2)
        self.first, self.second = nn.Linear(9, 6), nn.Linear(6, 4)
        self.norm, self.last = nn.BatchNorm1d(6), nn.BatchNorm1d(4)

    def forward(self, classes, numbers, edges):
        embedded = [table(classes[:, i]) for i, table in enumerate(self.tables)]
        x = self.norm(F.relu(self.first(torch.cat([*embedded, self.numbers(numbers)], 1))))
        messages = F.relu(x)[edges[0]]
        return self.last(self.second(torch.zeros(len(x), 6).index_add_(0, edges[1], messages)))


def test_integer_inputs_are_constants():
    model = kn.convert(Tabular(), input_stats=([0.0] * 2, [1.0] * 2))
    given = torch.randint(5, (9, 2)), torch.randn(9, 2), torch.randint(9, (2, 30))
    description = kn.describe(model, *given)
    assert description.with_prior == 3
    assert "Tensor.index_add_" in str(description)
    model(*given).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_priors_of_integer_inputs_are_not_kept():
    """They depend on the values."""
    model = kn.convert(Tabular(), input_stats=([0.0] * 2, [1.0] * 2), track_running_stats=False).eval()
    classes, numbers = torch.randint(5, (9, 2)), torch.randn(9, 2)
    few, many = torch.zeros(2, 30, dtype=torch.long), torch.randint(9, (2, 30))
    expected = copy.deepcopy(model)(classes, numbers, many)
    for _ in range(3):
        model(classes, numbers, few)
    torch.testing.assert_close(model(classes, numbers, many), expected)


@pytest.mark.parametrize("like", [torch.zeros_like, lambda y: torch.zeros(y.shape)], ids=["like", "new"])
def test_a_known_tensor_that_an_activation_changes_is_unknown(like):
    """Its values are those of the batch then."""
    x, belief = torch.randn(2, 4, 6, 6), Gaussian(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1))
    with Recorder():
        attach(x, belief, "x")
        seen = like(x).add_(x)
    assert "changed in place by an activation" in prior_of(seen, 1).reason


@pytest.mark.parametrize(
    "same", [lambda y: y.float(), lambda y: y.contiguous(), lambda y: y.to("cpu"), lambda y: F.dropout(y, 0.5, False)],
    ids=["float", "contiguous", "to", "dropout"],
)  # fmt: skip
def test_what_returns_its_argument_has_changed_nothing(same):
    def between(net, y):
        same(y.flatten(1))  # of a view
        known = torch.ones(1)
        return same(y) * known.type_as(y)  # and of a constant

    assert prior_after(between).prior_from == ("first",)


def layers_alive():
    gc.collect()
    return sum(type(each).__name__ == "_LayerBackward" for each in gc.get_objects())


@pytest.mark.parametrize("way", ["forward alone", "an unused head", "part of the gradients", "eval, fused"])
def test_a_graph_that_is_let_go_is_gone(way):
    """A belief that a layer computes with its own leads to the layer, and the layer to what carries the belief."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.other = (
                nn.Sequential(*[m for _ in range(2) for m in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())])
                for _ in range(3)
            )

        def forward(self, x):
            y = self.body(x)
            return self.head(y), self.other(y)

    fuses = {"track_running_stats": False, "input_stats": ([0.0] * 3, [1.0] * 3)} if "eval" in way else {}
    model = kn.convert(Heads(), **fuses).train("eval" not in way)
    before = layers_alive()
    for _ in range(4):
        y, other = model(torch.randn(2, 3, 4, 4))
        if way == "an unused head":
            y.sum().backward()
        elif way == "part of the gradients":
            torch.autograd.grad(y.sum(), model.head[-2].weight)
        del y, other
    assert layers_alive() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda y, conv: F.conv2d(input=y, weight=conv.weight, bias=conv.bias),
        lambda y, conv: conv(torch.relu(input=y)),
        lambda y, conv: F.linear(input=y.movedim(1, -1), weight=conv.weight[:, :, 0, 0]).movedim(-1, 1),
    ],
    ids=["conv2d", "relu", "linear"],
)
def test_the_input_by_its_name(call):
    model = made_of(
        lambda self, x: self.second(call(self.first(x), self.conv)),
        first=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 1), second=nn.BatchNorm2d(4),
    )  # fmt: skip
    assert kn.describe(kn.convert(model), torch.randn(2, 3, 4, 4)).rows[1].prior_from == ("first",)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}])
def test_a_lazy_layer_gets_its_sizes_from_the_first_call(options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model = kn.convert(model, **options)
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 5)
    assert model[-1].in_features == 36


_LEARNED = nn.Parameter(torch.zeros(4, 1, 1))


@pytest.mark.parametrize("mask_of", [
    lambda y, kept, limit: y > 0,
    lambda y, kept, limit: (y > limit).float(),
    lambda y, kept, limit: (y > 0).float() * (1.0 if kept is None else kept),
    lambda y, kept, limit: y > _LEARNED if kept is None else kept,
])  # fmt: skip
def test_a_mask_that_is_kept_keeps_no_graph(mask_of):
    """It has none itself: a spike that a neuron remembers."""

    def between(net, y):
        kept = getattr(net, "kept", None)
        net.kept = mask_of(y, kept, net.constant)
        return y if kept is None else y * kept

    model = kn.convert(Net(between))
    for _ in range(3):
        model(torch.randn(2, 4, 6, 6)).sum().backward()
