"""Weights of a trained network to start from: a classifier's, or a ResNet's for a detector's backbone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

__all__ = ["load_backbone", "load_trunk", "resnet_of", "trained_weights", "trunk_of"]


def trained_weights(file: Path) -> dict[str, Tensor]:
    """The state dict of a trained network.

    Args:
        file: A state dict, as torchvision's, or the ``last.ckpt`` of a run of ours.

    Raises:
        ValueError: There is no such file, or it is something else.
    """
    if not file.is_file():
        raise ValueError(
            f"weights: there is no file {file}; expected a trained network's state dict, or a run's last.ckpt"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return {name.removeprefix("network."): value for name, value in content.get("state_dict", content).items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"weights: {file} holds no state dict") from error


def trunk_of(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a state dict is not of the network's head, its last linear layer.

    Raises:
        ValueError: It has no linear layer.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> list(trunk_of(network, network.state_dict()))[:3]
        ['0.weight', '0.bias', '1.weight']
    """
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(f"weights: {type(network).__name__} has no head to train anew: expected a linear layer")
    return {name: value for name, value in state.items() if not name.startswith(f"{linear[-1]}.")}


def load_trunk(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a classifier the weights of a trained one, all but the head's.

    Raises:
        ValueError: They differ in names or shapes; it names the first.
    """
    trunk = trunk_of(network, state)
    _check_fits(trunk_of(network, network.state_dict()), trunk, "the network")
    network.load_state_dict(trunk, strict=False)


def resnet_of(network: Any) -> nn.Module:
    """The parts of a detector that are a ResNet's, under their names there."""
    body, stages = network.backbone, nn.Module()
    for name, child in getattr(body, "body", body).named_children():
        stages.add_module(name, child)
    if isinstance(body, IntermediateLayerGetter):  # the fourth stage is the head
        stages.add_module("layer4", network.roi_heads.mask_head)
    return stages


def load_backbone(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a detector's ResNet the weights of a trained one.

    Raises:
        ValueError: They differ in names or shapes; it names the first.
    """
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    _check_fits(resnet_of(network).state_dict(), state, "the network's ResNet")
    resnet_of(network).load_state_dict(state)


def _check_fits(own_state: dict[str, Tensor], state: dict[str, Tensor], whose: str) -> None:
    own = {name: tuple(value.shape) for name, value in own_state.items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in dict.fromkeys([*own, *given]):
        here, there = own.get(name, "absent"), given.get(name, "absent")
        if here != there:
            raise ValueError(f"weights: {name} is {there} there; expected {here}, as in {whose}")
