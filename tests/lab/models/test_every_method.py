"""Each network of the paper with each normalization: a step, and thirty steps on one batch."""

import functools

import pytest
import torch
from model_checks import batch, image_and_target, losses
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from kalmannorm.lab.methods import METHODS, normalize
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn
from kalmannorm.lab.models.inception_v2 import InceptionV2

NETWORKS = {
    "preactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8), 16),
    "postactivation": (functools.partial(CifarResNet, 8, num_classes=4, width=8, preactivation=False), 16),
    "cifar_inception": (functools.partial(CifarInception, num_classes=4, width=0.25), 16),
    "inception_v2": (functools.partial(InceptionV2, num_classes=4, width=0.25), 48),
    "bottlenecks": (functools.partial(ResNet, Bottleneck, [1, 1, 1, 1], num_classes=4), 48),
}
# The others take their thirty steps in files of their own, with three kinds of norm.
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

every_network = pytest.mark.parametrize("network", NETWORKS)
every_method = pytest.mark.parametrize("method", METHODS)


def built(network, method):
    make, size = NETWORKS[network]
    torch.manual_seed(0)
    model = normalize(make(), method, statistics_batch=4, steps=30, **OPTIONS.get(method, {}))
    return model, size


@every_network
@every_method
def test_one_step_moves_what_can_move(network, method):
    model, size = built(network, method)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = losses(model, *batch(size, images=4), steps=1, rate=0.001)
    assert all(torch.isfinite(torch.tensor(found)))
    trained = dict(model.named_parameters())
    assert all(trained[name].grad is not None and trained[name].grad.isfinite().all() for name in before)
    moved = sum(not torch.equal(trained[name], old) for name, old in before.items())
    # The first layer has no prior, and so no use for a gain and a noise.
    assert moved >= 0.85 * len(before)


@pytest.mark.slow
@pytest.mark.parametrize("network", SMALL)
@every_method
def test_thirty_steps_halve_the_loss(network, method):
    if reason := HOPELESS.get(method) or HOPELESS.get(f"{method}-{network}"):
        pytest.skip(reason)
    found = {}
    for rate in RATES.get(method, (0.05, 0.01, 0.002)):
        model, size = built(network, method)
        first, *_, found[rate] = losses(model, *batch(size), rate=rate)
        if found[rate] < first / 2:
            return
    pytest.fail(f"from {first:.3f} to {found} at each rate")


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("evonorm", "frn")])
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


@pytest.mark.parametrize("method", ["evonorm", "frn"])
def test_a_detector_cannot_be_traced(method):
    with pytest.raises(ValueError, match="cannot be traced"):
        normalize(mask_rcnn_fpn(3), method)
