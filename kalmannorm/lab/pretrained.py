"""Initial weights from a trained network: for a classifier, or of a ResNet for a detector's backbone."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter


def trained_weights(file: Path) -> dict[str, Tensor]:
    """The state dict in a file: a plain one, as torchvision's, or that of a run's ``last.ckpt``."""
    if not file.is_file():
        raise ValueError(
            f"weights: there is no file {file}; expected a trained network's state dict, or a run's last.ckpt"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return {name.removeprefix("network."): value for name, value in content.get("state_dict", content).items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"weights: {file} holds no state dict") from error


Part = Callable[[Any], tuple[nn.Module, str]]
"""From a network to the module whose weights are loaded, and the prefix of its head's names, which are left out."""


def classifier(network: nn.Module) -> tuple[nn.Module, str]:
    """All of a classifier, whose head is its last linear layer.

    Example:
        >>> classifier(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))[1]
        '2.'
    """
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError(f"weights: {type(network).__name__} has no head to leave out: expected a linear layer")
    return network, f"{linear[-1]}."


def resnet(network: Any) -> tuple[nn.Module, str]:
    """The ResNet layers of a detector, under their names in the ResNet."""
    body, stages = network.backbone, nn.Module()
    for name, child in getattr(body, "body", body).named_children():
        stages.add_module(name, child)
    if isinstance(body, IntermediateLayerGetter):  # the fourth stage is the head
        stages.add_module("layer4", network.roi_heads.mask_head)
    return stages, "fc."


def _states(network: nn.Module, state: dict[str, Tensor], part: Part) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The part's module, its state dict and the given one, both without the head."""
    module, head = part(network)
    both = (module.state_dict(), state)
    return module, [{name: value for name, value in each.items() if not name.startswith(head)} for each in both]


def load_trunk(network: nn.Module, state: dict[str, Tensor], part: Part = classifier) -> None:
    """Load a trained network's weights, without the head's, into a network or a part of it."""
    module, (own, given) = _states(network, state, part)
    for name in dict.fromkeys([*own, *given]):
        expected, found = (tuple(each[name].shape) if name in each else "absent" for each in (own, given))
        if expected != found:
            owner = "the network" if module is network else "the network's ResNet"
            raise ValueError(f"weights: {name} is {found} there; expected {expected}, as in {owner}")
    module.load_state_dict(given, strict=False)


def started(
    network: nn.Module, weights: str | None, normalized: Callable[[nn.Module], nn.Module], part: Part = classifier
) -> nn.Module:
    """Normalize the network, and load a file's weights into all of it but its head."""
    if weights is None:
        return normalized(network)
    state = trained_weights(Path(weights))
    # Weights with BatchNorm's names are loaded before the conversion, which may use their statistics; others after it.
    own, given = _states(network, state, part)[1]
    if early := set(own) == set(given):
        load_trunk(network, state, part)
    network = normalized(network)
    if not early:
        load_trunk(network, state, part)
    return network
