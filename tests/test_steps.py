"""Steps live and die with their tensors."""

import copy
import gc

import pytest
import torch
from networks import conv_net, made_of
from torch import Tensor, nn

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.propagation import exact
from kalmannorm.recording import attach
from kalmannorm.steps import Step, step_of


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


def test_a_state_that_feeds_itself_does_not_grow_without_end():
    def forward(self, x):
        y = self.norm(x)
        self.state = (self.state + y).detach()
        return y

    model = kn.convert(made_of(forward, norm=nn.BatchNorm1d(4), state=torch.zeros(2, 4)))
    for _ in range(1500):  # two calls each
        model(torch.randn(2, 4))
    assert step_of(model.state).depth <= 2000


def test_a_view_has_the_step_of_all_of_a_tensor_alone():
    x = torch.randn(4, 4)
    attach(x, Gaussian(torch.zeros(1, 4), torch.ones(1, 4)), "input")
    assert step_of(x.view_as(x)) is step_of(x)
    assert step_of(x[:2]) is step_of(x.T) is None
    x.add_(1)
    assert isinstance(step_of(x.view_as(x)).belief, Unknown)


def test_a_detached_tensor_keeps_its_belief():
    y = 1 * torch.randn(2, 4, requires_grad=True)
    attach(y, Gaussian(torch.zeros(1, 4), torch.ones(1, 4)), "layer")
    y.detach_()
    assert not isinstance(exact(step_of(y)), Unknown)


def two_networks():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))]
    return [kn.convert(part, input_stats=(0.0, 1.0)) for part in parts]


@pytest.mark.parametrize("detach", [Tensor.detach, Tensor.detach_])
def test_no_gradient_passes_a_detached_tensor_between_two_networks(detach):
    """Not through the prior either: a GAN's second network must not train the first."""
    first, second = two_networks()
    (second(detach(first(torch.randn(4, 3, 5, 5)))) * torch.linspace(-1, 1, 5)).square().sum().backward()
    assert all(parameter.grad is None for parameter in first.parameters())
    assert second[1].gain.grad != 0  # and yet the prior is there


class Scaled(torch.autograd.Function):
    """The input, and gradients times a number: none, or reversed ones, as domain-adversarial networks have them."""

    @staticmethod
    def forward(ctx, x, factor, copies):
        ctx.factor = factor
        return x.view_as(x) if copies else x

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None, None


@pytest.mark.parametrize("copies", [True, False])
def test_a_users_function_decides_on_all_gradients(copies):
    class Adversarial(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.domain = two_networks()

        def forward(self, x, factor):
            return self.domain(Scaled.apply(self.features(x), factor, copies))

    model = kn.connect(Adversarial())
    gradients = []
    for factor in (0.0, 1.0, -2.0):
        model.zero_grad()
        model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)), factor).pow(3).sum().backward()
        gradients.append(model.features[1].weight.grad)
        assert model.domain[1].gain.grad != 0
    assert (gradients[0] == 0).all()
    torch.testing.assert_close(gradients[2], -2 * gradients[1])


class CopiesAttributes(torch.Tensor):
    """What functions return has the attributes of what they get, as MONAI's MetaTensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(found, cls) and args and isinstance(args[0], cls):
            found.__dict__.update(args[0].__dict__)
        return found


def test_a_copied_attribute_is_no_belief():
    seen = []
    first, second = (kn.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))) for _ in range(2))
    second[1].register_forward_pre_hook(lambda layer, args: seen.append(layer.belief(args[0], 1)))
    x = torch.randn(2, 4, 8, 8).as_subclass(CopiesAttributes)
    second(first(x))
    second(first(x) * 10 + 5)  # where nothing watches
    assert isinstance(seen[0], kn.Gaussian)
    assert isinstance(seen[1], kn.Unknown)


def test_a_constant_made_like_an_activation_is_a_constant():
    def forward(self, x):
        h = self.norm(self.conv(x))
        return self.last(self.mix(torch.cat([h, torch.zeros_like(h)], 1)))

    outputs = []
    for kind in (torch.Tensor, CopiesAttributes):
        torch.manual_seed(1)
        x = torch.randn(2, 4, 8, 8).as_subclass(kind)
        torch.manual_seed(0)
        model = made_of(
            forward, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4), mix=nn.Conv2d(8, 4, 1), last=nn.BatchNorm2d(4)
        )
        outputs.append(kn.convert(model)(x).as_subclass(torch.Tensor))
    torch.testing.assert_close(*outputs)
