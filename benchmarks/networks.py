"""The networks, built with BatchNorm; each method then replaces it from outside."""

import itertools

import torch
import torchvision
from torch import nn

from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.inception_v2 import InceptionV2
from kalmannorm.lab.models.unet3d import UNet3d


class UnavailableError(Exception):
    """What a case needs is not on this machine: its row says so."""


def build(case):
    """A case's network, untrained."""
    torch.manual_seed(0)
    if case.network in ("resnet18", "resnet50"):
        return getattr(torchvision.models, case.network)()
    if case.network.startswith("cifar_resnet"):
        return CifarResNet(int(case.network.removeprefix("cifar_resnet")))
    makers = {
        "inception_v2": InceptionV2,
        "unet3d": lambda: UNet3d(width=16, levels=4),
        "monai_unet3d": monai_unet,
        "chain": lambda: chain(case.channels, case.depth),
        # In place: what torchvision's networks have behind their norms.
        "layer": lambda: nn.Sequential(nn.BatchNorm2d(case.channels), nn.ReLU(inplace=True)),
    }
    if case.network not in makers:
        raise UnavailableError(f"no network {case.network!r}")
    return makers[case.network]()


def batch(case, device):
    """Random images and labels; of volumes, a label a voxel."""
    generator = torch.Generator().manual_seed(1)
    volumes = case.network.endswith("3d")
    channels = {"layer": case.channels}.get(case.network, 1 if volumes else 3)
    pixels = [case.size] * (3 if volumes else 2)
    images = torch.randn(case.batch, channels, *pixels, generator=generator)
    labels = torch.randint(2, (case.batch, *pixels) if volumes else (case.batch,), generator=generator)
    return images.to(device, memory_format=layout(case)), labels.to(device)


def layout(case):
    """As torch calls it."""
    return torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format


def chain(width, depth):
    """Convolution, norm and ReLU, ``depth`` times, and a classifier: each further layer is like the last."""
    widths = [3, *[width] * depth]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
        for a, b in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def monai_unet():
    """MONAI's residual U-Net, as in `examples/monai_unet3d.py` but with its usual widths."""
    try:
        from monai.networks.nets import UNet  # noqa: PLC0415  (not on every machine, and slow to import)
    except ImportError as error:
        raise UnavailableError("MONAI is not installed") from error
    return UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="BATCH")
