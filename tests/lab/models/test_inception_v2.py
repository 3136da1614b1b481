"""Inception-v2: its sizes against Figure 5 of arXiv:1502.03167, its parameters against the paper's Table 2."""

import functools

import torch
from model_checks import shapes
from torch import nn

from kalmannorm.lab.models.inception_v2 import InceptionV2


@functools.cache
def full():
    return InceptionV2()


def test_sizes_at_224():
    model = full().eval()
    *found, logits = shapes(model, (*model.stem, *model.inceptions), 3, 224, 224)
    assert logits == (1000,)
    assert found[:5] == [(64, 112, 112), (64, 56, 56), (64, 56, 56), (192, 56, 56), (192, 28, 28)]
    assert {name: shape for (name, _), shape in zip(model.inceptions.named_children(), found[5:], strict=True)} == {
        "3a": (256, 28, 28), "3b": (320, 28, 28), "3c": (576, 14, 14),
        "4a": (576, 14, 14), "4b": (576, 14, 14), "4c": (608, 14, 14), "4d": (608, 14, 14), "4e": (1056, 7, 7),
        "5a": (1024, 7, 7), "5b": (1024, 7, 7),
    }  # fmt: skip


def test_pooling_is_that_of_figure_5():
    pools = [
        (name, type(module).__name__, module.stride)
        for name, inception in full().inceptions.named_children()
        for module in inception.modules()
        if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d))
    ]
    assert len(pools) == 10
    assert [pool for pool in pools if pool[1] == "MaxPool2d"] == [
        ("3c", "MaxPool2d", 2), ("4e", "MaxPool2d", 2), ("5b", "MaxPool2d", 1),
    ]  # fmt: skip
    assert all(stride == 1 for _, kind, stride in pools if kind == "AvgPool2d")


def test_the_input_passes_through_where_the_module_strides():
    """The last channels of 3c are the maxima of its input."""
    x = torch.randn(2, 320, 8, 8)
    out = full().eval().get_submodule("inceptions.3c")(x)
    assert torch.equal(out[:, 160 + 96 :], nn.functional.max_pool2d(x, 3, 2, 1))
