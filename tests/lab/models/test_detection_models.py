"""Mask R-CNN, on one small image."""

import pytest
import torch
from model_checks import group_norm, parameters
from short_trainings import descent
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

import kalmannorm
from kalmannorm.lab.detection import example
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn

SIZE = 64
SMALL = {
    "min_size": SIZE, "max_size": SIZE, "box_batch_size_per_image": 8,
    "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20,
}  # fmt: skip


def build(make):
    torch.manual_seed(0)
    return make(3, **SMALL)


@pytest.mark.slow
@pytest.mark.usefixtures("shallow")
def test_it_learns_and_finds():
    model, (images, targets) = kalmannorm.convert(build(mask_rcnn_fpn)), example()
    values = descent(model, lambda: sum(model(images, targets).values()), 8, 0.005)
    assert sum(values[-3:]) / 3 < values[0] / 2, values
    with torch.no_grad():
        (found,) = model.eval()(images)
    assert found["boxes"].shape == (len(found["scores"]), 4)
    assert found["masks"].shape == (len(found["scores"]), 1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("make", "without"), [(mask_rcnn_c4, ["backbone.bn1"]), (mask_rcnn_fpn, ["backbone.body.bn1"])]
)
def test_every_layer_but_that_on_images_has_a_prior(make, without):
    """Those on regions, too, which are cut from the features."""
    description = kalmannorm.describe(kalmannorm.convert(build(make)), *example())
    assert [row.name for row in description.rows if row.reason] == without


def test_conv4_features_have_stride_16():
    model = mask_rcnn_c4(**SMALL)
    with torch.no_grad():
        assert model.backbone(torch.randn(1, 3, 64, 96))["0"].shape == (1, 1024, 4, 6)
    sizes = model.rpn.anchor_generator.cell_anchors[0]
    width, height = (sizes[:, 2:] - sizes[:, :2]).unbind(1)
    assert (width * height).sqrt()[5:10].round().tolist() == [32, 64, 128, 256, 512]
    assert model.roi_heads.mask_head is model.roi_heads.box_head.stage
    regions = torch.randn(2, 1024, 14, 14)
    with torch.no_grad():
        assert model.roi_heads.box_head(regions).shape == (2, 2048)
        assert model.roi_heads.mask_predictor(model.roi_heads.mask_head(regions)).shape == (2, 91, 14, 14)


def test_parameters():
    # torchvision's second version has a second convolution in the region proposal network, and is this otherwise.
    theirs = parameters(maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None))
    assert parameters(mask_rcnn_fpn()) == theirs - (256 * 256 * 9 + 256)


@pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn])
def test_arguments_pass_through(make):
    model = make(3, group_norm, min_size=123, max_size=456)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert (model.transform.min_size, model.transform.max_size) == ((123,), 456)
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 256
