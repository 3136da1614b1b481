"""Regions of the forward pass that run again in the backward pass."""


from functools import partial

import pytest
import torch
from networks import Checkpointed, Residual, made_of
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kalmannorm as kn
from kalmannorm.checkpoints import _FIRST
from kalmannorm.recording import Recorder


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


def test_a_network_in_a_hook_of_a_backward_pass_is_no_checkpoint():
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    y = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = []
    y.register_hook(lambda gradient: found.append(model(gradient)))
    y.square().sum().backward()
    assert found[0].shape == (2, 4, 4, 4)


def test_a_rectified_belief_whose_moments_a_region_reads_first():
    """A layer outside has asked for a belief further on, and got none: the moments behind the ReLU are still unread."""

    def through(use):
        def forward(self, x):
            x = torch.relu(self.first(x))
            self.side(torch.cumsum(x, 2))
            return checkpoint(self.second, x, use_reentrant=False) if use else self.second(x)

        model = kn.convert(made_of(forward, **{name: nn.BatchNorm2d(3) for name in ("first", "side", "second")}))
        torch.manual_seed(1)
        model(torch.randn(2, 3, 4, 4)).square().mul(torch.arange(16.0).view(4, 4)).sum().backward()
        return [parameter.grad for parameter in (model.first.weight, model.first.bias, model.second.process_noise)]

    for saving, plain in zip(through(True), through(False), strict=True):
        torch.testing.assert_close(saving, plain, rtol=0, atol=0)


def test_a_region_of_many_layers_runs_again_with_one_mode():
    """A plain function, without hooks that open one. Two modes would record each call twice."""
    layers, open_modes = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3)), []

    def region(x):
        for layer in layers:
            modes = torch.overrides._get_current_function_mode_stack()
            open_modes.append(sum(isinstance(mode, Recorder) for mode in modes))
            x = layer(x)
        return x

    def forward(self, x):
        return checkpoint(region, self.first(x), use_reentrant=False)

    model = kn.convert(made_of(forward, first=nn.BatchNorm2d(3), layers=layers))
    layers = model.layers
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert open_modes == [1] * 6


def test_a_network_compiled_in_a_backward_pass_moves_its_statistics():
    """In later calls too: that a backward pass runs is no constant of its graph."""
    model = kn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    compiled = torch.compile(model, backend="eager")
    y = torch.randn(2, 3, 4, 4, requires_grad=True)

    def hook(gradient):
        with torch.enable_grad():
            compiled(gradient.detach())

    y.register_hook(hook)
    y.square().sum().backward()
    compiled(torch.randn(2, 3, 4, 4))
    assert int(model[1].num_batches_tracked) == 2


def mask_of_two_layers(net, x):
    """The first one asks outside of the region."""
    mask = x > 0
    return net.side(mask * x) + mask * x


@pytest.mark.parametrize("before", [
    lambda net, x: torch.where(x > 0, x, 0.1 * x), lambda net, x: x + x.detach(),
    lambda net, x: x.masked_fill(x > 0.5, 0.5), lambda net, x: x * net.side(x).sigmoid().detach(),
    mask_of_two_layers,
])  # fmt: skip
def test_a_detach_or_mask_outside_of_a_region(before):
    """What it comes from stays as it was, so that the second run computes the same beliefs, with gradients."""

    def gradients(use):
        def forward(self, x):
            x = before(self, self.first(x))
            return checkpoint(self.block, x, use_reentrant=False) if use else self.block(x)

        torch.manual_seed(0)
        block, side = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        model = kn.convert(made_of(forward, first=nn.BatchNorm2d(3), block=block, side=side))
        model(torch.randn(2, 3, 4, 4)).square().mul(torch.arange(16.0).view(4, 4)).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for saving, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(saving, plain, rtol=0, atol=0)


def test_a_corrected_layer_without_a_prior_takes_the_statistics_of_the_first_run():
    """The forward passes have moved its running statistics when the region runs again, for each backward pass."""

    def gradients(use):
        def region(x):
            return model.second(torch.relu(model.norm(torch.cumsum(model.norm(model.first(x)), 2))))

        def forward(self, x):
            return checkpoint(region, x, use_reentrant=False) if use else region(x)

        torch.manual_seed(0)
        model = made_of(forward, first=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), second=nn.Conv2d(4, 4, 1))
        for _ in range(20):
            model(torch.randn(4, 3, 4, 4))
        model = kn.convert(model)
        losses = [model(3 * torch.randn(2, 3, 4, 4) + 1).square().sum() for _ in range(3)]
        for each in (*losses, losses[0]):
            each.backward(retain_graph=True)
        return [parameter.grad for parameter in model.parameters()]

    for saving, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(saving, plain, rtol=0, atol=0)
    assert not _FIRST  # it goes with the graph


def gradients_through(region, context, options):
    """Of a layer outside whose belief a region asks for, which has two layers and dropout, run by ``region``."""

    def forward(self, x):
        x = self.conv(self.first(x).relu())
        return region(lambda x: self.third(self.act(self.drop(self.second(x)))), x, **context)

    torch.manual_seed(0)
    norms = {name: nn.BatchNorm2d(4) for name in ("first", "second", "third")}
    parts = {"conv": nn.Conv2d(4, 4, 3), "drop": nn.Dropout(), "act": nn.SiLU(), **norms}
    model = kn.convert(made_of(forward, **parts), input_stats=([0.0] * 4, [1.0] * 4), **options)
    x = torch.randn(4, 4, 8, 8)
    model(x).mul(torch.arange(36.0).view(6, 6)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def saves(name, context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if name in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("saved", [None, "mul", "sigmoid", "add"])
@pytest.mark.parametrize("options", [{}, kn.preset("paper")], ids=["default", "paper"])
def test_a_region_with_dropout_and_any_policy_changes_no_bit(saved, options):
    """Its second run draws and computes what the first one did, in the same order."""
    context = {"use_reentrant": False}
    if saved is not None:
        context["context_fn"] = partial(create_selective_checkpoint_contexts, partial(saves, saved))
    saving = gradients_through(checkpoint, context, options)
    plain = gradients_through(lambda function, x: function(x), {}, options)
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)
