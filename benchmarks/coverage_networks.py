"""Small untrained networks of other packages, for the coverage table and for ``python -m benchmarks.tried``.

Each network's function imports its package when it is called, so packages that are not installed are not needed.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Network", "graph", "is_installed", "outputs_of"]


def _single(x: Tensor) -> tuple[Any, ...]:
    return (x,)


@dataclasses.dataclass(frozen=True)
class Network:
    """How to build a network, and the arguments to call it with."""

    task: str
    build: Callable[[], nn.Module]
    """The network with BatchNorm layers, untrained."""
    shape: tuple[int, ...] = (3, 64, 64)
    """The shape of one sample."""
    call: Callable[[Tensor], tuple[Any, ...]] = _single
    """From samples, ``(N, *shape)``, to the arguments of ``forward``."""


def is_installed(library: str) -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec(library) is not None


def outputs_of(output: Any) -> list[Tensor]:
    """The tensors of an output: a tensor, a sequence, a mapping, or an object of such fields."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):  # transformers' outputs too
        return outputs_of(list(output.values()))
    return [t for each in output for t in outputs_of(each)] if isinstance(output, list | tuple) else []


def graph(x: Tensor) -> tuple[Any, ...]:
    """Batch graphs of equal size: nodes ``(N nodes, features)``, and random edges within each graph."""
    graphs, nodes = x.shape[:2]
    edges = torch.randint(nodes, (graphs, 2, 4 * nodes), generator=torch.Generator().manual_seed(0))
    return x.flatten(0, 1), (edges + nodes * torch.arange(graphs).view(-1, 1, 1)).transpose(0, 1).flatten(1)


def _with_lengths(x: Tensor) -> tuple[Any, ...]:
    """Sequences ``(N, time, features)`` and their lengths: all but the first are padded by a quarter."""
    lengths = torch.full((len(x),), 3 * x.shape[1] // 4)
    lengths[0] = x.shape[1]
    return x, lengths


def _of(path: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Import a dotted path and call it."""
    module, _, name = path.rpartition(".")
    made: nn.Module = getattr(importlib.import_module(module), name)(*args, **kwargs)
    return made


# -- transformers ----------------------------------------------------------------------------------


def _transformer(task: str, model: str, shape: tuple[int, ...] = (3, 64, 64), **options: Any) -> Network:
    """A model from its configuration; options that are functions are called for their values."""
    name = re.split("For|Model", model)[0]

    def build() -> nn.Module:
        given = {key: value() if callable(value) else value for key, value in options.items()}
        return _of(f"transformers.{model}", _of(f"transformers.{name}Config", **given))

    return Network(task, build, shape)


_STAGES: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_IMAGES: dict[str, Any] = {"image_size": 64}
_PATCHES: dict[str, Any] = {"num_input_channels": 3, "context_length": 64, "patch_length": 8, "patch_stride": 8,
                            "d_model": 16, "num_targets": 2}  # fmt: skip


def _stages(config: str, *stages: int) -> Callable[[], nn.Module]:
    out = [f"stage{i}" for i in stages]
    return partial(_of, f"transformers.{config}", layer_type="basic", out_features=out, **_STAGES)


_TRANSFORMERS = {
    "ResNet": _transformer("classification", "ResNetForImageClassification", layer_type="basic", **_STAGES),
    "RegNet": _transformer("classification", "RegNetForImageClassification", groups_width=8, **_STAGES),
    "MobileViT": _transformer("classification", "MobileViTForImageClassification", num_attention_heads=2,
                              hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], **_IMAGES),
    "MobileViTV2": _transformer("classification", "MobileViTV2ForImageClassification", width_multiplier=0.25,
                                **_IMAGES),
    "LeViT": _transformer("classification", "LevitForImageClassification", hidden_sizes=[16, 32, 48], depths=[1, 1, 1],
                          num_attention_heads=[2, 2, 2], key_dim=[8, 8, 8], **_IMAGES),
    "MobileNetV2": _transformer("classification", "MobileNetV2ForImageClassification", depth_multiplier=0.25,
                                **_IMAGES),
    "EfficientNet": _transformer("classification", "EfficientNetForImageClassification", width_coefficient=0.25,
                                 depth_coefficient=0.5, hidden_dim=320, **_IMAGES),
    "DETR": _transformer(
        "detection", "DetrForObjectDetection", use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=_stages("ResNetConfig", 4), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5,
    ),
    "RT-DETR": _transformer(
        "detection", "RTDetrForObjectDetection", backbone_config=_stages("RTDetrResNetConfig", 2, 3, 4),
        encoder_hidden_dim=32, encoder_in_channels=[16, 24, 32], encoder_ffn_dim=32, encoder_attention_heads=2,
        d_model=32, decoder_in_channels=[32, 32, 32], decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=2,
        num_queries=5, num_denoising=0,
    ),
    "SegFormer": _transformer("segmentation", "SegformerForSemanticSegmentation", depths=[1] * 4,
                              decoder_hidden_size=16, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2]),
    "UPerNet": _transformer("segmentation", "UperNetForSemanticSegmentation", hidden_size=16, use_auxiliary_head=False,
                            backbone_config=_stages("ResNetConfig", 1, 2, 3, 4)),
    "wav2vec2-conformer": _transformer(
        "speech", "Wav2Vec2ConformerModel", shape=(1600,), hidden_size=16, num_hidden_layers=2, intermediate_size=32,
        num_attention_heads=2, conv_dim=[16, 16], conv_stride=[4, 4], conv_kernel=[8, 8], num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
    ),
    "PatchTST": _transformer("time series", "PatchTSTForClassification", shape=(64, 3), num_hidden_layers=2,
                             num_attention_heads=2, ffn_dim=32, **_PATCHES),
    "PatchTSMixer": _transformer("time series", "PatchTSMixerForTimeSeriesClassification", shape=(64, 3), num_layers=2,
                                 norm_mlp="BatchNorm", **_PATCHES),
}  # fmt: skip

# -- ultralytics -----------------------------------------------------------------------------------


def _yolo(task: str, name: str, kind: str = "DetectionModel") -> Network:
    return Network(task, partial(_of, f"ultralytics.nn.tasks.{kind}", f"{name}.yaml", ch=3, nc=2, verbose=False))


_ULTRALYTICS = {
    **{name: _yolo("detection", name) for name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n")},
    "yolo11n-seg": _yolo("segmentation", "yolo11n-seg", "SegmentationModel"),
    "yolo11n-cls": _yolo("classification", "yolo11n-cls", "ClassificationModel"),
}

# -- volumes ---------------------------------------------------------------------------------------


def _volumes(task: str, path: str, *args: Any, **kwargs: Any) -> Network:
    return Network(task, partial(_of, path, *args, **kwargs), (1, 16, 16, 16))


def _monai(task: str, name: str, *args: Any, **kwargs: Any) -> Network:
    return _volumes(task, f"monai.networks.nets.{name}", *args, **kwargs)


_HIGH_RES = (
    {"name": "conv_0", "n_features": 4, "kernel_size": 3},
    {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 1},
    {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
    {"name": "conv_1", "n_features": 8, "kernel_size": 1},
    {"name": "conv_2", "kernel_size": 1},
)
_MONAI = {
    "SegResNet": _monai("segmentation", "SegResNet", 3, 8, 1, 2, norm="batch", blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    "DynUNet": _monai("segmentation", "DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16],
                      norm_name="batch"),
    "VNet": _monai("segmentation", "VNet", spatial_dims=3, in_channels=1, out_channels=2),
    "UNet": _monai("segmentation", "UNet", 3, 1, 2, (4, 8, 16), (2, 2), norm="batch", num_res_units=1),
    "AttentionUnet": _monai("segmentation", "AttentionUnet", 3, 1, 2, (4, 8, 16), (2, 2)),
    "BasicUNet": _monai("segmentation", "BasicUNet", 3, 1, 2, features=(4, 4, 8, 8, 16, 4), norm="batch"),
    "HighResNet": _monai("segmentation", "HighResNet", 3, 1, 2, norm_type="batch", layer_params=_HIGH_RES),
    "RegUNet": _monai("registration", "RegUNet", 3, 1, 4, 2, out_channels=2),
    "DenseNet": _monai("classification", "DenseNet", 3, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
    "ResNet": _monai("classification", "ResNet", "basic", [1, 1, 1, 1], [4, 8, 16, 32], 3, 1, num_classes=2),
}  # fmt: skip
_NNUNET = {
    kind: _volumes(
        "segmentation", f"dynamic_network_architectures.architectures.unet.{kind}", 1, 3, (4, 8, 16), nn.Conv3d, 3,
        (1, 2, 2), 1, 2, 1, conv_bias=True, norm_op=nn.BatchNorm3d, norm_op_kwargs={}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    for kind in ("PlainConvUNet", "ResidualEncoderUNet")
}  # fmt: skip

# -- graphs, speech, segmentation, self-supervision ------------------------------------------------


def _gnn(kind: str) -> Network:
    return Network("graphs", partial(_of, f"torch_geometric.nn.{kind}", 8, 16, 3, 2, norm="BatchNorm"), (30, 8), graph)


def _speaker(path: str, **options: Any) -> Network:
    build = partial(_of, f"speechbrain.lobes.models.{path}", lin_neurons=8, **options)
    return Network("speech", build, (60, 8))


def _smp(kind: str) -> Network:
    build = partial(_of, f"segmentation_models_pytorch.{kind}", "resnet18", encoder_weights=None, classes=2)
    return Network("segmentation", build)


def _head(kind: str) -> Network:
    """A projection head after a small encoder."""

    def build() -> nn.Module:
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2),
                                nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        return nn.Sequential(encoder, _of(f"lightly.models.modules.heads.{kind}", 16, 32, 8))

    return Network("self-supervision", build, (3, 32, 32))


NETWORKS: dict[str, dict[str, Network]] = {
    "transformers": _TRANSFORMERS,
    "ultralytics": _ULTRALYTICS,
    "monai": _MONAI,
    "dynamic_network_architectures": _NNUNET,
    "torch_geometric": {kind: _gnn(kind) for kind in ("GCN", "GAT", "GraphSAGE", "GIN", "EdgeCNN")},
    "segmentation_models_pytorch": {kind: _smp(kind) for kind in ("Unet", "FPN", "PSPNet", "Linknet", "DeepLabV3Plus")},
    "torchaudio": {
        "Conformer": Network("speech", partial(_of, "torchaudio.models.Conformer", 8, 2, 16, 2, 7), (40, 8),
                             _with_lengths),
    },
    "speechbrain": {
        "ECAPA-TDNN": _speaker("ECAPA_TDNN.ECAPA_TDNN", input_size=8, channels=[16] * 5, kernel_sizes=[5, 3, 3, 3, 1],
                               dilations=[1, 2, 3, 4, 1], attention_channels=8, res2net_scale=4, se_channels=8),
        "Xvector": _speaker("Xvector.Xvector", tdnn_blocks=3, tdnn_channels=[16] * 3, in_channels=8,
                            tdnn_kernel_sizes=[5, 3, 1], tdnn_dilations=[1, 2, 1]),
    },
    "lightly": {kind: _head(kind) for kind in
                ("BYOLProjectionHead", "SimSiamProjectionHead", "BarlowTwinsProjectionHead")},
}  # fmt: skip
