"""Replacing BatchNorm layers, and a base class of the replacements."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.modules import is_stock_batchnorm

# A new layer shares these with the old one, if it has a tensor of this name and shape.
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class AnyBatchNorm(_BatchNorm):
    """Base class of layers that replace ``BatchNorm1d``, ``2d`` and ``3d``."""

    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.ndim <= 5 or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(input.shape)}, "
                f"expected (N, {self.num_features}, *) with 2 to 5 dimensions"
            )

    def _count(self) -> Any:
        """Count a training step, and return the weight of its statistics in the moving averages."""
        self.num_batches_tracked += 1
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum

    def _scaled(self, x: Tensor, scale: Tensor, shift: Tensor, shape: Sequence[int]) -> Tensor:
        """``x * scale + shift``, then the layer's affine map; ``(*, C)`` scale and shift are viewed as `shape`."""
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return x * scale.view(shape) + shift.view(shape)


def replace_batchnorm(model: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by the layer that ``make`` returns for it.

    The new layer gets the old one's device, dtype and training flag, and shares its parameters and
    buffers of the same name and shape: a residual block that starts at ``weight = 0`` still does. A
    BatchNorm that is shared in the network has one replacement. A BatchNorm with an activation
    inside (timm's ``BatchNormAct2d``) becomes an ``nn.Sequential`` of the new layer and that
    activation.

    Returns:
        The same ``model``; if it is itself a BatchNorm, its replacement.

    Example:
        >>> replace_batchnorm(nn.Sequential(nn.BatchNorm2d(8)), lambda norm: nn.Identity())[0]
        Identity()
    """
    replaced = {layer: _replacement(layer, make) for layer in model.modules() if isinstance(layer, _BatchNorm)}
    if not replaced:
        raise ValueError(f"{type(model).__name__} has nothing to replace: expected at least one BatchNorm layer")
    if isinstance(model, _BatchNorm):
        return replaced[model]
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():  # `named_children` would skip a shared layer's other names
            if isinstance(layer, _BatchNorm):
                parent._modules[name] = replaced[layer]
    return model


def _replacement(old: _BatchNorm, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    new = make(old)
    like = old.running_mean if old.weight is None else old.weight
    if like is not None:
        new.to(like.device, like.dtype)
    for name in _TENSORS:
        given, own = getattr(old, name), getattr(new, name, None)
        if isinstance(given, Tensor) and isinstance(own, Tensor) and given.shape == own.shape:
            setattr(new, name, given)
    new.train(old.training)
    behind = [layer for layer in (getattr(old, "drop", None), getattr(old, "act", None)) if layer is not None]
    return nn.Sequential(new, *behind) if behind else new


def count_in_steps(model: nn.Module, passes: int) -> nn.Module:
    """Rescale BatchNorm's momentum from optimizer steps to forward passes, in place; replacements likewise.

    With this momentum the ``passes`` of a step move an average as much as a single pass did before:

        (1 - momentum of a pass)^passes = 1 - momentum

    A plain mean (momentum None) stays. Windows and schedules in steps read the layer's ``passes``.
    It may be called again with another number.

    Example:
        >>> count_in_steps(nn.BatchNorm2d(8, momentum=0.75), 2).momentum
        0.5
    """
    counting: list[Any] = [layer for layer in model.modules() if is_stock_batchnorm(layer)]
    for layer in counting:
        before, layer.passes = getattr(layer, "passes", 1), passes
        if layer.momentum is not None:
            layer.momentum = 1 - (1 - layer.momentum) ** (before / passes)
    return model


def in_groups(x: Tensor, samples: int | None) -> Tensor:
    """``(N, C, *)`` as ``(groups, samples, C, *)``, of consecutive samples; a single group for None."""
    size = len(x) if samples is None else samples
    if size < 1 or len(x) % size:
        raise ValueError(f"got a batch of {len(x)}, expected a multiple of the statistics batch, {samples}")
    return x.reshape(-1, size, *x.shape[1:])
