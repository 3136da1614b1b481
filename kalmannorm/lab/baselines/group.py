"""GroupNorm (Wu & He, 2018) in BatchNorm's place."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def to_groupnorm(model: nn.Module, groups: int = 4) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by a fresh ``nn.GroupNorm``.

    Args:
        model: Any module that is not itself a BatchNorm.
        groups: Groups of channels a layer; must divide each layer's channels.

    Returns:
        The same ``model``.

    Example:
        >>> to_groupnorm(nn.Sequential(nn.BatchNorm2d(8)))[0].num_groups
        4
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, nn.GroupNorm(groups, child.num_features, child.eps, child.affine))
    return model
