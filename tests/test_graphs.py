"""Passes replayed as CUDA graphs, without a GPU: `fake_cuda` captures and replays on the CPU."""

import copy
import gc
import pickle
import warnings
import weakref

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from networks import made_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import kalmannorm as kn
from kalmannorm import graphs
from kalmannorm.rules import RULES
from kalmannorm.steps import step_of

STATS = ([0.0] * 3, [1.0] * 3)


@pytest.fixture
def streams(monkeypatch):
    """Which CUDA streams were current."""
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def recorded(streams, monkeypatch):
    """The samples of each recording, in the order in which they were recorded."""
    found = []
    record = graphs._graphed

    def graphed(run, samples):
        function = record(run, samples)
        found.append(samples)
        return function

    monkeypatch.setattr(graphs, "_graphed", graphed)
    return found


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def pair(network=None, **options):
    """The same network twice, the second one captured."""
    plain = kn.convert(net() if network is None else network, input_stats=STATS)
    return plain, kn.capture(copy.deepcopy(plain), **options)


def images(samples=2, seed=0):
    return torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def assert_same_state(captured, plain, **close):
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(captured.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **close)


def train(model, batches, accumulated=1, clip=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for number, x in enumerate(batches):
        loss = F.cross_entropy(model(x), torch.arange(len(x))) / accumulated
        loss.backward()
        losses.append(loss.detach())
        if (number + 1) % accumulated == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses)


@pytest.mark.parametrize("options", [{}, {"accumulated": 2}, {"clip": 0.1}])
def test_a_training_is_the_same(recorded, options):
    plain, captured = pair()
    batches = [images(seed=seed) for seed in range(8)]
    torch.testing.assert_close(train(captured, batches, **options), train(plain, batches, **options), rtol=0, atol=0)
    assert len(recorded) == 1
    assert_same_state(captured, plain, rtol=0, atol=0)
    assert captured[1].num_batches_tracked == 8


def test_gradients_and_outputs_are_not_overwritten(recorded):
    plain, captured = pair(warm_up=1)
    batches = [images(seed=seed) for seed in range(4)]
    kept = []
    for model in (plain, captured):
        for x in batches:
            y = model(x)
            y.sum().backward()  # or the next call would run as it is
            kept.append(y.detach())
    assert recorded
    for a, b in zip(kept[:4], kept[4:], strict=True):
        torch.testing.assert_close(a, b)
    captured.zero_grad()
    captured(batches[0]).sum().backward()
    gradients = [p.grad for p in captured.parameters()]
    before = [g.clone() for g in gradients]
    captured.zero_grad()
    captured(batches[1]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_shapes_have_graphs_of_their_own_up_to_a_number(recorded):
    plain, captured = pair(warm_up=2, shapes=2)
    for samples in (2, 3, 4):
        for seed in range(4):
            torch.testing.assert_close(captured(images(samples, seed)), plain(images(samples, seed)))
    assert [len(samples[0]) for samples in recorded] == [2, 3]
    assert_same_state(captured, plain)


def test_where_it_runs_as_it_is(recorded):
    _, captured = pair(warm_up=1)
    calls = captured.forward
    for _ in range(3):
        with torch.no_grad():
            captured(images())
        captured.eval()(images())
        captured.train()
        checkpoint(captured, images(), use_reentrant=False)
    assert not recorded
    assert not calls.graphs
    for parameter in captured.parameters():
        parameter.requires_grad_(False)
    captured(images())
    captured(images())
    assert not recorded


def test_what_changes_is_recorded_anew(recorded):
    _, captured = pair(warm_up=1)

    def recorded_again():
        before = len(recorded)
        for _ in range(3):
            captured(images())
        return len(recorded) - before

    assert recorded_again() == 1
    assert recorded_again() == 0
    captured[0].weight.requires_grad_(False)
    assert recorded_again() == 1
    captured[1].momentum = 0.5
    assert recorded_again() == 1
    kn.freeze(captured[:2])
    assert recorded_again() == 1
    captured[3].weight.data = captured[3].weight.data.clone()
    assert recorded_again() == 1


class Arguments(nn.Module):
    """Takes and returns more than a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, both, scale=1.0, *, mask=None, name="x"):
        y = self.norm(self.conv(both["image"])) * scale
        return {"y": y if mask is None else y * mask, "name": name, "more": [both["other"] + 1, None]}


def test_arguments_and_results_keep_their_form(recorded):
    plain, captured = pair(Arguments(), warm_up=1)
    for seed in range(3):
        given = {"image": images(seed=seed), "other": torch.randn(3)}
        keywords = {"scale": 0.5, "mask": torch.ones(6, 6), "name": "z"}
        ours, theirs = captured(given, **keywords), plain(given, **keywords)
        assert ours["name"] == "z"
        assert ours["more"][1] is None
        torch.testing.assert_close((ours["y"], ours["more"][0]), (theirs["y"], theirs["more"][0]))
    for _ in range(2):
        torch.testing.assert_close(captured(given, scale=2.0)["y"], plain(given, scale=2.0)["y"])
    assert len(recorded) == 2
    before = len(captured.forward.seen)
    captured(given, name=object())  # no constant: as it is
    assert len(captured.forward.seen) == before


class Parts(nn.Module):
    """A part that is captured, between others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@pytest.mark.parametrize("part", ["stem", "body", "head"])
def test_beliefs_cross_the_border_of_a_part(recorded, part):
    plain, captured = (kn.convert(Parts(), input_stats=STATS) for _ in range(2))
    kn.capture(getattr(captured, part), warm_up=1)
    batches = [images(seed=seed) for seed in range(5)]
    torch.testing.assert_close(train(captured, batches), train(plain, batches))
    assert len(recorded) == 1
    assert_same_state(captured, plain)


def test_a_second_call_before_the_first_ones_backward_runs_as_it_is(recorded):
    plain, captured = pair(warm_up=1)
    for number in range(4):
        for model in (plain, captured):
            model.zero_grad()
            (model(images(seed=number)) - model(images(seed=number + 9))).square().sum().backward()
        for mine, its in zip(captured.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad)
    assert len(recorded) == 1
    captured(images())  # and forgotten: the next one is replayed
    kept = captured.forward.graphs
    assert not next(iter(kept.values())).is_awaited


def test_gradients_of_arguments_are_not_overwritten(recorded):
    plain, captured = pair(warm_up=1)
    leaves = [images().requires_grad_() for _ in range(2)]
    for model, x in zip((plain, captured), leaves, strict=True):
        for _ in range(4):
            model(x).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert recorded


def test_distributed_data_parallel_around_it(recorded, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, captured = pair(warm_up=1)
        batches = [images(seed=seed) for seed in range(4)]
        losses = train(nn.parallel.DistributedDataParallel(captured), batches)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(losses, train(plain, batches))
    assert len(recorded) == 1
    assert_same_state(captured, plain)


def test_hooks_of_parameters_run_once(recorded):
    plain, captured = pair(warm_up=1)
    for model in (plain, captured):
        model[0].weight.register_hook(lambda g: 2 * g)
    for seed in range(3):
        for model in (plain, captured):
            model.zero_grad()
            model(images(seed=seed)).square().sum().backward()
        torch.testing.assert_close(captured[0].weight.grad, plain[0].weight.grad)


def test_what_is_said_of_an_input_inside_is_recorded_too(recorded, monkeypatch):
    # From bytes to images.
    _, captured = pair(made_of(lambda self, x: self.body(x.permute(0, 3, 1, 2).float() / 255), body=net()), warm_up=1)
    watch = next(hook.__self__ for hook in captured._forward_pre_hooks.values())
    belief_of_first = []
    captured.body[0].register_forward_hook(lambda _, args, y: belief_of_first.append(step_of(args[0]).belief))
    x = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    for _ in range(3):
        captured(x)
        assert watch.known[None].mean.dtype == torch.float32, "it is still as it was given, on the CPU"
    assert len(recorded) == 1
    assert len(belief_of_first) > 4
    assert all(isinstance(belief, kn.Gaussian) for belief in belief_of_first)


def test_a_part_may_begin_in_place_and_return_what_needs_no_gradient(recorded):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)
            self.part = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            self.part.forward = lambda y: ((z := self.part[1](self.part[0](y.relu_()))), z.detach().mean())

        def forward(self, x):
            return self.part(self.conv(x))

    captured = kn.convert(Both(), input_stats=STATS)
    kn.capture(captured.part, warm_up=1)
    plain = kn.convert(Both(), input_stats=STATS)
    for seed in range(3):
        (y, mean), (expected, other) = captured(images(seed=seed)), plain(images(seed=seed))
        torch.testing.assert_close((y, mean), (expected, other))
        assert y.requires_grad
        assert not mean.requires_grad
    assert recorded


def test_a_dropped_graph_is_gone_before_the_next_recording(recorded):
    _, captured = pair(warm_up=1)
    kept = []
    gc.disable()
    try:
        for momentum in (0.1, 0.2):
            captured[1].momentum = momentum
            for _ in range(2):
                captured(images())
            kept.append(weakref.ref(recorded.pop()[0]))
    finally:
        gc.enable()
    assert [sample() is None for sample in kept] == [True, False]


def test_who_never_comes_to_a_recording_is_told(recorded):
    _, captured = pair(warm_up=1)

    def train_anew():
        for _ in range(25):
            captured[0].weight.data = captured[0].weight.data.clone()
            captured(images())

    with pytest.warns(UserWarning, match=r"kalmannorm\.capture has recorded nothing of Sequential yet: at each"):
        train_anew()
    assert not recorded


def test_calls_of_ever_new_kinds_are_forgotten(recorded):
    _, captured = pair(Arguments(), warm_up=2)
    for number in range(200):
        captured({"image": images(), "other": images()}, scale=number / 7)
    assert len(captured.forward.seen) < 100


def test_a_copy_records_its_own_graphs(recorded):
    _, captured = pair(warm_up=1)
    for _ in range(2):
        captured(images())
    for other in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert other.forward.module is other
        before = len(recorded)
        for _ in range(2):
            torch.testing.assert_close(other(images()), captured(images()))
        assert len(recorded) == before + 1
        assert other.state_dict().keys() == captured.state_dict().keys()
    del captured.forward
    before = len(recorded)
    for _ in range(3):
        captured(images())
    assert len(recorded) == before


def test_a_pretrained_network_fills_its_corrections_first(recorded):
    plain, captured = pair(pretrained(), warm_up=1)
    for seed in range(4):
        torch.testing.assert_close(captured(images(seed=seed)), plain(images(seed=seed)))
    assert_same_state(captured, plain)
    assert len(recorded) == 1


def test_what_is_no_model_or_no_number_is_refused():
    with pytest.raises(TypeError, match=r"kalmannorm\.capture got function, expected a torch\.nn\.Module"):
        kn.capture(net)
    with pytest.raises(ValueError, match=r"warm_up=0 and shapes=4, expected numbers above 0"):
        kn.capture(net(), warm_up=0)
    with pytest.raises(ValueError, match=r"got BatchNorm2d '0' with momentum=None, expected a number"):
        kn.capture(nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
    with pytest.raises(ValueError, match="Sequential is captured already"):
        kn.capture(kn.capture(net()))


def test_what_cannot_be_recorded_says_what_to_change(recorded, streams):
    def forward(self, x):  # asks for the value of a tensor, now and then
        return self.body(x) * (1.0 if not self.asks or x.mean() > 0 else 2.0)

    _, captured = pair(made_of(forward, body=net(), asks=True), warm_up=1)
    captured(images())
    before = copy.deepcopy(captured.state_dict())
    parameters = [*captured.parameters()]
    with pytest.raises(RuntimeError, match=r"cannot record Net \(operation not .*_scalar_dense\): expected .*\.item"):
        captured(images())
    for name, tensor in before.items():
        assert torch.equal(captured.state_dict()[name], tensor), name
    assert all(p is q for p, q in zip(captured.parameters(), parameters, strict=True))
    assert streams[-1] == "default"
    assert not fake_cuda._Capture.is_unfinished
    captured.asks = False
    captured(images())
    assert len(recorded) == 1


def test_a_rule_that_cannot_be_recorded_takes_no_prior_away(recorded, monkeypatch):
    monkeypatch.setitem(RULES, F.gelu, lambda x, **_: x if x.mean.sum().item() else kn.Unknown("nothing"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    _, captured = pair(model, warm_up=1)
    captured(images())
    with pytest.raises(RuntimeError, match=r"cannot record Sequential \(operation not .*_scalar_dense\)"):
        captured(images())


def test_the_rule_of_a_transposed_convolution_is_recorded(recorded):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3, 2), nn.BatchNorm2d(4))
    plain, captured = pair(model, warm_up=1)
    batches = [images(seed=seed) for seed in range(3)]
    for x in batches:
        torch.testing.assert_close(steps_of(captured, x, times=1), steps_of(plain, x, times=1))
    assert recorded


@pytest.mark.parametrize("is_its_own", [True, False])
def test_a_parameter_that_is_used_by_another_way_is_refused(recorded, is_its_own):
    conv, other = nn.Conv2d(3, 4, 3), nn.Parameter(torch.ones(4, 3, 3, 3))
    kept = [conv.weight if is_its_own else other]
    captured = kn.capture(made_of(lambda self, x: F.conv2d(x, self.kept[0]), conv=conv, kept=kept), warm_up=1)
    captured(images())
    with pytest.raises(RuntimeError, match=r"cannot record Net \(a parameter is used by way of a list"):
        captured(images())


def test_a_second_backward_pass_of_a_call_is_refused(recorded):
    _, captured = pair(warm_up=1)
    captured(images())
    loss = captured(images()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="got a second backward pass of a call, or one after a later call"):
        loss.backward()
    kept = captured(images())
    kept.sum().backward(retain_graph=True)
    captured(images(seed=1)).sum().backward()
    with pytest.raises(RuntimeError, match="got a second backward pass of a call, or one after a later call"):
        kept.sum().backward()


def pretrained():
    trained = net()
    for seed in range(5):
        trained(images(8, seed) * 3 + 1)
    return trained


@pytest.mark.parametrize("awaits_again", ["by its state", "by a batch"])
def test_a_correction_that_is_awaited_is_found_before_a_recording(recorded, awaits_again):
    plain, captured = pair(pretrained(), warm_up=1)
    for model in (plain, captured):
        first = copy.deepcopy(model.state_dict())
        if awaits_again == "by a batch":
            model(images() * torch.inf)
            continue
        for seed in range(4):
            model(images(seed=seed))
        model.load_state_dict(first)
    for seed in range(1, 5):
        expected = plain(images(seed=seed))
        assert expected.isfinite().all()
        torch.testing.assert_close(captured(images(seed=seed)), expected)
    assert_same_state(captured, plain)


def test_a_layer_that_is_never_called_does_not_keep_others_from_a_graph(recorded):
    _, captured = pair(made_of(lambda self, x: self.body(x), body=pretrained(), unused=pretrained()), warm_up=1)
    for seed in range(graphs._MANY + 4):
        captured(images(seed=seed)).sum().backward()
    assert len(recorded) == 1


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_captured_part_of_what_is_captured(recorded, inner_first):
    plain, captured = (kn.convert(Parts(), input_stats=STATS) for _ in range(2))
    kn.capture(captured.body, warm_up=1)
    batches = [images(seed=seed) for seed in range(7)]
    if inner_first:
        for model in (plain, captured):
            train(model, batches[:3])
    kn.capture(captured, warm_up=1)
    torch.testing.assert_close(train(captured, batches), train(plain, batches))
    assert_same_state(captured, plain)
    for model in (plain, captured):
        model.zero_grad()
        model.body(images(seed=9)[:, :1].expand(-1, 4, -1, -1)).sum().backward()
    torch.testing.assert_close(captured.body[0].weight.grad, plain.body[0].weight.grad)


def test_a_recurrent_layer_keeps_its_weights(recorded):
    torch.manual_seed(0)
    model = made_of(
        lambda self, x: self.gru(self.stem(x)[:, 0])[0],
        stem=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), gru=nn.GRU(6, 5),
    )  # fmt: skip
    plain, captured = pair(model, warm_up=1)
    for seed in range(4):
        for model in (plain, captured):
            model.zero_grad()
            model(images(seed=seed)).sum().backward()
        torch.testing.assert_close(captured.gru.weight_ih_l0.grad, plain.gru.weight_ih_l0.grad)
    assert len(recorded) == 1
    assert not captured.gru._weights_have_changed()
    assert captured.gru._flat_weights[0] is captured.gru.weight_ih_l0


class Scaled(nn.Parameter):
    """A parameter of a class of its own."""


def test_parameters_keep_their_class_and_attributes(recorded):
    def forward(self, x):
        return x * self.scale * (self.scale.by if isinstance(self.scale, Scaled) else 1.0)

    scale = Scaled(torch.ones(3, 1, 1))
    scale.by = 2.0
    captured = kn.capture(made_of(forward, scale=scale), warm_up=1)
    for seed in range(3):
        torch.testing.assert_close(captured(images(seed=seed)), 2 * images(seed=seed))
    assert len(recorded) == 1


def test_a_part_that_no_loss_needs_is_no_reason_to_fail(recorded):
    _, captured = pair(made_of(lambda self, x: self.body(x), body=net(), unused=nn.Linear(2, 2)), warm_up=1)
    for seed in range(3):
        captured(images(seed=seed)).sum().backward()
    assert len(recorded) == 1
    assert captured.unused.weight.grad is None


def test_statistics_of_an_input_are_left_for_who_needs_them(recorded):
    def forward(self, given):
        return self.side(torch.ones(2, 2)).sum() + self.body(torch.stack(given))

    side = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plain = kn.convert(made_of(forward, side=side, body=net()), input_stats=STATS)
    captured = copy.deepcopy(plain)
    kn.capture(captured.side, warm_up=1)
    for seed in range(4):
        torch.testing.assert_close(captured([*images(seed=seed)]), plain([*images(seed=seed)]))
    assert recorded


def test_a_recording_leaves_an_earlier_call_its_backward_pass(recorded):
    captured = kn.capture(net(), warm_up=2)
    captured(images())
    waiting = captured(images()).sum()
    (waiting + captured(images(seed=1)).sum()).backward()
    assert len(recorded) == 1


def test_numbers_that_meet_a_belief_are_no_copies(recorded):
    torch.manual_seed(0)
    model = made_of(
        lambda self, x: self.norm(1 - self.plain(self.conv(x)) + 3.0),
        conv=nn.Conv2d(3, 4, 3), plain=nn.GroupNorm(2, 4, affine=False), norm=nn.BatchNorm2d(4),
    )  # fmt: skip
    plain, captured = pair(model, warm_up=1)
    for seed in range(3):
        torch.testing.assert_close(captured(images(seed=seed)), plain(images(seed=seed)))
    assert len(recorded) == 1


def test_without_a_gpu_it_is_the_model_itself():
    plain, captured = pair(warm_up=1)
    batches = [images(seed=seed) for seed in range(3)]
    torch.testing.assert_close(train(captured, batches), train(plain, batches), rtol=0, atol=0)
    assert not captured.forward.graphs


def test_its_arguments_have_the_names_of_the_networks_own(recorded):
    model = made_of(
        lambda self, mask, image: self.body(image) * mask, body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    )
    model = kn.connect(kn.capture(kn.convert(model)), input_stats={"image": ([0.0] * 3, [1.0] * 3)})
    assert kn.describe(model, torch.ones(1), torch.randn(2, 3, 6, 6)).with_prior == 1


def steps_of(model, *args, times=4, **kwargs):
    for _ in range(times):
        y = model(*args, **kwargs)
        y.float().sum().backward()
    return y.detach()


def test_a_recording_leaves_the_random_state(recorded):
    plain, captured = pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()), warm_up=1)
    outputs = []
    for model in (plain, captured):
        torch.manual_seed(3)
        outputs.append(torch.stack([steps_of(model, images(), times=1) for _ in range(4)]))
    assert recorded
    torch.testing.assert_close(outputs[1], outputs[0])


def test_online_layers_in_evaluation_are_recorded_anew(recorded):
    _, captured = pair(warm_up=1)
    captured[1].eval()
    steps_of(captured, images())
    with kn.online_statistics(captured):
        steps_of(captured, images())
    assert len(recorded) == 2


def test_changes_between_recordings_are_no_reason_to_warn(recorded, monkeypatch):
    monkeypatch.setattr(graphs, "_MANY", 4)
    _, captured = pair(warm_up=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            captured[3].weight.data = captured[3].weight.data.clone()
            steps_of(captured, images(), times=2)
    assert len(recorded) == 6


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_is_recorded_anew(recorded):
    _, captured = pair(warm_up=1)
    steps_of(captured, images())
    torch.set_autocast_enabled("cuda", True)
    try:
        steps_of(captured, images())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert len(recorded) == 2


def test_inputs_with_and_without_gradients_have_graphs_of_their_own(recorded):
    plain, captured = pair(warm_up=1)
    steps_of(captured, images())
    x, z = images().requires_grad_(), images().requires_grad_()
    steps_of(captured, x)
    steps_of(plain, z)
    assert len(recorded) == 2
    torch.testing.assert_close(x.grad.isfinite(), z.grad.isfinite())


def test_numbers_of_other_types_have_graphs_of_their_own(recorded):
    model = made_of(lambda self, x, by: self.norm(x) if by is True else self.norm(x) * 2, norm=nn.BatchNorm2d(3))
    _, captured = pair(model, warm_up=1)
    steps_of(captured, images(), True)
    steps_of(captured, images(), 1)
    assert len(recorded) == 2


def test_a_frozen_layer_is_recorded_anew(recorded):
    _, captured = pair(warm_up=1)
    for p in captured[1].parameters():
        p.requires_grad_(False)
    steps_of(captured, images())
    captured[1].frozen = True
    steps_of(captured, images())
    assert len(recorded) == 2


def test_other_strides_have_graphs_of_their_own(recorded):
    _, captured = pair(warm_up=1)
    steps_of(captured, images())
    steps_of(captured, images().contiguous(memory_format=torch.channels_last))
    assert len(recorded) == 2


def test_inputs_of_other_types_have_graphs_of_their_own(recorded):
    _, captured = pair(made_of(lambda self, x: self.norm(x.float()).to(x.dtype), norm=nn.BatchNorm2d(3)), warm_up=1)
    assert steps_of(captured, images()).dtype == torch.float32
    assert steps_of(captured, images().bfloat16()).dtype == torch.bfloat16


def test_recordings_use_other_parameters_also_where_modules_and_weights_are_shared():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "tied": nn.Linear(2, 2), "r": nn.LSTM(2, 2)})
    model["again"], model["tied"].weight = model["a"], model["a"].weight
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    with graphs._twins(model) as twins:
        assert {*map(id, model.parameters())} == {*map(id, twins)} >= {id(p) for p in model["r"]._flat_weights}
    assert before == [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
