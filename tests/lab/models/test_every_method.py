"""Each network with each normalization: its norms and priors, a step, and scores; and thirty steps on one batch."""

import copy
import functools

import pytest
import torch
from model_checks import batch, group_norm
from short_trainings import descent
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

import kalmannorm
from kalmannorm.lab.detection import example
from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.signal import SignalNet, TabularNet
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.models.unet3d import UNet3d
from kalmannorm.modules import is_stock_batchnorm


class Block(nn.Module):
    """A residual block in a plain network, with one ReLU for all."""

    def __init__(self, norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2, bias=False)
        self.norms, self.relu = nn.Sequential(norm_layer(8), nn.Identity()), nn.ReLU(inplace=True)
        self.last, self.classifier = norm_layer(8), nn.Linear(8, 4)

    def forward(self, images):
        x = self.relu(self.norms(self.stem(images)))
        x = self.relu(x + self.last(self.conv(x)))
        return self.classifier(x.mean((2, 3)))


# What makes it, its norms, and the shape of an input.
NETWORKS = {
    "small": (functools.partial(SmallConvNet, ((8, 2), (16, 2)), num_classes=4), 2, (1, 16, 16)),
    "block": (Block, 2, (1, 16, 16)),
    "preactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8), 7, (3, 16, 16)),
    "postactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8, preactivation=False), 7, (3, 16, 16)),
    "cifar_inception": (functools.partial(CifarInception, num_classes=4, width=0.25), 1 + 3 * 6, (3, 16, 16)),
    # Two modules have no 1x1 branch and no convolution behind the pooling.
    "inception_v2": (functools.partial(InceptionV2, num_classes=4, width=0.25), 3 + 8 * 7 + 2 * 5, (3, 48, 48)),
    "bottlenecks": (functools.partial(ResNet, Bottleneck, [1] * 4, num_classes=4, width_per_group=16), 17, (3, 48, 48)),
    "signals": (functools.partial(SignalNet, num_classes=4), 6, (1, 64)),
    "rows": (functools.partial(TabularNet, num_classes=4), 3, (30,)),
    "volumes": (functools.partial(UNet3d, 8), 10, (1, 8, 8, 8)),
}
OF_IMAGES = ("evonorm", "frn")
# Of a row, each number by itself would be 0. `test_segmentation` has volumes.
EVERY = [(network, method) for network, (_, _, shape) in NETWORKS.items() for method in METHODS
         if network != "volumes" and (network, method) != ("rows", "in")
         and (len(shape) == 3 or method not in OF_IMAGES)]  # fmt: skip
OPTIONS = {"gn": {"groups": 4}, "evonorm": {"groups": 4}, "gkn": {"groups": 2}}
# What a method bears.
RATES = {"wn": (0.01, 0.001, 0.0003)}
every_network = pytest.mark.parametrize("network", NETWORKS)


def built(network, method, **options):
    torch.manual_seed(0)
    given = OPTIONS.get(method, {}) | options
    return normalize(NETWORKS[network][0](), method, statistics_batch=4, steps=30, **given)


def trained(model, images, labels, **options):
    return descent(model, lambda: functional.cross_entropy(model(images), labels), **options)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "small"])
def test_group_norm_takes_every_place(network):
    make, norms, _ = NETWORKS[network]
    model = make(norm_layer=group_norm)
    assert not any(map(is_stock_batchnorm, model.modules()))
    assert sum(isinstance(module, nn.GroupNorm) for module in model.modules()) == norms


@every_network
@pytest.mark.parametrize("known", [False, True])
def test_every_layer_but_perhaps_the_first_has_a_prior(network, known):
    make, norms, shape = NETWORKS[network]
    stats = ([0.0] * shape[0], [1.0] * shape[0]) if known else None
    model = kalmannorm.convert(make(), input_stats=stats)
    description = kalmannorm.describe(model, torch.randn(2, *shape))
    assert not any(map(is_stock_batchnorm, model.modules()))
    assert len(description.rows) == norms
    without = [] if known else [description.rows[0].name]
    assert [row.name for row in description.rows if row.reason] == without, str(description)


@pytest.mark.parametrize(("network", "method"), EVERY)
def test_a_step_moves_what_can_move_and_in_eval_each_image_is_by_itself(network, method):
    """And a checkpoint, a copy and a network in double precision are the same."""
    model, again = built(network, method), built(network, method)
    images, labels = batch(NETWORKS[network][2], images=4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = trained(model, images, labels, steps=1, rate=0.001)
    assert all(torch.isfinite(torch.tensor(found)))
    after = dict(model.named_parameters())
    assert all(after[name].grad is not None and after[name].grad.isfinite().all() for name in before)
    moved = sum(not torch.equal(after[name], old) for name, old in before.items())
    # The first layer has no prior, and so no use for a gain and a noise; nor has a bias below a norm any.
    assert moved >= min(0.85 * len(before), len(before) - 3)
    stock = [layer for layer in model.modules() if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d)]
    assert len(stock) == (NETWORKS[network][1] if method == "frozen" else 0)

    with torch.no_grad():
        expected = model.eval()(images)
        assert torch.allclose(expected[:1], model(images[:1]), atol=1e-4)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(images), expected)
        twin = copy.deepcopy(model.double())
        assert torch.equal(twin(images.double()), model(images.double()))
        assert model.train()(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("method", "options"),
    [  # But for "frozen": a network that was not trained before is not normalized at all.
        *((method, {}) for method in METHODS if method != "frozen"),
        *((method, {"proxy": True}) for method in ("gn", "kn", "bn")),
    ],
)
def test_thirty_steps_halve_the_loss(method, options):
    found = {}
    for rate in RATES.get(method, (0.05, 0.01, 0.002)):
        model = built("postactivation", method, **options)
        first, *_, found[rate] = trained(model, *batch((3, 16, 16)), rate=rate)
        if found[rate] < first / 2:
            return
    pytest.fail(f"from {first:.3f} to {found} at each rate")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("make", "method"),
    [(mask_rcnn_c4, "bn"), (mask_rcnn_c4, "kn"), *((mask_rcnn_fpn, name) for name in METHODS if name not in OF_IMAGES)],
)
def test_a_detector_takes_a_step(make, method):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 16, "box_batch_size_per_image": 8}
    model = normalize(make(3, **options), method, statistics_batch=1, steps=30, **OPTIONS.get(method, {}))
    if method == "bn":
        assert not any(type(layer) is nn.BatchNorm2d for layer in model.modules())
    parts = model.train()(*example())
    assert len(parts) == 5
    sum(parts.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("method", OF_IMAGES)
def test_a_detector_cannot_be_traced(method):
    with pytest.raises(ValueError, match="cannot be traced"):
        normalize(mask_rcnn_fpn(3), method)
