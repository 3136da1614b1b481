"""Mask R-CNN on a ResNet-50, for the paper's detection and segmentation on COCO (section 4.2, Table 6).

He et al., "Mask R-CNN" (arXiv:1703.06870), Figure 4. Built from torchvision's parts, with these choices of the paper:
256 boxes sampled an image, images of 800 by at most 1333 pixels.
"""

from typing import Any

from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from kalmannorm.lab.models.branches import Norm

# Sides of the anchors, in pixels, and their ratios of height to width.
SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
BOXES_PER_IMAGE = 256


class MeanOverSpace(nn.Module):
    """A stage, then the mean over space: regions ``(R, 1024, 14, 14)`` to ``(R, 2048)``."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, regions: Tensor) -> Tensor:
        features: Tensor = self.stage(regions)
        return features.mean((2, 3))


def mask_rcnn_c4(num_classes: int = 91, norm_layer: Norm = nn.BatchNorm2d, **options: Any) -> nn.Module:
    """Mask R-CNN with the conv4 backbone of the paper's Table 6.

    Regions of 14x14 pixels are cut from the features at stride 16. The last stage of the ResNet maps
    them to ``(R, 2048, 7, 7)``. Boxes and classes are predicted from the mean over space, masks from
    those features by a transposed convolution of 256 channels and a 1x1 convolution, at 14x14. Boxes
    and masks share that stage's weights; torchvision runs it on the sampled boxes, then again on the
    boxes that have a mask.

    Args:
        num_classes: Number of classes, the background included.
        norm_layer: Takes the number of channels.
        options: Arguments of torchvision's ``MaskRCNN``, such as ``min_size``.
    """
    resnet: Any = resnet50(norm_layer=norm_layer)
    # Stride 16; the paper calls this layer conv4.
    backbone: Any = IntermediateLayerGetter(resnet, {"layer3": "0"})
    backbone.out_channels = 1024
    region = {"featmap_names": ["0"], "output_size": 14, "sampling_ratio": 2}
    parts = {
        "rpn_anchor_generator": AnchorGenerator((SIZES,), (RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(**region),
        "box_head": MeanOverSpace(resnet.layer4),
        "box_predictor": FastRCNNPredictor(2048, num_classes),
        "mask_roi_pool": MultiScaleRoIAlign(**region),
        "mask_head": resnet.layer4,
        "mask_predictor": MaskRCNNPredictor(2048, 256, num_classes),
        "box_batch_size_per_image": BOXES_PER_IMAGE,
    }
    model: nn.Module = MaskRCNN(backbone, **{**parts, **options})
    return model


def mask_rcnn_fpn(num_classes: int = 91, norm_layer: Norm = nn.BatchNorm2d, **options: Any) -> nn.Module:
    """Mask R-CNN with a feature pyramid (arXiv:1612.03144), with norms in the pyramid and both heads.

    The heads have four 3x3 convolutions of 256 channels each; the box head ends in a linear layer of
    1,024, as in GroupNorm's experiments (Wu and He, arXiv:1803.08494, section 4.2). For the
    arguments see `mask_rcnn_c4`.
    """
    resnet: Any = resnet50(norm_layer=norm_layer)
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(resnet, stages, [256, 512, 1024, 2048], 256, norm_layer=norm_layer)
    parts = {
        "rpn_anchor_generator": AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES)),
        "box_head": FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=norm_layer),
        "mask_head": MaskRCNNHeads(256, [256] * 4, 1, norm_layer=norm_layer),
        "box_batch_size_per_image": BOXES_PER_IMAGE,
    }
    model: nn.Module = MaskRCNN(backbone, num_classes, **{**parts, **options})
    return model
