"""The demo's network."""

import torch
from torch import nn

from kalmannorm.lab.models.small import LAYERS, SmallConvNet


def test_shape_and_layers():
    model = SmallConvNet()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [channels for channels, _ in LAYERS]
    assert len(norms) >= 6
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Conv2d))


def test_every_convolution_is_normalized():
    """Only so does the scale of a convolution's weights not matter: each layer's norm takes it out again."""
    torch.manual_seed(0)
    model, images = SmallConvNet().double(), torch.randn(4, 1, 32, 32, dtype=torch.float64)
    before = model(images)
    with torch.no_grad():
        for conv in model.convs:
            conv.weight.mul_(10)
    assert torch.allclose(model(images), before, atol=1e-3)
