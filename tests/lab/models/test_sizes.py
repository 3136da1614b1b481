"""Each network's stages, parameters and first weights, and what none can be made of."""

from functools import partial

import pytest
import torch
from model_checks import group_norm, parameters, shapes
from torch import nn

import kalmannorm
from kalmannorm.lab.models.branches import unit
from kalmannorm.lab.models.cifar_inception import CifarInception
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.detection import mask_rcnn_c4
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.signal import SignalNet, TabularNet
from kalmannorm.lab.models.small import LAYERS, SmallConvNet
from kalmannorm.lab.models.unet3d import UNet3d


def convolutions(model):
    return [layer for layer in model if isinstance(layer, nn.Conv1d)]


OF_RESNET = [(8, 32, 32), (16, 16, 16), (32, 8, 8), (7,)]


@pytest.mark.parametrize(
    ("model", "stages", "shape", "expected"),
    [
        (SmallConvNet(), lambda model: model.norms, (1, 32, 32), [*(channels for channels, _ in LAYERS), (10,)]),
        (CifarResNet(14, num_classes=7, width=8), lambda model: model.stages, (3, 32, 32), OF_RESNET),
        (CifarResNet(14, num_classes=7, width=8, preactivation=False), lambda model: model.stages, (3, 32, 32),
         OF_RESNET),
        (CifarInception(), lambda model: (model.conv, *model.inceptions), (3, 32, 32),
         [(32, 16, 16), (256, 16, 16), (480, 16, 16), (512, 16, 16), (10,)]),
        (CifarInception(width=0.25), lambda model: model.inceptions, (3, 32, 32), [64, 120, 128, (10,)]),
        (InceptionV2(num_classes=3, width=0.25), lambda model: model.stem[0][:1], (3, 48, 48), [16, (3,)]),
        # Figure 5 of arXiv:1502.03167.
        (InceptionV2(), lambda model: (*model.stem, *model.inceptions), (3, 224, 224),
         [(64, 112, 112), (64, 56, 56), (64, 56, 56), (192, 56, 56), (192, 28, 28),
          (256, 28, 28), (320, 28, 28), (576, 14, 14),
          (576, 14, 14), (576, 14, 14), (608, 14, 14), (608, 14, 14), (1056, 7, 7),
          (1024, 7, 7), (1024, 7, 7), (1000,)]),
        (SignalNet(), convolutions, (1, 64),
         [(16, 64), (32, 32), (32, 32), (64, 16), (64, 16), (64, 8), (10,)]),
        (SignalNet(((8, 1), (16, 2)), 3, num_classes=4, in_channels=2), convolutions, (2, 20),
         [(8, 20), (16, 10), (4,)]),
        (TabularNet(7, (8, 9), num_classes=4), list, (7,), [8, 8, 8, 9, 9, 9, 4, (4,)]),
        (UNet3d(2, 3), lambda model: (*model.down, *model.merge), (1, 8, 8, 8),
         [(2, 8, 8, 8), (4, 4, 4, 4), (8, 2, 2, 2), (4, 4, 4, 4), (2, 8, 8, 8), (2, 8, 8, 8)]),
        (UNet3d(4, 2, num_classes=3, in_channels=3), lambda model: model.down, (3, 8, 4, 12),
         [4, 8, (3, 8, 4, 12)]),
        (UNet3d(4, 1, num_classes=3), lambda model: model.down, (1, 8, 4, 12), [4, (3, 8, 4, 12)]),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else "",
)  # fmt: skip
def test_stages_have_these_channels_and_sizes(model, stages, shape, expected):
    found = shapes(model, stages(model), *shape)
    assert [one if isinstance(other, tuple) else one[0] for one, other in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (CifarInception, 903_018),
        (lambda: kalmannorm.convert(CifarInception()), 904_701),
        *((partial(CifarResNet, depth, preactivation=preactivation), count)
          for depth, count in ((32, 464_154), (110, 1_727_962)) for preactivation in (True, False)),  # the literature's
        (InceptionV2, 11_285_224),  # 11.29 million in the paper's table 2
        (partial(InceptionV2, norm_layer=group_norm), 11_285_224),
        (lambda: kalmannorm.convert(InceptionV2()), 11_295_309),  # 11.30 million
        (partial(UNet3d, 64, 4, num_classes=3, in_channels=3), 22_400_195),  # 22.4 million, as the docstring says
        (mask_rcnn_c4, 36_076_205),
    ],
)  # fmt: skip
def test_parameters(make, expected):
    with torch.device("meta"):
        assert parameters(make()) == expected


@pytest.mark.parametrize(
    ("conv", "fan_out"),
    [(unit(64, 128, 3, nn.BatchNorm2d)[0], 128 * 9), (CifarResNet(32).stages[2][0].conv1, 64 * 9)],
    ids=["branches", "resnet"],
)
def test_weights_are_kaiming_fan_out(conv, fan_out):
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((partial(CifarInception, width=width), rf"width must leave 1 or more of 16 filters; got {width}")
          for width in (0.03, 0.0, -1.0)),
        *((partial(CifarResNet, depth), rf"got depth {depth}, expected 6n \+ 2") for depth in (2, 7, 18, 33, -4)),
        (partial(InceptionV2, width=0.01), r"width 0\.01"),
        (partial(SignalNet, kernel=4), "kernel=4, expected an odd number"),
        (partial(UNet3d, levels=0), "levels=0, expected at least 1"),
        (lambda: UNet3d(2, 3)(torch.zeros(1, 1, 8, 8, 6)), r"3 levels got volumes of \(8, 8, 6\) voxels, .* of 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
