"""Each network with each normalization: a step, and thirty steps on one batch."""

import functools

import pytest
import torch
from model_checks import batch, image_and_target
from short_trainings import descent
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.signal import SignalNet, TabularNet

NETWORKS = {
    "preactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8), (3, 16, 16)),
    "postactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8, preactivation=False), (3, 16, 16)),
    "cifar_inception": (functools.partial(CifarInception, num_classes=4, width=0.25), (3, 16, 16)),
    "inception_v2": (functools.partial(InceptionV2, num_classes=4, width=0.25), (3, 48, 48)),
    "bottlenecks": (functools.partial(ResNet, Bottleneck, [1] * 4, num_classes=4, width_per_group=16), (3, 48, 48)),
    "signals": (functools.partial(SignalNet, num_classes=4), (1, 64)),
    "rows": (functools.partial(TabularNet, num_classes=4), (30,)),
}
OF_IMAGES = ("evonorm", "frn")
# Of a row, each number by itself would be 0.
EVERY = [(network, method) for network, (_, shape) in NETWORKS.items() for method in METHODS
         if len(shape) == 3 or (method not in OF_IMAGES and (network, method) != ("rows", "in"))]  # fmt: skip
# Thirty steps with every method; of the others, with ours.
SMALL = ["preactivation", "postactivation", "cifar_inception"]
OPTIONS = {"gn": {"groups": 4}, "evonorm": {"groups": 4}, "gkn": {"groups": 2}}
# What a method bears.
RATES = {"wn": (0.01, 0.001, 0.0003)}
# Not what thirty steps can do, and why.
HOPELESS = {
    "frozen": "a network that was not trained before is not normalized at all",
    "in-preactivation": "the mean over space of what each channel of each image is normalized by itself",
    "in-cifar_inception": "likewise; at four times the width it can",
}


def built(network, method):
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    return normalize(make(), method, statistics_batch=4, steps=30, **OPTIONS.get(method, {})), shape


def trained(model, images, labels, **options):
    return descent(model, lambda: functional.cross_entropy(model(images), labels), **options)


@pytest.mark.parametrize(("network", "method"), EVERY)
def test_one_step_moves_what_can_move(network, method):
    model, shape = built(network, method)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = trained(model, *batch(shape, images=4), steps=1, rate=0.001)
    assert all(torch.isfinite(torch.tensor(found)))
    trained_ones = dict(model.named_parameters())
    assert all(trained_ones[name].grad is not None and trained_ones[name].grad.isfinite().all() for name in before)
    moved = sum(not torch.equal(trained_ones[name], old) for name, old in before.items())
    # The first layer has no prior, and so no use for a gain and a noise.
    assert moved >= 0.85 * len(before)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "method"), [each for each in EVERY if each[0] in SMALL or each[1] in ("bn", "kn")])
def test_thirty_steps_halve_the_loss(network, method):
    if reason := HOPELESS.get(method) or HOPELESS.get(f"{method}-{network}"):
        pytest.skip(reason)
    found = {}
    for rate in RATES.get(method, (0.05, 0.01, 0.002)):
        model, shape = built(network, method)
        first, *_, found[rate] = trained(model, *batch(shape), rate=rate)
        if found[rate] < first / 2:
            return
    pytest.fail(f"from {first:.3f} to {found} at each rate")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in OF_IMAGES])
@pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn])
def test_a_detector_takes_a_step(make, method):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 16, "box_batch_size_per_image": 8}
    model = normalize(make(3, **options), method, statistics_batch=1, steps=30, **OPTIONS.get(method, {}))
    if method == "bn":
        assert not any(type(layer) is nn.BatchNorm2d for layer in model.modules())
    image, target = image_and_target()
    parts = model.train()([image], [target])
    assert len(parts) == 5
    sum(parts.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("method", OF_IMAGES)
def test_a_detector_cannot_be_traced(method):
    with pytest.raises(ValueError, match="cannot be traced"):
        normalize(mask_rcnn_fpn(3), method)
