"""The layers under each of PyTorch's ways of running a network."""

import copy
import gc
import operator
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import made_of, prior_of, through_a_file
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import kalmannorm as kn
from kalmannorm.kernels import on_cpu
from kalmannorm.kernels.autograd import constant_to_compilers
from kalmannorm.recording import is_open
from kalmannorm.steps import step_of


def stock_net(**options):
    """Two normalization layers, so that there is a prior."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5, **options), nn.SiLU(),
        nn.Flatten(), nn.Linear(180, 2),
    )  # fmt: skip


def net(dtype=torch.float32, **options):
    return kn.convert(stock_net(), **options).to(dtype)


def images(samples=2, dtype=torch.float32):
    return torch.randn(samples, 3, 6, 6, dtype=dtype)


def step(model, x):
    """One forward and backward pass: the output, and each parameter's gradient."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(got, expected, tolerance=0.0):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """How many graphs were compiled so far."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compare_with_eager(model, inputs, **options):
    """In double, as rounding adds up over the layers of a deep network."""
    compiled = copy.deepcopy(model)
    fast = torch.compile(compiled, fullgraph=True, **options)
    for x in inputs:
        torch.manual_seed(1)
        y, gradients = step(model, x)
        torch.manual_seed(1)
        compiled.zero_grad()
        fast_y = fast(x)
        fast_y.square().sum().backward()
        equal(fast_y, y, 1e-5)
        equal({name: p.grad for name, p in compiled.named_parameters()}, gradients, 1e-5)
        equal(buffers(compiled), buffers(model), 1e-5)
    assert not is_open()


@pytest.mark.slow
def test_a_resnet_compiles_as_one_graph_once(graphs):
    """A block that keeps the shape, and one that halves it."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    whole = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    whole.layer3, whole.layer4, whole.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)
    model = kn.convert(whole).double()
    compare_with_eager(model, torch.randn(2, 2, 3, 64, 64, dtype=torch.float64), backend="aot_eager")
    assert graphs() == 1


@pytest.mark.slow
def test_inductor(graphs):
    compare_with_eager(net(), [images(), images()], backend="inductor")
    assert graphs() == 1


@pytest.mark.slow
def test_a_compiler_transposes_no_activation_for_the_layers():
    """It keeps activations channels-last, and would, for an operator that asked for the strides of eager mode."""
    from torch._inductor.utils import run_and_get_code

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3))
    written = []
    for each in (model, kn.convert(copy.deepcopy(model), input_stats=([0.0] * 3, [1.0] * 3))):
        run = torch.compile(each)
        _, code = run_and_get_code(lambda run=run: run(images()).sum().backward())
        written.append("".join(code).count("transpose_mxn"))
    assert 0 < written[1] <= written[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"stats_batch_size": 1}], ids=str)
def test_compiled_for_any_batch_size(graphs, options):
    inputs = [images(n, torch.float64) for n in (2, 3, 5)]
    compare_with_eager(net(torch.float64, **options), inputs, backend="aot_eager", dynamic=True)
    assert graphs() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"stats_batch_size": 1}, kn.preset("paper"), kn.preset("released")], ids=str)
def test_options_compile_too(graphs, options):
    compare_with_eager(net(torch.float64, **options), images(4, torch.float64).split(2), backend="aot_eager")
    assert graphs() == 1


# -- reduced precision -----------------------------------------------------------------------------


def labels_of(x):
    return (x.mean((1, 2, 3)) > 0).long()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    model, x = net(), images(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(x)
            loss = F.cross_entropy(y, labels_of(x))
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(t.dtype != dtype and t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_nearly_what_float32_does(dtype):
    model, x = net(), images(8)
    reference, gradients = step(copy.deepcopy(model), x)
    with torch.autocast("cpu", dtype):
        y, low_gradients = step(model, x)
    equal(y.float(), reference, 0.05)
    for name, gradient in gradients.items():
        assert (low_gradients[name] - gradient).norm() <= 0.05 * gradients["0.weight"].norm() + 0.05 * gradient.norm()


def test_a_step_that_the_scaler_skips_leaves_running_statistics_finite():
    model, x = net(), images()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # no gradient of float16 can be so large
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    equal([p.detach() for p in model.parameters()], before)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model[1].num_batches_tracked == 1


def test_training_in_double_is_the_reference_of_float():
    double, single, x = net(torch.float64), net(), images()
    y, gradients = step(double, x.double())
    assert y.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in double.parameters())
    single_y, single_gradients = step(single, x)
    equal(single_y.double(), y, 1e-5)
    for name, gradient in gradients.items():
        equal(single_gradients[name].double(), gradient, 1e-4)
    # What is computed in between is double too, or it would not differ from the other by so little.
    copied = copy.deepcopy(double)
    nudged, _ = step(copied, x.double() + 1e-12)
    assert 0 < (nudged - y).abs().max() < 1e-9


# -- memory formats --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "memory_format"), [(4, torch.channels_last), (5, torch.channels_last_3d)], ids=["4-d", "5-d"]
)
@pytest.mark.parametrize("options", [{}, {"stats_batch_size": 1}, {"guard": 100.0}, kn.preset("paper")], ids=str)
class TestChannelsLast:
    def layers(self, rank, options):
        """The stock network and ours."""
        torch.manual_seed(0)
        conv, norm = {4: (nn.Conv2d, nn.BatchNorm2d), 5: (nn.Conv3d, nn.BatchNorm3d)}[rank]
        stock = nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU(), conv(4, 5, 3), norm(5))
        return stock, kn.convert(copy.deepcopy(stock), **options)

    def test_is_kept_from_input_to_output_and_back(self, rank, memory_format, options):
        x = torch.randn(2, 3, *[6] * (rank - 2)).to(memory_format=memory_format).requires_grad_()
        for model in self.layers(rank, options):
            model.to(memory_format=memory_format)
            seen = []

            def look(module, args, y, seen=seen):
                seen.append(y)
                y.register_hook(seen.append)

            for module in model:
                module.register_forward_hook(look)
            y = model(x)
            y.square().sum().backward()
            seen += [x.grad]
            assert len(seen) == 11
            assert all(t.is_contiguous(memory_format=memory_format) for t in seen)

    def test_equals_contiguous(self, rank, memory_format, options):
        _, model = self.layers(rank, options)
        other = copy.deepcopy(model).to(memory_format=memory_format)
        x = torch.randn(2, 3, *[6] * (rank - 2))
        torch.manual_seed(1)
        expected = step(model, x)
        torch.manual_seed(1)
        got = step(other, x.to(memory_format=memory_format))
        equal(got[0], expected[0], 1e-5)
        equal(got[1], expected[1], 1e-3)
        equal(buffers(other), buffers(model), 1e-5)


def test_group_layers_keep_the_memory_format_as_group_norm_does():
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4))
    expected = model(x).is_contiguous(memory_format=torch.channels_last)
    assert kn.convert(model, layers=("group",))(x).is_contiguous(memory_format=torch.channels_last) == expected


# -- determinism, accumulation ---------------------------------------------------------------------


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", [{}, {"stats_batch_size": 1}, kn.preset("paper")], ids=str)
def test_deterministic_algorithms(options):
    def train():
        model = net(**options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(2)
        for _ in range(3):
            y, gradients = step(model, images())
            optimizer.step()
        return y, gradients, model.state_dict()

    equal(train(), train())


def test_gradients_of_micro_batches_add_up():
    model, apart = net(torch.float64), [net(torch.float64) for _ in range(2)]
    batches = [images(2, torch.float64) for _ in range(2)]
    # Both forward passes first: the beliefs of one must not meet the other's.
    losses = [model(x).square().sum() for x in batches]
    for loss in losses:
        loss.backward()
    gradients = [step(m, x)[1] for m, x in zip(apart, batches, strict=True)]
    for name, parameter in model.named_parameters():
        equal(parameter.grad, gradients[0][name] + gradients[1][name], 1e-10)


# -- checkpoints -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose checkpoint is around a function, as those of detectors are, not a module."""

    def __init__(self, use):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.use = use

    def inner(self, x):
        y = F.dropout(F.relu(self.first_norm(self.first(x))), 0.2)
        return x + self.second_norm(self.second(y))

    def forward(self, x):
        return F.relu(self.use(self.inner, x))


def block_net(use, **options):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return kn.convert(nn.Sequential(stem, Block(use), Block(use)), **options).double()


def call(function, x):
    return function(x)


def call_in_checkpoint(function, x):
    return checkpoint(function, x, use_reentrant=False)


def call_in_reentrant_checkpoint(function, x):
    return checkpoint(function, x, use_reentrant=True)


@pytest.mark.parametrize(
    "options", [{}, {"stats_batch_size": 1}, {**kn.preset("paper"), "estimator": "exact"}], ids=str
)
def test_a_checkpointed_function_finds_its_beliefs_when_it_runs_again(options):
    plain, saving = (block_net(use, **options) for use in (call, call_in_checkpoint))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)
        results.append((*step(model, x), buffers(model)))
    equal(results[1], results[0], 1e-12)  # gradients may be summed in another order
    assert not is_open()


def test_checkpoint_sequential():
    plain = net(torch.float64)
    saving = made_of(
        lambda self, x: checkpoint_sequential(list(self.layers), 3, x, use_reentrant=False),
        layers=copy.deepcopy(plain),
    )
    kn.connect(saving)
    x = images(2, torch.float64).requires_grad_()
    y, gradients = step(plain, x)
    saving_y, saving_gradients = step(saving, x)
    equal(saving_y, y)
    equal(list(saving_gradients.values()), list(gradients.values()), 1e-12)


def test_a_reentrant_checkpoint_of_a_function_says_what_to_use():
    model = block_net(call_in_reentrant_checkpoint)
    y = model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"KalmanNorm2d '2\.first_norm' .*checkpoint\(\.\.\., use_reentrant=False\)"):
        y.sum().backward()
    assert not is_open()


def test_a_reentrant_checkpoint_of_a_module_says_what_to_use():
    model = made_of(
        lambda self, x: checkpoint(self.block, self.stem(x), use_reentrant=True),
        stem=nn.BatchNorm2d(4), block=Block(call_in_checkpoint),
    )  # fmt: skip
    model = kn.convert(model)
    y = model(torch.randn(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()
    assert not is_open()


@pytest.mark.parametrize("mode", ["eval", "gain 1"])
def test_a_reentrant_checkpoint_is_allowed_where_no_belief_is_needed(mode):
    options = {"gain": 1.0} if mode == "gain 1" else {}
    plain, saving = (block_net(use, **options).train(mode != "eval") for use in (call, call_in_reentrant_checkpoint))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for model in (plain, saving):
        torch.manual_seed(1)
        y = model(x)
        used = [p for n, p in model.named_parameters() if not n.endswith(("gain", "process_noise"))]
        y.square().sum().backward()
        results.append((y, [p.grad for p in used]))
    equal(results[1], results[0], 1e-12)


def test_a_checkpoint_that_ends_in_a_kalman_layer_is_not_taken_for_a_reentrant_one():
    def ending(use):
        model = stock_net()
        return kn.convert(made_of(lambda self, x: use(self.block, self.stem(x)), stem=model[:2], block=model[3:5]))

    plain, saving = ending(call), ending(call_in_checkpoint)
    x = images()
    equal(step(saving, x), step(plain, x), 1e-5)


def test_training_without_gradients_is_no_reentrant_checkpoint():
    model, x = net(), images()
    expected = step(copy.deepcopy(model), x)[0]
    with torch.no_grad():
        equal(model(x), expected)
    assert model[4].num_batches_tracked == 1


# -- torch.func ------------------------------------------------------------------------------------


def functional_net(training=True, kalman=True, **options):
    """A network without its head, its parameters, and a function of parameters, buffers and input."""
    model = stock_net(**options)[:6]
    model = (kn.convert(model) if kalman else model).double().train(training)

    def run(parameters, buffers, x):
        return functional_call(model, {**parameters, **buffers}, (x,))

    return model, dict(model.named_parameters()), run


def batches(count=3):
    return torch.randn(count, 2, 3, 6, 6, dtype=torch.float64)


def test_grad_of_a_functional_call_is_what_backward_gives():
    model, parameters, run = functional_net()
    x = batches()[0]
    got = grad(lambda p: run(p, {n: b.clone() for n, b in model.named_buffers()}, x).square().sum())(parameters)
    _, expected = step(model, x)
    equal(got, expected, 1e-10)
    assert expected["4.gain"].any()


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"guard": 3.0}], ids=str)
def test_many_gradients_at_once(options):
    """As torch's own vectorized Jacobians have them: a kernel finds no memory in such gradients."""
    x = images().requires_grad_()
    y = net(**options)(x).flatten()
    rows = torch.eye(y.numel())
    (at_once,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]
    equal(at_once, torch.stack(one_by_one), 1e-6)
    assert not at_once.requires_grad


# Where running statistics are not updated, BatchNorm works under every transform.
WITHOUT_UPDATES = [{"training": False}, {"track_running_stats": False}]


@pytest.mark.parametrize("options", WITHOUT_UPDATES, ids=str)
class TestTransforms:
    def test_vmap(self, options):
        model, _, _ = functional_net(**options)
        x = batches()
        equal(vmap(model)(x), torch.stack([model(each) for each in x]), 1e-12)

    def test_gradients_of_each_batch(self, options):
        model, parameters, run = functional_net(**options)
        x = batches()
        own = dict(model.named_buffers())
        each = grad(lambda p, x: run(p, own, x).square().sum())
        got = vmap(each, (None, 0))(parameters, x)
        for i, batch in enumerate(x):
            expected = each(parameters, batch)
            equal({n: g[i] for n, g in got.items()}, expected, 1e-10)

    def test_jacobians(self, options):
        model, _, _ = functional_net(**options)
        x = batches()[0, :, :, :2, :2].contiguous()
        by_hand = torch.autograd.functional.jacobian(model, x)
        equal(jacrev(model)(x), by_hand, 1e-10)
        equal(jacfwd(model)(x), by_hand, 1e-10)

    def test_second_derivatives(self, options):
        model, _, _ = functional_net(**options)
        x = batches()[0, :, :, :2, :2].contiguous()
        expected = torch.autograd.functional.hessian(lambda x: model(x).pow(3).sum(), x)
        equal(torch.func.hessian(lambda x: model(x).pow(3).sum())(x), expected, 1e-8)

    def test_forward_mode(self, options):
        model, _, _ = functional_net(**options)
        x, direction = batches(2)
        small = 1e-6 * direction
        expected = (model(x + small) - model(x - small)) / 2e-6
        equal(jvp(model, (x,), (direction,))[1], expected, 1e-5)
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x, direction))
            equal(forward_ad.unpack_dual(y).tangent, expected, 1e-5)


@pytest.mark.parametrize("change", [
    lambda net, x: F.relu(x, inplace=True), lambda net, x: x.sigmoid_(), lambda net, x: x.mul_(2.0),
    lambda net, x: operator.iadd(torch.tanh(x), x),
])  # fmt: skip
def test_changes_in_place_that_vmap_does_not_count(change):
    norms = {"first": nn.BatchNorm2d(3), "between": nn.Conv2d(3, 3, 3), "second": nn.BatchNorm2d(3)}
    model = made_of(lambda self, x: self.second(change(self, self.between(self.first(x)))), **norms)
    model = kn.convert(model.double(), track_running_stats=False, stats_batch_size=None)
    x = batches()
    equal(vmap(model)(x), torch.stack([model(each) for each in x]), 1e-12)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jacfwd"])
def test_running_statistics_that_cannot_be_updated_are_an_error_as_batch_norms(transform):
    def attempt(kalman):
        model, parameters, run = functional_net(kalman=kalman)
        x = batches()
        own = dict(model.named_buffers())
        if transform == "vmap":
            vmap(model)(x)
        elif transform == "grad":
            grad(lambda p: run(p, own, x[0]).sum())(parameters)
        else:
            jacfwd(model)(x[0])

    with pytest.raises(RuntimeError):
        attempt(kalman=False)
    with pytest.raises(RuntimeError, match=r"KalmanNorm2d '1' cannot update its running statistics .* expected eval"):
        attempt(kalman=True)
    assert not is_open()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("training", "options"), [
    (True, {}), (False, {}), (True, {"stats_batch_size": 1}), (True, {"track_running_stats": False}),
])  # fmt: skip
def test_an_ensemble(training, options):
    """Training too: each model's running statistics are then an argument of the function."""
    models = [kn.convert(stock_net()[:6], **options).double().train(training) for _ in range(3)]
    for model in models[1:]:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    x = batches()[0]
    parameters, own = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    y = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, own)
    equal(y, torch.stack([model(x) for model in models]), 1e-10)
    equal(own, stack_module_state(models)[1], 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_compiled_ensemble():
    models = [kn.convert(stock_net()[:6], stats_batch_size=1) for _ in range(2)]
    x, (parameters, own) = torch.randn(2, 3, 6, 6), stack_module_state(models)

    def ensemble(buffers):
        return vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)

    y = torch.compile(ensemble, backend="eager")({name: buffer.clone() for name, buffer in own.items()})
    equal(y, ensemble(own), 1e-5)


def test_draws_under_vmap_follow_its_randomness():
    model = kn.convert(stock_net(track_running_stats=False)[:6], estimator="monte_carlo").double()
    x = batches()[:1].expand(2, -1, -1, -1, -1)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(x)
    same, different = (vmap(model, randomness=randomness)(x) for randomness in ("same", "different"))
    equal(same[0], same[1], 1e-12)
    assert (different[0] - different[1]).abs().max() > 1e-3


# -- hooks -----------------------------------------------------------------------------------------


def prior_of_last_norm(model, x):
    """What its last normalization layer is told of its input."""
    seen = {}
    layer = [module for module in model.modules() if isinstance(module, kn.KalmanNorm2d)][-1]

    def look(layer, args):
        seen["prior"] = prior_of(args[0], 1)

    handle = layer.register_forward_pre_hook(look)
    model(x)
    handle.remove()
    return seen["prior"]


def two_norms(between=None):
    torch.manual_seed(0)
    return kn.convert(nn.Sequential(nn.BatchNorm2d(3), between or nn.Identity(), nn.BatchNorm2d(3)))


def test_a_hook_that_changes_the_output_moves_the_belief():
    model, x = two_norms(), images()
    plain = prior_of_last_norm(model, x)
    model[0].register_forward_hook(lambda layer, args, y: y * 2)
    changed = prior_of_last_norm(model, x)
    equal(changed.var, 4 * plain.var, 1e-6)
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] + 1,), prepend=True)
    changed = prior_of_last_norm(model, x)
    equal((changed.mean, changed.var), (2 * plain.mean + 1, 4 * plain.var), 1e-6)


def test_a_global_hook_that_changes_outputs_moves_the_belief():
    model, x = two_norms(), images()
    plain = prior_of_last_norm(model, x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 3 if isinstance(module, nn.Identity) else None
    )
    try:
        equal(prior_of_last_norm(model, x).var, 9 * plain.var, 1e-6)
    finally:
        handle.remove()
    assert not is_open()


def test_hooks_of_the_network_itself_run_outside_of_the_mode_or_inside_and_close_it():
    model, x = net(), images()
    expected = step(copy.deepcopy(model), x)[0]
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, y: y + 1)
    equal(step(model, x / 2)[0], expected + 1, 1e-6)
    assert not is_open()


@pytest.mark.parametrize("where", ["a Kalman layer", "a convolution", "the network", "everywhere"])
def test_backward_hooks_change_no_gradient(where):
    """They pass a module's input and output through an autograd function that is no torch call."""
    model, x = net(torch.float64), images(2, torch.float64).requires_grad_()
    expected = step(model, x)
    x_grad, x.grad = x.grad, None
    chosen = {"a Kalman layer": [model[1]], "a convolution": [model[3]], "the network": [model]}
    calls = []
    for module in chosen.get(where, list(model.modules())):
        module.register_full_backward_hook(lambda module, *gradients: calls.append(module))
        module.register_full_backward_pre_hook(lambda module, *gradients: calls.append(module))
    got = step(model, x)
    assert len(calls) >= 2
    equal(got, expected, 1e-12)
    equal(x.grad, x_grad, 1e-12)


# -- copies and files ------------------------------------------------------------------------------


def train(model, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        step(model, images())
        optimizer.step()
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_in_the_middle_of_training_trains_on_alone(copied):
    model = train(net())
    y = model(images())  # a graph and beliefs exist
    twin = copied(model)
    y.sum().backward()
    twin.zero_grad()
    before = copy.deepcopy(twin.state_dict())
    batch = images()
    torch.manual_seed(3)
    train(model)
    equal(twin.state_dict(), before)
    torch.manual_seed(3)
    train(twin)
    equal(twin.state_dict(), model.state_dict())
    # Its layers are told of by its own hooks.
    assert kn.describe(twin, batch).with_prior == 1
    with torch.no_grad():
        model[1].bias.fill_(7.0)
    before = prior_of_last_norm(twin, batch).mean
    with torch.no_grad():
        twin[1].bias.fill_(7.0)
    assert not prior_of_last_norm(twin, batch).mean.equal(before)
    equal(prior_of_last_norm(model, batch).mean, prior_of_last_norm(twin, batch).mean)


def test_a_state_dict_goes_through_a_file_of_weights_alone():
    model = train(net())
    fresh = net()
    fresh.load_state_dict(through_a_file(model.state_dict(), weights_only=True))
    x = images()
    equal(step(fresh, x), step(model, x))
    equal(fresh.state_dict(), model.state_dict())


# -- parametrizations ------------------------------------------------------------------------------


def add_weight_norm(conv):
    parametrizations.weight_norm(conv)
    return ["parametrizations.weight.original0", "parametrizations.weight.original1"]


def add_old_weight_norm(conv):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(conv)
    return ["weight_g", "weight_v"]


def add_spectral_norm(conv):
    parametrizations.spectral_norm(conv)
    return ["parametrizations.weight.original"]


def add_old_spectral_norm(conv):
    nn.utils.spectral_norm(conv)
    return ["weight_orig"]


def add_orthogonal(conv):
    parametrizations.orthogonal(conv)
    return ["parametrizations.weight.original"]


def add_pruning(conv):
    prune.random_unstructured(conv, "weight", 0.4)
    return ["weight_orig"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "parametrize",
    [add_weight_norm, add_old_weight_norm, add_spectral_norm, add_old_spectral_norm, add_orthogonal, add_pruning],
)
class TestParametrizations:
    def net(self, parametrize):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, padding=1).double()
        names = parametrize(conv)
        if "orthogonal" not in parametrize.__name__:  # those start at what they were, that stays what it is
            for name in names:
                conv.get_parameter(name).data += 0.1
        model = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(4))).double()
        return model.train(), [conv.get_parameter(name) for name in names]

    def test_the_belief_crosses_by_the_weight_in_effect(self, parametrize):
        model, _ = self.net(parametrize)
        prior = prior_of_last_norm(model, images(dtype=torch.float64))
        model[2].eval()  # a spectral norm changes its weight with each call in training
        weight = model[2].weight
        # What the first layer hands on is, nearly, a standard normal; its rectified part:
        mean, second = (2 * torch.pi) ** -0.5, 0.5
        expected_mean = weight.sum((1, 2, 3)) * mean + model[2].bias
        expected_var = weight.square().sum((1, 2, 3)) * (second - mean**2)
        equal((prior.mean[0], prior.var[0]), (expected_mean, expected_var), 1e-4)

    def test_gradients_reach_the_original_parameters_through_the_belief(self, parametrize):
        """Only through it: the activation itself is cut off."""
        model, originals = self.net(parametrize)
        x = images(dtype=torch.float64)

        def loss():
            prior = prior_of_last_norm(model, x)
            return prior.mean.pow(3).sum() + prior.var.pow(2).sum()

        if "spectral" in parametrize.__name__:  # a fixed number of power iterations, or each call differs
            model[2].eval()
        gradients = torch.autograd.grad(loss(), originals)
        for original, gradient in zip(originals, gradients, strict=True):
            assert gradient.any()
            direction = torch.randn_like(original)
            with torch.no_grad():
                original += 1e-6 * direction
                above = loss()
                original -= 2e-6 * direction
                below = loss()
                original += 1e-6 * direction
            torch.testing.assert_close((gradient * direction).sum(), (above - below) / 2e-6, rtol=1e-5, atol=1e-6)

    def test_it_trains(self, parametrize):
        model, originals = self.net(parametrize)
        before = [original.detach().clone() for original in originals]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            model.zero_grad()
            model(images(dtype=torch.float64)).pow(3).sum().backward()
            optimizer.step()
        for original, old in zip(originals, before, strict=True):
            assert (original - old).abs().max() > 1e-6


# -- errors and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("where", range(8))
def test_after_an_error_anywhere_the_next_step_is_as_in_a_fresh_process(where):
    model, fresh, x = net(), net(), images()

    def fail(module, args):
        raise RuntimeError("stop")

    start = copy.deepcopy(model.state_dict())
    handle = model[where].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(x)
    assert not is_open()
    handle.remove()
    model.load_state_dict(start)
    equal(step(model, x), step(fresh, x))
    equal(model.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("options", [{}, kn.preset("paper")], ids=str)
def test_beliefs_are_freed_with_the_graph_of_their_step(options):
    model = net(**options)
    kept = []

    def look(module, args, y):
        belief = step_of(y)
        if belief is not None and belief.belief is not None:
            kept.append(weakref.ref(belief.belief.mean))

    for module in model.modules():
        if isinstance(module, kn.KalmanNorm2d):
            module.register_forward_hook(look)
    gc.disable()  # by their counts alone: nothing may be held in a circle
    try:
        loss = model(images()).square().sum()
        loss.backward()
        assert len(kept) == 2
        del loss
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


class Between(nn.Module):
    """Functions, each between the same first norm and a second one of its own."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.seconds = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in functions])

    def forward(self, x):
        x = self.first(x)
        return [second(function(x)) for function, second in zip(self.functions, self.seconds, strict=True)]


def equal_by_name(found, expected, names):
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_without_kernels_each_parameter_gets_a_gradient(monkeypatch):
    """Which DistributedDataParallel waits for; the first layer has no prior."""
    monkeypatch.setattr(on_cpu, "is_available", constant_to_compilers(lambda: False))
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    torch.compile(model, fullgraph=True, backend="aot_eager")(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("strict", [None, True])
def test_what_a_compiler_sees_of_functions(strict):
    """Some are hidden from modes, by torch.compile or a strict export, unless something is done."""
    functions = {
        "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "relu_": lambda h: F.relu_(h + 1),
        "elu_": lambda h: F.elu_(h + 1), "sigmoid_": lambda h: torch.sigmoid_(h + 1), "rsub": lambda h: 2 - h,
        "line": lambda h: 2 * h - h / 3, "power": lambda h: (h ** 2)[:, [1, 0, 3, 2]],
        "gate": lambda h: h * h.mean((2, 3), True),
        "norm": lambda h: h / h.norm(dim=1, keepdim=True) - torch.logsumexp(h, 1, keepdim=True),
        "masks": lambda h: torch.where((h > 0) & ~(h > 1) | (h >= 2), h, 0.1 * h),
        "reflected": lambda h: h * (operator.lt(0.5, h) | operator.ge(-0.5, h)) * (h != 0),
        "shift": lambda h: h - 2 * F.pad(h[..., 1:], (0, 1)),
    }  # fmt: skip
    torch.manual_seed(0)
    # One norm behind all of them, as a compiler takes seconds for each: its prior has channels of every function.
    model = kn.convert(made_of(
        lambda self, x: self.second(torch.cat([f(y) for y in [self.first(x)] for f in self.functions], 1)),
        first=nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), second=nn.BatchNorm2d(4 * len(functions)),
        functions=[*functions.values()],
    ), input_stats=([0.0] * 3, [1.0] * 3), track_running_stats=False)  # fmt: skip
    x = images()
    for layer in (model.eval().first[1], model.second):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    assert kn.describe(model, x).with_prior == 2
    expected = model(x)
    compiled = (
        torch.export.export(model, (x,), strict=True).module() if strict
        else torch.compile(model, fullgraph=True, backend="eager")
    )  # fmt: skip
    equal_by_name(compiled(x).split(4, 1), expected.split(4, 1), functions)


@pytest.mark.parametrize("last", [False, True])
def test_a_strict_export_of_operators_without_a_rule(last):
    """They keep their own order of arguments, and may be the last thing that a network does."""
    functions = {
        "not": lambda h: h * (h > 0).logical_xor(h > 1), "xor": lambda h: h * ((h > 0) ^ (h > 1)),
        "rmod": lambda h: 7 % (h.abs() + 1), "floordiv": lambda h: h // 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = kn.convert(Between([*functions.values()]), input_stats=([0.0] * 3, [1.0] * 3), calibrate=False)
    if last:  # functions behind a network
        model = kn.connect(made_of(
            lambda self, x: [function(y) for function, y in zip(functions.values(), self.network(x), strict=True)],
            network=model,
        ))  # fmt: skip
    x = images()
    with pytest.warns(UserWarning, match="4 of 5 Kalman layers of .* have no prior"):
        expected = copy.deepcopy(model)(x)
    equal_by_name(torch.export.export(model, (x,), strict=True).module()(x), expected, functions)


# -- functions that look for BatchNorm -------------------------------------------------------------


def test_layers_are_torchs_classes():
    """Helpers ask `isinstance`."""
    assert isinstance(kn.KalmanNorm(3), nn.modules.batchnorm._BatchNorm)
    assert isinstance(kn.KalmanNorm1d(3), nn.BatchNorm1d)
    assert isinstance(kn.KalmanNorm2d(3), nn.BatchNorm2d)
    assert isinstance(kn.KalmanNorm3d(3), nn.BatchNorm3d)
    assert isinstance(kn.GroupKalmanNorm(1, 3), nn.GroupNorm)


@pytest.mark.parametrize("gain", [1.0, "prior-strength"])
def test_update_bn(gain):
    """Weight averaging ends with it: running statistics become the mean over the batches of the loader."""
    model = net(gain=gain)
    seen = []
    model[1].collect = lambda posterior, samples: seen.append(posterior.mean[0].detach())
    loader = [images(4) for _ in range(5)]
    torch.optim.swa_utils.update_bn(loader, model)
    equal(model[1].running_mean, torch.stack(seen).mean(0), 1e-5)
    if gain == 1.0:
        stock = stock_net()
        torch.optim.swa_utils.update_bn(loader, stock)
        equal(model[4].running_var, stock[4].running_var, 1e-5)


def test_a_loop_over_batchnorm_layers_puts_them_into_eval():
    """Statistics stay; each parameter gets a gradient, as DistributedDataParallel expects."""
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    before = buffers(model)
    step(model, images())
    equal(buffers(model), before)


def test_tracking_that_is_switched_off_by_hand():
    """As Lightning's `freeze_module` does: statistics stay, and a step normalizes by the batch still."""
    model, stock = net(gain=1.0), stock_net()
    for module in (*model.modules(), *stock.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    before = buffers(model)
    x = images()
    equal(model(x), stock(x), 1e-5)
    equal(buffers(model), before)


def test_replace_all_batch_norm_modules():
    """`torch.func` drops running statistics before a call is mapped over samples."""
    model = net()
    torch.func.replace_all_batch_norm_modules_(model)
    assert model[1].running_mean is None

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    x = torch.randn(3, 2, 3, 6, 6)
    mapped = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
    _, expected = step(model, x[1])
    equal({name: g[1] for name, g in mapped.items()}, expected, 1e-4)


def test_timm_freezes_and_the_layers_above_keep_their_priors():
    timm_layers = pytest.importorskip("timm.layers")
    model = net().eval()
    x = images()
    expected = model(x)
    model[1] = timm_layers.freeze_batch_norm_2d(model[1])
    equal(model(x), expected, 1e-5)
    kn.connect(model, input_stats=([0.0] * 3, [1.0] * 3))
    assert kn.describe(model, x).rows[0].prior_from == ("input",)


def test_layers_that_were_replaced_are_reported():
    """`convert_sync_batchnorm` takes a Kalman layer for BatchNorm and says nothing; the next call does."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    with pytest.warns(UserWarning, match="2 of 2 Kalman layers of Sequential were replaced.*the first is '1'"):
        model(images())
    half = net()
    half[4] = nn.BatchNorm2d(5)
    with pytest.warns(UserWarning, match=r"1 of 2 .*kalmannorm.connect\(model\)"):
        half(images())
    half(images())  # a second warning would be an error here
    kn.connect(half)(images())  # as the warning says: no other one comes
    activated = kn.connect(nn.Sequential(nn.Conv2d(3, 4, 1), kn.KalmanNormAct2d(4, act=nn.ReLU())))
    activated[1] = nn.BatchNorm2d(4)
    with pytest.warns(UserWarning, match=r"'1', with their activations, which kalmannorm\.freeze would keep"):
        activated(images())


def test_a_new_head_is_to_be_converted():
    model = net()
    model[4] = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
    with pytest.warns(UserWarning, match=r"first is '4'.* kalmannorm\.convert\(model\) converts the new ones"):
        model(images())
    kn.convert(model)(images()[:1])


def test_layers_that_were_only_removed_are_not_reported():
    model = nn.Sequential()
    model.body, model.head = stock_net(), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    kn.convert(model)
    model.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 5))  # where a norm was is none
    model(images())  # a warning would be an error here
    stem = nn.Sequential()
    stem.bn1, stem.layer = nn.BatchNorm2d(3), nn.Sequential()
    stem.layer.bn1 = nn.BatchNorm2d(3)
    kn.convert(stem)
    stem.layer = nn.Identity()  # where the stem has a layer of the same last name
    stem(images())


def test_a_fused_convolution():
    """torch's own function folds a Kalman layer by its attributes."""
    model = net().eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    x = images()
    equal(fused(x), model[:2](x), 1e-5)


def test_mmengine_builds_the_layer_by_name():
    registry = pytest.importorskip("mmengine.registry")
    registry.MODELS.register_module("KN", module=kn.KalmanNorm2d, force=True)
    norms = [registry.MODELS.build({"type": "KN", "num_features": 4, "gain": 0.2}) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norms[0], nn.Conv2d(4, 4, 1), norms[1])
    assert kn.describe(kn.connect(model), images()).with_prior == 1
    assert norms[1].gain == 0.2
