"""The networks, built with BatchNorm, which each method then replaces."""

import itertools

import torch
import torchvision
from torch import nn

from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.unet3d import UNet3d

WIDE = ("resnet50_wide", "maskrcnn")


class UnavailableError(Exception):
    """A requirement of a case is missing on this machine; its row records this."""


def build(case):
    """A case's network, untrained."""
    torch.manual_seed(0)
    if case.network in ("resnet18", "resnet50", "resnet50_wide", "mobilenet_v3_large", "efficientnet_b0"):
        return getattr(torchvision.models, case.network.removesuffix("_wide"))()
    if case.network.startswith("cifar_resnet"):
        return CifarResNet(int(case.network.removeprefix("cifar_resnet")))
    makers = {
        "inception_v2": InceptionV2,
        "unet3d": lambda: UNet3d(width=16, levels=4),
        "monai_unet3d": monai_unet,
        "deeplabv3": DeepLab,
        "maskrcnn": Detector,
        "chain": lambda: chain(case.channels, case.depth),
        # In place, as in torchvision's networks.
        "layer": lambda: nn.Sequential(nn.BatchNorm2d(case.channels), nn.ReLU(inplace=True)),
    }
    if case.network not in makers:
        raise UnavailableError(f"no network {case.network!r}")
    return makers[case.network]()


def batch(case, device):
    """Random images and labels; for volumes and segmentation a label for each voxel or pixel."""
    generator = torch.Generator().manual_seed(1)
    volumes = case.network.endswith("3d")
    channels = {"layer": case.channels}.get(case.network, 1 if volumes else 3)
    pixels = [case.size] * (3 if volumes else 2)
    if case.network in WIDE:
        pixels[1] = pixels[0] * 1344 // 800  # the usual input of detectors
    images = torch.randn(case.batch, channels, *pixels, generator=generator)
    dense = volumes or case.network == "deeplabv3"
    labels = torch.randint(2, (case.batch, *pixels) if dense else (case.batch,), generator=generator)
    return images.to(device, memory_format=layout(case)), labels.to(device)


def layout(case):
    """torch's memory format of a case."""
    return torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format


def chain(width, depth):
    """Convolution, norm and ReLU, ``depth`` times, and a classifier."""
    widths = [3, *[width] * depth]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class DeepLab(nn.Module):
    """torchvision's DeepLabV3 without its auxiliary head; returns logits for each pixel."""

    def __init__(self):
        super().__init__()
        self.model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)

    def forward(self, images):
        return self.model(images)["out"]


class Detector(nn.Module):
    """torchvision's Mask R-CNN on images with two boxes each; returns the sum of its losses."""

    def __init__(self):
        super().__init__()
        self.model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)

    @property
    def static_part(self):
        return self.model.backbone

    def forward(self, images):
        height, width = images.shape[2:]
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.2, 0.9, 0.8]], device=images.device)
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        target = {"boxes": boxes, "labels": boxes.new_tensor([1, 2], dtype=torch.int64),
                  "masks": boxes.new_ones((2, height, width), dtype=torch.uint8)}  # fmt: skip
        self.model.transform.min_size, self.model.transform.max_size = (min(height, width),), max(height, width)
        return sum(self.model(list(images), [target] * len(images)).values())


def monai_unet():
    """MONAI's residual U-Net, as in `examples/monai_unet3d.py`, but with the usual widths."""
    try:
        from monai.networks.nets import UNet  # noqa: PLC0415  (not on every machine, and slow to import)
    except ImportError as error:
        raise UnavailableError("MONAI is not installed") from error
    return UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="BATCH")
