"""When the mode opens and closes, and that nothing of it stays behind."""

import collections
import copy
import dataclasses
import threading
import types

import pytest
import torch
from networks import Checkpointed, conv_net, conv_net_like, made_of, prior_of, through_a_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad
from torch.nn.utils.parametrizations import weight_norm

import kalmannorm as kn
from kalmannorm.recording import is_open
from kalmannorm.rules import RULES
from kalmannorm.steps import step_of


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
    # The same but for the share of `eps` in a belief: in eval() it is that of the prior.
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=1e-3, atol=1e-3)
    assert kn.describe(model, x).with_prior == 1


def one_at_a_time(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
    )  # fmt: skip
    return kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False, **options).eval()


def rules_asked(monkeypatch):
    """Counts how often the rule of a convolution is asked."""
    counts = collections.Counter()
    rule = RULES[torch.conv2d]

    def counted(*args, **kwargs):
        counts["conv2d"] += 1
        return rule(*args, **kwargs)

    for function in (torch.conv2d, nn.functional.conv2d):
        monkeypatch.setitem(RULES, function, counted)
    return counts


@torch.no_grad()
def test_priors_are_computed_once_in_eval(monkeypatch):
    counts, model, x = rules_asked(monkeypatch), one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = model(x)
    assert counts["conv2d"] == 3
    for _ in range(3):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert counts["conv2d"] == 3
    recorded = []
    model[2].register_forward_hook(lambda layer, args, output: recorded.append(step_of(output)))
    model(x)  # which knows of no kept priors with this hook
    model(x)
    assert recorded[1] is None  # nor is anything recorded that nobody will ask for


@torch.no_grad()
def test_nothing_is_recorded_for_a_layer_that_uses_running_statistics():
    model, x, recorded = one_at_a_time(), torch.randn(2, 3, 10, 10), []
    model[7] = kn.KalmanNorm2d(4).eval()
    kn.connect(model)[2].register_forward_hook(lambda layer, args, output: recorded.append(step_of(output)))
    for _ in range(3):
        model(x)
    assert recorded[2] is None


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[3].weight.mul_(2),
        lambda model: setattr(model[3].weight, "data", 2 * model[3].weight),
        lambda model: model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()}),
        lambda model: model[4].process_noise.add_(3),
        lambda model: model.double().float(),
        lambda model: setattr(model, "3", nn.Conv2d(4, 4, 3)),
        lambda model: model[2].register_forward_hook(lambda layer, args, output: 3 * output),
        lambda model: model[3].register_forward_pre_hook(lambda layer, args: (3 * args[0],)),
        lambda model: setattr(model[1], "eps", 1.0),
    ],
    ids=["in place", "data", "load_state_dict", "noise", "converted", "another layer", "hook", "pre-hook", "eps"],
)
def test_kept_priors_follow_parameters(change):
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    for _ in range(3):
        model(x)
    change(model)
    fresh = copy.deepcopy(model)
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)


def test_kept_priors_are_those_of_the_shape_and_have_no_part_in_training():
    model, small, large = one_at_a_time(), torch.randn(2, 3, 10, 10), torch.randn(1, 3, 14, 14)
    with torch.no_grad():
        first, second = model(small), model(large)
        torch.testing.assert_close(model(small), first, rtol=0, atol=0)
        torch.testing.assert_close(model(large), second, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(model(small), first)
    model(small).square().sum().backward()  # with gradients they are computed again
    assert model[0].weight.grad.abs().sum() > 0
    through_priors = model[4].process_noise.grad.clone()
    assert through_priors.abs().sum() > 0
    model.train()(small).square().sum().backward()
    assert not torch.equal(model[4].process_noise.grad, through_priors)


@torch.no_grad()
def test_a_layer_called_twice_keeps_a_prior_for_each_call():
    torch.manual_seed(0)
    model = made_of(
        lambda self, x: self.norm(self.second(self.norm(self.first(x)).relu())),
        first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert not torch.allclose(*[prior.belief.mean for prior in one_watch(model).mode.priors.kept.values()])


def called_meanwhile(module, call):
    """A list, with what a call in another thread gives in the middle of the next one, before this module."""
    results = []

    def run():
        with torch.no_grad():
            results.append(call())

    def interrupt(module, args):
        handle.remove()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = module.register_forward_pre_hook(interrupt, prepend=True)
    return results


@torch.no_grad()
def test_threads_keep_priors_of_their_own():
    """As in a server, where several call one model: here a second call runs in the middle of a first one."""
    model, x, other = one_at_a_time(), torch.randn(2, 3, 10, 10), torch.randn(2, 3, 14, 10)
    expected, expected_other = copy.deepcopy(model)(x), copy.deepcopy(model)(other)
    for _ in range(3):
        model(x)
    results = called_meanwhile(model[3], lambda: model(other))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(results[0], expected_other)


@torch.no_grad()
def test_threads_have_inputs_of_their_own():
    """Images in a list: the belief about them waits for the batch that is made of them, in each thread by itself."""
    model = made_of(lambda self, images: self.body(torch.stack(images)), body=one_at_a_time())
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    images = [*torch.randn(2, 3, 10, 10)]
    expected = copy.deepcopy(model)(images)
    results = called_meanwhile(model.body, lambda: model(images))
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(results[0], expected)


class Batch:
    """A container that nobody knows, such as torch_geometric's."""

    def __init__(self, images):
        self.images = images


class Opened(nn.Module):
    """A network that finds its images, and whose stem is in no part with a normalization layer."""

    def __init__(self, stem, body, images_of):
        super().__init__()
        self.stem, self.body, self.images_of = stem, body, images_of

    def forward(self, batch):
        return self.body(self.stem(self.images_of(batch)))


@pytest.mark.parametrize("input_stats", [([0.0] * 4, [1.0] * 4), (0.0, 1.0)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("wrapped", "images_of"),
    [(Batch, lambda batch: batch.images), (list, torch.stack), (Batch, lambda batch: batch.images - 0.0)],
)
def test_images_inside_of_something_meet_the_stem(input_stats, compiled, wrapped, images_of):
    """Not the stem's output, which has as many channels, becomes the input."""
    torch.manual_seed(0)
    stem, body = nn.Conv2d(4, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.init.constant_(stem.weight, 3.0)
    images = torch.randn(2, 4, 8, 8)
    plain = kn.convert(copy.deepcopy(nn.Sequential(stem, body)), input_stats=input_stats)
    model = kn.convert(Opened(stem, body, images_of), input_stats=input_stats)
    called = torch.compile(model, backend="eager") if compiled else model
    torch.testing.assert_close(called(wrapped(images)), plain(images))


@pytest.mark.parametrize(
    "features",
    [nn.Linear(5, 8), weight_norm(nn.Linear(5, 8)), nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 8))],
)
def test_what_a_stem_makes_is_no_input(features):
    """The input has five features, and no belief fits it; the hidden ones are eight, as many as `input_stats` tell."""
    body = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = kn.convert(Opened(features, body, lambda batch: batch.images), input_stats=([5.0] * 8, [1.0] * 8))
    batch = Batch(torch.randn(4, 5))
    with pytest.warns(UserWarning, match="describe 8 channels, but Opened got no tensor"):
        rows = kn.describe(model, batch).rows
    assert [row.prior_from for row in rows][-2:] in ([(), ("body.0",)], [("stem.1",), ("body.0",)])
    assert not any("input" in row.prior_from for row in rows)


@pytest.mark.parametrize("masked", [lambda mask, weight: mask * weight, lambda mask, weight: weight * mask])
def test_a_mask_of_weights_is_no_input(masked):
    """As pruning multiplies; it has as many input channels as the images."""

    class Stem(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, masked(torch.ones(self.weight.shape), self.weight), self.bias)

    torch.manual_seed(0)
    body = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = Opened(Stem(3, 4, 3), body, lambda batch: batch.images)
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    rows = kn.describe(model, Batch(torch.randn(2, 3, 8, 8))).rows
    assert [row.prior_from for row in rows] == [("input",), ("body.0",)]


def test_layers_converted_one_by_one_say_so():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), kn.convert(nn.BatchNorm2d(4)))
    with pytest.warns(UserWarning, match="sees no propagation"):
        body(torch.randn(2, 3, 8, 8))


@torch.no_grad()
def test_a_network_that_is_no_part_of_another_keeps_no_priors_in_it():
    other, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    model = made_of(lambda self, x: self.others[0](self.norm(x)), norm=nn.BatchNorm2d(3), others=[other])
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    model(x)
    other[0].weight.mul_(5)
    found = model(x)
    torch.testing.assert_close(found, model.train().eval()(x), rtol=0, atol=0)


def one_watch(model):
    return next(iter(model._forward_pre_hooks.values())).__self__


@torch.no_grad()
def test_each_sample_normalizes_itself():
    model, x = one_at_a_time(), torch.randn(5, 3, 10, 10)
    torch.testing.assert_close(model(x), torch.cat([model(each[None]) for each in x]))
    pairs = one_at_a_time(stats_batch_size=2)
    torch.testing.assert_close(pairs(x[:4]), torch.cat([pairs(x[:2]), pairs(x[2:4])]))
    assert not torch.allclose(pairs(x[:2])[:1], model(x[:1]), atol=1e-3)


@torch.no_grad()
def test_kept_priors_do_not_travel():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = model(x)
    loaded = through_a_file(model)
    assert not one_watch(loaded).mode.priors.kept
    torch.testing.assert_close(loaded(x), expected)


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
    def forward(self, x, depth=2):
        if depth:
            x = self(self.norms[depth](x), depth - 1)
        return self.norms[0](x)

    model = kn.convert(made_of(forward, norms=nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))))
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


def detector(**options):
    """It gets a list of images of different sizes, and gives its first part a batch."""
    torch.manual_seed(0)
    model = made_of(
        lambda self, images: self.backbone(torch.stack([image[:, :8, :8] for image in images])),
        backbone=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)),
    )  # fmt: skip
    return kn.convert(model, **options)


def test_input_stats_reach_the_batch_of_a_detector():
    model = detector(input_stats=([0.0] * 3, [1.0] * 3))
    rows = kn.describe(model, [torch.randn(3, 8, 9), torch.randn(3, 9, 8)]).rows
    assert [row.prior_from for row in rows] == [("input",), ("backbone.1",)]
    model([torch.randn(3, 8, 9)])  # the mode does not keep it
    assert kn.describe(model, [torch.randn(3, 8, 9), torch.randn(3, 9, 8)]).rows[0].prior_from == ("input",)


def test_what_another_network_made_needs_no_input_stats():
    """Its belief says more than those."""
    given = {"input_stats": ([0.0] * 4, [1.0] * 4)}
    below = kn.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), **given)
    above = kn.convert(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), **given)
    hidden = below(torch.randn(2, 4, 9, 9))
    above(hidden)
    assert step_of(hidden).source == "1"
    assert not is_open()


@pytest.mark.slow
def test_input_stats_reach_a_compiled_part_of_a_detector():
    images = [torch.randn(3, 8, 9), torch.randn(3, 9, 8)]
    given = {"input_stats": ([0.0] * 3, [1.0] * 3)}
    without, eager, compiled = detector(), detector(**given), detector(**given)
    compiled.backbone = torch.compile(compiled.backbone, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, found = eager(images), compiled(images)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(without(images), expected, atol=1e-3)
    assert not is_open()
    assert not next(iter(compiled._forward_hooks.values())).__self__.mode.waiting


@pytest.mark.slow
def test_a_graph_break_in_the_middle_changes_nothing():
    import torch._dynamo

    class Break(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x * 1.0

    torch._dynamo.reset()
    model = Checkpointed(False)
    model.blocks = nn.ModuleList([model.blocks[0], Break(), model.blocks[1]])
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


@dataclasses.dataclass
class Pictures:
    image: torch.Tensor
    side: torch.Tensor


@pytest.mark.parametrize("kind", [Pictures, collections.UserDict, dict])
def test_inputs_are_found_where_a_batch_holds_them(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, batch):
            image, side = (batch.image, batch.side) if kind is Pictures else (batch["image"], batch["side"])
            return self.second(self.first(image) + side)

    batch = kind(image=torch.randn(2, 3, 8, 8), side=torch.randn(2, 3, 8, 8))
    told = kn.convert(Two(), input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(told, batch).rows[0].prior_from == ("input",)
    row = kn.describe(kn.convert(Two()), batch).rows[1]
    place = "batch.side" if kind is Pictures else "batch['side']"
    assert (row.prior_from, row.reason) == ((), f"the network's input {place!r}")


def test_input_stats_that_no_tensor_was_found_for_are_told_of_once():
    class Hidden:
        image = torch.randn(2, 3, 8, 8)

    model = made_of(lambda self, batch: self.norm(batch.image), norm=nn.BatchNorm2d(3))
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    with pytest.warns(UserWarning, match="describe 3 channels, but Net got no tensor of shape"):
        model(Hidden())
    model(Hidden())  # a second warning would be an error here


def test_one_number_for_an_input_without_channels_is_told_of():
    model = kn.convert(nn.Sequential(nn.Unflatten(0, (-1, 4)), nn.BatchNorm1d(4)), input_stats=(0.0, 1.0))
    with pytest.warns(UserWarning, match="Sequential got no tensor of shape"):
        model(torch.randn(8))


def test_input_stats_are_of_the_first_of_several_images():
    image, mask = torch.randn(2, 3, 8, 8), torch.rand(2, 1, 8, 8)
    model = made_of(lambda self, *images: self.norm(images[0] * images[1]), norm=nn.BatchNorm2d(3))
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(model, image, mask).rows[0].reason == "the network's input '1'"
    with pytest.raises(ValueError, match=r"describe 3 channels, but Net got an input of shape \(2, 1, 8, 8\)"):
        model(mask, image)


@pytest.mark.parametrize(("given", "call"), [
    pytest.param("images", lambda model, images: model(list(images[:, :1])), id="no tensor of these channels"),
    pytest.param("pictures", lambda model, images: model(images=images), id="another name"),
    pytest.param("mask", lambda model, images: model(images, mask=images > 0), id="no floating-point tensor"),
])  # fmt: skip
def test_named_input_stats_that_no_tensor_was_found_for_are_told_of_once(given, call):
    def forward(self, images, **options):
        return self.norm(images if isinstance(images, torch.Tensor) else torch.stack(images).repeat(1, 3, 1, 1))

    images = torch.randn(2, 3, 8, 8)
    model = kn.convert(made_of(forward, norm=nn.BatchNorm2d(3)), input_stats={given: ([0.0] * 3, [1.0] * 3)})
    with pytest.warns(UserWarning, match="describe 3 channels, but Net got no tensor of shape"):
        call(model, images)
    call(model, images)  # a second warning would be an error here


def test_named_input_stats_of_an_argument_that_is_left_out_are_kept():
    model = made_of(lambda self, images, depth=None: self.norm(images), norm=nn.BatchNorm2d(3))
    model = kn.convert(model, input_stats={"images": ([0.0] * 3, [1.0] * 3), "depth": ([0.0], [1.0])})
    model(torch.randn(2, 3, 8, 8))  # a warning would be an error here


def test_an_interrupt_in_one_network_does_not_reach_another():
    stats = {"input_stats": ([0.0] * 3, [1.0] * 3)}
    model, other, fresh = conv_net(**stats), conv_net(**stats), conv_net(**stats)
    x = torch.randn(2, 3, 8, 8)
    expected = fresh(x)

    def interrupt(layer, args, output):
        raise KeyboardInterrupt

    model[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert is_open()  # torch runs no hook then
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert not is_open()


def test_a_network_within_another_ones_call_leaves_its_mode_open():
    """As a frozen teacher that is called in a student's forward pass."""
    outer, inner = conv_net(), conv_net_like(4)
    open_after = []

    def call(layer, args, output):
        inner(output.detach())
        open_after.append(is_open())

    outer[2].register_forward_hook(call)
    outer(torch.randn(2, 3, 8, 8))
    assert open_after == [True]
    assert not is_open()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = one_at_a_time()[:6]
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x, head=True, factor=1.0):
        x = self.body(x) * factor
        return self.head(x) if head else x


@torch.no_grad()
@pytest.mark.parametrize("first", [{"head": False}, {"factor": 3.0}])
def test_kept_priors_are_those_of_the_course_that_a_forward_takes(first):
    model = kn.convert(Branches(), input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    x = torch.randn(2, 3, 10, 10)
    expected = copy.deepcopy(model)(x)
    for _ in range(2):
        model(x, **first)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("by_key", [False, True])
def test_kept_priors_are_those_of_the_argument_that_is_given(by_key):
    def forward(self, inputs=None, **named):
        way, x = next((name, x) for name, x in (inputs or named).items() if x is not None)
        return self.norm(self.ways[way](x))

    ways = nn.ModuleDict({"rgb": nn.Conv2d(3, 4, 3), "depth": nn.Conv2d(3, 4, 3)})
    ways["depth"].weight.mul_(10)
    model = made_of(forward, ways=ways, norm=nn.BatchNorm2d(4))
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    x = torch.randn(2, 3, 8, 8)

    def run(model, way):
        return model({way: x}) if by_key else model(**{"rgb": None, "depth": None, way: x})

    for way in ("rgb", "depth", "rgb"):
        torch.testing.assert_close(run(model, way), run(copy.deepcopy(model), way), rtol=0, atol=0)


@torch.no_grad()
def test_kept_priors_are_not_taken_for_those_of_tensors_in_the_same_memory():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    memory = model[3].weight.clone().numpy()
    for _ in range(3):
        memory *= 2
        found, fresh = (
            torch.func.functional_call(network, {"3.weight": torch.from_numpy(memory)}, (x,))
            for network in (model, copy.deepcopy(model))
        )
        torch.testing.assert_close(found, fresh, rtol=0, atol=0)


@torch.no_grad()
def test_a_course_that_depends_on_data():
    """A layer that the passes before have left out, at the same input shapes."""

    class Early(Branches):
        def forward(self, x):
            return super().forward(x, head=bool(x.mean() > 0))

    model = kn.convert(Early(), input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    x = torch.rand(2, 3, 10, 10)
    expected = copy.deepcopy(model)(x)
    for _ in range(2):
        model(-x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_layer_that_is_called_once_more_than_before():
    class Repeats(Branches):
        def forward(self, x):
            x = super().forward(x)
            return self.head(x) if x.shape[0] == 2 and self.again else x

    model = kn.convert(Repeats(), input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False).eval()
    model.again = False
    x = torch.randn(2, 3, 10, 10)
    for _ in range(3):
        model(x)
    model.again = True
    model(x)
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


@torch.no_grad()
def test_an_error_in_the_middle_leaves_no_priors_missing():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = copy.deepcopy(model)(x)

    def stop(*args):
        raise RuntimeError("stop")

    handle = model[5].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    handle.remove()
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_kept_priors_end_with_a_training_step():
    """Many optimizers and averages of weights write through `.data`, which torch does not count."""
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    for _ in range(2):
        model(x)
    model.train()
    model[3].weight.data.mul_(2)
    model.eval()
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


@torch.no_grad()
def test_no_priors_are_kept_with_dropout_in_eval():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    model[2] = nn.Sequential(nn.ReLU(), nn.Dropout(0.5)).eval()
    for _ in range(2):
        model(x)
    model[2][1].train()
    outputs = []
    for each in (model, copy.deepcopy(model)):
        torch.manual_seed(0)
        outputs.append(each(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_pass_in_inference_mode_does_not_end_the_first_prior():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = copy.deepcopy(model).train()(x)
    with torch.inference_mode():
        model(x)
    torch.testing.assert_close(model.train()(x), expected, rtol=0, atol=0)


def test_priors_kept_in_inference_mode_serve_a_backward_pass():
    model, x = one_at_a_time().requires_grad_(False), torch.randn(2, 3, 10, 10, requires_grad=True)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert x.grad.isfinite().all()


@torch.inference_mode()
def test_a_network_that_is_made_in_inference_mode():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_stand_ins_leave_no_priors():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    expected = copy.deepcopy(model)(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(2, 3, 10, 10))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_an_exporter_gets_no_priors_of_other_weights_or_sizes():
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    model[0].padding = (1, 1)
    model(x)
    for change, its in ((lambda: model[0].weight.mul_(2), x), (lambda: None, torch.randn(2, 3, 14, 14))):
        change()
        exported = torch.export.export(model, (its,)).module()(its)
        torch.testing.assert_close(exported, copy.deepcopy(model)(its), rtol=1e-4, atol=1e-5)
        model(x)


def test_one_value_a_channel_in_eval_says_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model = kn.convert(model, track_running_stats=False).eval()
    with pytest.warns(UserWarning, match="got one value a channel"):
        model(torch.randn(2, 3))


class Graph(nn.Module):
    """A dense adjacency matrix times features, as a second floating-point input."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.late = nn.BatchNorm1d(2)

    def forward(self, x, adj, *, scale=None):
        h = self.norm(adj @ self.linear(x))
        h = self.head(h if scale is None else h * scale)
        return self.late(h)


def test_input_stats_by_name():
    x, adj, scale = torch.randn(5, 3), torch.rand(5, 5), torch.rand(5, 1)
    model = kn.convert(Graph(), input_stats={"x": ([1.0, 2.0, 3.0], [1.0] * 3), "adj": (0.5, 0.3)})
    rows = kn.describe(model, x, adj).rows
    assert [row.reason for row in rows] == ["", ""]
    assert rows[0].prior_from == ("input",)
    row = kn.describe(model, x, adj, scale=scale).rows[1]
    assert row.reason == "the network's input 'scale'"
    seen = []
    model.norm.register_forward_pre_hook(lambda layer, args: seen.append(prior_of(args[0], 1)))
    model(x, adj=adj)
    given = torch.tensor([1.0, 2.0, 3.0]) @ model.linear.weight.detach().T + model.linear.bias.detach()
    torch.testing.assert_close(seen[0].mean.detach()[0], 5 * 0.5 * given)
    kn.connect(model)  # keeps them
    assert kn.describe(model, x, adj).with_prior == 2


def test_input_stats_of_a_place_inside_of_an_argument():
    model = made_of(
        lambda self, batch: self.image(batch["image"]) + self.pose(batch["pose"])[..., None, None],
        image=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        pose=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    )  # fmt: skip
    batch = {"image": torch.randn(2, 3, 4, 4), "pose": torch.randn(2, 3)}
    reasons = [row.reason for row in kn.describe(kn.convert(copy.deepcopy(model)), batch).rows]
    assert reasons == ["the network's input \"batch['image']\"", "the network's input \"batch['pose']\""]
    stats = {"batch['image']": ([0.0] * 3, [1.0] * 3), "batch['pose']": ([5.0] * 3, [10.0] * 3)}
    model = kn.convert(model, input_stats=stats)
    for part, deviation in ((model.image, 1.0), (model.pose, 10.0)):
        found = []
        part[1].register_forward_pre_hook(lambda layer, args, found=found: found.append(prior_of(args[0], 1)))
        model(batch)
        var = deviation**2 * part[0].weight.detach().flatten(1).square().sum(1)
        torch.testing.assert_close(found[0].var.detach()[0], var)
    with pytest.raises(ValueError, match=r"describe 3 channels, but Net got an input \"batch\['pose'\]\" of shape"):
        model({"image": batch["image"], "pose": torch.randn(2, 4)})


def test_a_container_whose_parts_are_called_takes_no_input_stats():
    with pytest.raises(ValueError, match="input_stats got ModuleDict, whose parts are called and not itself"):
        kn.convert(nn.ModuleDict({"body": nn.BatchNorm2d(3)}), input_stats=([0.0] * 3, [1.0] * 3))


def test_a_container_that_is_called_itself_takes_input_stats():
    class Features(nn.ModuleDict):  # as torchvision's IntermediateLayerGetter and timm's `features_only` are
        def forward(self, x):
            return [x := layer(x) for layer in self.values()]

    model = Features({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})
    model = kn.convert(model, input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(model, torch.randn(2, 3, 8, 8)).rows[0].prior_from == ("input",)


def test_input_stats_by_name_that_do_not_fit():
    with pytest.raises(ValueError, match=r"input_stats got 'y', expected names of what Graph's forward takes: \['x'"):
        kn.convert(Graph(), input_stats={"y": (0.0, 1.0)})
    with pytest.raises(ValueError, match=r"input_stats got 0, expected names of what Graph's forward takes"):
        kn.convert(Graph(), input_stats={0: (0.0, 1.0)})
    with pytest.raises(ValueError, match=r"input_stats\['adj'\] got \(0.0, 0.0\), expected"):
        kn.convert(Graph(), input_stats={"adj": (0.0, 0.0)})
    model = kn.convert(Graph(), input_stats={"x": ([0.0] * 2, [1.0] * 2)})
    with pytest.raises(ValueError, match=r"describe 2 channels, but Graph got an input 'x' of shape \(5, 3\)"):
        model(torch.randn(5, 3), torch.rand(5, 5))
    model = made_of(lambda self, **batch: self.norm(batch["image"]), norm=nn.BatchNorm2d(3))
    kn.convert(model, input_stats={"image": ([0.0] * 3, [1.0] * 3)})  # it may take any name


def test_input_stats_of_a_part_hold_in_the_whole():
    x, adj = torch.randn(5, 3), torch.rand(5, 5)
    part = kn.convert(Graph(), input_stats={"x": ([0.0] * 3, [1.0] * 3), "adj": (0.5, 0.3)})
    model = made_of(lambda self, features, edges: self.part(features, adj=edges), part=part)
    assert kn.describe(kn.connect(model), x, adj).with_prior == 2
    unnamed = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(kn.connect(nn.Sequential(unnamed)), torch.randn(2, 3, 4, 4)).with_prior == 1


@pytest.mark.parametrize("input_stats", [([0.0] * 3, [1.0] * 3), {"x": ([0.0] * 3, [1.0] * 3)}], ids=type)
def test_input_stats_of_a_part_hold_where_the_whole_normalizes(input_stats):
    part = made_of(lambda self, x: self.norm(self.conv(x)), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4))
    part = kn.convert(part, input_stats=input_stats)
    model = kn.connect(made_of(lambda self, x: self.part((x - 0.5) / 0.25), part=part))
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(model(images), part((images - 0.5) / 0.25), rtol=0, atol=0)
    assert kn.describe(model, images).with_prior == 1


@pytest.mark.parametrize("input_stats", [([0.0] * 3, [1.0] * 3), {"z": ([0.0] * 3, [1.0] * 3)}], ids=type)
@pytest.mark.parametrize("noise", [lambda x: torch.ones(2, 3), torch.randn_like], ids=["constant", "noise"])
def test_input_stats_of_a_part_hold_for_what_the_whole_makes(input_stats, noise):
    """As a generator's, whose noise is drawn in the network around it."""
    part = made_of(lambda self, c, z: self.norm(self.conv(z)), conv=nn.Linear(3, 4), norm=nn.BatchNorm1d(4))
    if isinstance(input_stats, tuple):
        part = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    part = kn.convert(part, input_stats=input_stats)
    call = part if isinstance(input_stats, tuple) else lambda z: part(torch.ones(2), z)
    seen = []
    model = kn.connect(made_of(lambda self, x: call(seen.append(noise(x)) or seen[-1]), part=part))
    output = model(torch.randn(2, 3))
    torch.testing.assert_close(output, call(seen[-1]), rtol=0, atol=0)
    assert kn.describe(model, torch.randn(2, 3)).with_prior == 1


def test_named_input_stats_reach_the_batch_of_a_detector():
    model = made_of(
        lambda self, images: self.body(torch.stack(images)), body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    )
    model = kn.convert(model, input_stats={"images": ([0.0] * 3, [1.0] * 3)})
    assert kn.describe(model, [torch.randn(3, 8, 8) for _ in range(2)]).with_prior == 1


@torch.no_grad()
def test_kept_priors_are_not_those_of_another_networks_output():
    first, second = kn.convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))).eval(), one_at_a_time()
    first[1].weight.mul_(5)
    first[1].bias.add_(4)
    x = torch.randn(2, 3, 12, 12)
    expected = copy.deepcopy(second)(x)
    second(first(x))
    second(first(x))
    torch.testing.assert_close(second(x), expected, rtol=0, atol=0)


def changed_within():
    graph = types.SimpleNamespace(scale=1.0)
    for scale in (1.0, 1.0, 5.0):
        graph.scale = scale
        yield graph


@torch.no_grad()
@pytest.mark.parametrize(("factor", "arguments"), [
    pytest.param(lambda graph: graph.scale, changed_within, id="an object that changed"),
    pytest.param(lambda flag: 5 if flag is True else 1, lambda: (1, 1, True), id="another type"),
])  # fmt: skip
def test_kept_priors_are_not_those_of_another_argument(factor, arguments):
    model = made_of(lambda self, x, argument: self.net(x * factor(argument)), net=one_at_a_time())
    model, x = kn.connect(model.eval(), input_stats=([0.0] * 3, [1.0] * 3)), torch.randn(2, 3, 10, 10)
    for argument in arguments():
        torch.testing.assert_close(model(x, argument), copy.deepcopy(model)(x, argument), rtol=0, atol=0)


def test_kept_priors_follow_a_step_that_no_count_tells_of():
    """A fused optimizer changes parameters so."""
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    with torch.no_grad():
        model(x)
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


def test_a_first_call_inside_of_torch_func_leaves_no_wrappers():
    model, x = one_at_a_time().train(), torch.randn(2, 3, 10, 10)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(given):
        return functional_call(model, given, (x,)).square().sum()

    def after_a_step(given):
        return loss({name: given[name] - 0.1 * g for name, g in grad(loss)(given).items()})

    first, again = grad(after_a_step)(parameters), grad(after_a_step)(parameters)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_replicas_are_no_replaced_layers(recwarn):
    """Of torch.nn.DataParallel."""
    model = one_at_a_time().train()
    replica = model._replicate_for_data_parallel()
    for name, module in model._modules.items():
        replica._modules[name] = module._replicate_for_data_parallel()
        replica._modules[name]._parameters = module._parameters
    replica(torch.randn(2, 3, 10, 10))
    assert not [str(each.message) for each in recwarn if "were replaced" in str(each.message)]


def without_rules(layers, unconnected):
    """Blocks of a convolution and a norm, the last ones behind a function that has no rule."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(layers)]

    class Net(nn.Sequential):
        def forward(self, x):
            for i, block in enumerate(self):
                x = block(x.cumsum(3) if i >= layers - unconnected else x)
            return x

    return kn.convert(Net(*blocks), input_stats=([0.0] * 4, [1.0] * 4))


def test_a_network_of_few_priors_is_told_of_once():
    model, x = without_rules(5, 3), torch.randn(2, 4, 6, 6)
    model.eval()(x)  # its layers use no prior
    with pytest.warns(UserWarning, match=r"3 of 5 Kalman layers of Net have no prior.* '4.1': .*cumsum.*describe"):
        model.train()(x)
    model(x)  # another warning would be an error here
    assert kn.describe(model, x).with_prior == 2


@pytest.mark.parametrize(("layers", "unconnected"), [(6, 3), (3, 2)])
def test_some_layers_may_be_without_a_prior(layers, unconnected):
    model = without_rules(layers, unconnected)
    model(torch.randn(2, 4, 6, 6))
    assert kn.describe(model, torch.randn(2, 4, 6, 6)).with_prior == layers - unconnected


@torch.no_grad()
def test_kept_priors_are_those_of_the_inputs_type():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    model = kn.convert(model, track_running_stats=False, input_stats=([0.1] * 3, [0.3] * 3)).eval()
    x, fresh = torch.randn(2, 3, 4, 4), copy.deepcopy(model)
    model(x)
    torch.testing.assert_close(model(x.double()), fresh(x.double()), rtol=0, atol=0)


@torch.no_grad()
def test_no_priors_are_kept_of_many_networks_at_once():
    """Those that ``torch.vmap`` puts in the place of one."""
    model, x = one_at_a_time(), torch.randn(2, 3, 10, 10)
    model(x)
    weights = torch.stack([model[3].weight, 2 * model[3].weight])
    many = torch.func.vmap(lambda weight: torch.func.functional_call(model, {"3.weight": weight}, (x,)))(weights)
    torch.testing.assert_close(many[0], model(x))
    model[3].weight.mul_(2)
    torch.testing.assert_close(many[1], model(x))
