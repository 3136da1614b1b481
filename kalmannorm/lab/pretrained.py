"""Weights of a trained ResNet for a detector's backbone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kalmannorm.lab.models.detection import Conv4Features

__all__ = ["load_backbone", "resnet_of", "trained_weights"]


def trained_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a trained ResNet, without its classifier.

    Args:
        file: A state dict as torchvision's, or the ``last.ckpt`` of a run of ours.

    Raises:
        ValueError: There is no such file, or it is something else.
    """
    if not file.is_file():
        raise ValueError(
            f"weights: there is no file {file}; expected a trained ResNet's state dict, or a run's last.ckpt"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        state = {name.removeprefix("network."): value for name, value in content.get("state_dict", content).items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"weights: {file} holds no state dict") from error
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def resnet_of(network: Any) -> nn.Module:
    """The parts of a detector that are a ResNet's, under their names there."""
    body, stages = network.backbone, nn.Module()
    for name, child in getattr(body, "body", body).named_children():
        stages.add_module(name, child)
    if isinstance(body, Conv4Features):  # the fourth stage is the head
        stages.add_module("layer4", network.roi_heads.mask_head)
    return stages


def load_backbone(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a detector's ResNet the weights of a trained one.

    Raises:
        ValueError: They differ in names or shapes; it names the first.
    """
    own = {name: tuple(value.shape) for name, value in resnet_of(network).state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in dict.fromkeys([*own, *given]):
        here, there = own.get(name, "absent"), given.get(name, "absent")
        if here != there:
            raise ValueError(f"weights: {name} is {there} there; expected {here}, as in the network's ResNet")
    resnet_of(network).load_state_dict(state)
