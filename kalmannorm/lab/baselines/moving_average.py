"""Moving Average Batch Normalization (Yan et al., 2020, arXiv:2001.06838)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from kalmannorm.lab.baselines.replacing import in_groups, replace_batchnorm


class MovingAverageNorm(nn.Module):
    """MABN: BatchNorm without means, with statistics averaged over steps, also for the gradient.

    With weights whose mean is zero (`centralize`), the mean of activations matters little, and
    BatchNorm has two statistics a channel left: ``chi^2``, the mean of ``x^2``, in the forward
    pass, and ``psi``, the mean of ``z dL/dz``, in the backward pass. Both are replaced by their
    means over the last `buffer_size` steps:

        z = x / sqrt(mean chi^2 + eps)         y = weight * r * z + bias
        dL/dx = (dL/dz - z * mean psi) / sqrt(mean chi^2 + eps)

    ``eval()`` uses ``running_square``, the exponential moving average of ``mean chi^2``. ``r``, which
    has no gradient, corrects training towards it: ``r^2 = (mean chi^2 + eps) / (running_square +
    eps)``, with ``r`` clipped to ``[1 / limit, limit]``. With ``buffer_size=1, limit=1`` this is
    BatchNorm without the mean.

    If a forward pass has several statistics batches (`samples`), each is treated as a device: it has
    its own past statistics and its own ``running_square``, by its index in the batch, and ``eval()``
    uses the mean over these. The buffers get a slot for each at the first training step; slots added
    later begin with the mean of the existing ones.

    Args:
        num_features: Channels ``C`` of an input ``(N, C, *)``.
        eps: Added to the mean square.
        momentum: Weight of the newest step in ``running_square``: 1 minus the paper's alpha, 0.98.
        affine: Learn ``weight`` and ``bias``, each ``(C,)``.
        buffer_size: Steps in a mean (the paper's m, 16).
        limit: Limit of ``r``, the paper's lambda; the authors' released code has 5.
        warmup: First training steps, by the batch's own statistics; the default is the authors'.
        renorm_start: First training steps with ``r = 1``; the default is the authors'.
        samples: Consecutive samples of a statistics batch in training; None for the whole batch.
        pooled: Share past statistics, unlike the authors' devices: ``chi^2``, ``psi`` and
            ``running_square`` of past steps are means over all statistics batches of a step.

    Attributes:
        running_square: ``(S, C)``, for ``S`` statistics batches; ``S`` is 1 if they are pooled.
        squares: ``(buffer_size, S, C)``; `responses` too.
        slotted: The names of these three; a loaded state dict sets their ``S``.
    """

    slotted = ("running_square", "squares", "responses")
    weight: Any
    bias: Any
    running_square: Tensor
    squares: Tensor
    responses: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.02, affine: bool = True, *,
                 buffer_size: int = 16, limit: float = 1.05, warmup: int = 100, renorm_start: int = 1000,
                 samples: int | None = None, pooled: bool = False) -> None:  # fmt: skip
        super().__init__()
        if buffer_size < 1 or limit < 1:
            raise ValueError(
                f"MovingAverageNorm got buffer_size={buffer_size} and limit={limit}, expected 1 or more of both"
            )
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.buffer_size, self.limit, self.warmup, self.renorm_start = buffer_size, limit, warmup, renorm_start
        self.samples, self.pooled = samples, pooled
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if affine else None)
        self.register_buffer("running_square", torch.ones(1, num_features))
        self.register_buffer("squares", torch.zeros(buffer_size, 1, num_features))
        self.register_buffer("responses", torch.zeros(buffer_size, 1, num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"MovingAverageNorm got an input of shape {tuple(input.shape)}, expected (N, {self.num_features}, *)"
            )
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        shape = (-1, *[1] * (x.ndim - 2))
        if self.training:
            # A compiler would lose the backward pass's writes to a buffer. As a decorator this would import slowly.
            apply = torch.compiler.disable(self._by_moving_averages)
            y: Tensor = apply(in_groups(x, self.samples)).view(x.shape)
        else:
            y = x * (self.running_square.mean(0) + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _by_moving_averages(self, groups: Tensor) -> Tensor:
        """``r z`` of ``(groups, samples, C, *)``."""
        if not self.pooled:
            self._make_slots(len(groups))
        square, r = self._observe(groups)
        step = self.num_batches_tracked - 1
        shape = (len(groups), 1, -1, *[1] * (groups.ndim - 3))
        chi = (square + self.eps).sqrt().view(shape)
        z: Tensor = _Divide.apply(groups, chi, self.responses, step, step < self.warmup)
        return r.view(shape) * z

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``mean chi^2`` and ``r``, ``(groups, C)``, by the running average before this step's update."""
        step = self.num_batches_tracked.clone()
        square = _push_and_average(self.squares, x.square().mean([1, *range(3, x.ndim)]), step, step < self.warmup)
        running = self.running_square[: len(square)]
        r = ((square + self.eps) / (running + self.eps)).sqrt().clamp(1 / self.limit, self.limit)
        r = torch.where(step < self.renorm_start, torch.ones_like(r), r)
        running += self.momentum * (_to_slots(square, running) - running)
        self.num_batches_tracked += 1
        return square, r

    @torch.no_grad()
    def _make_slots(self, count: int) -> None:
        """Extend the buffers to at least ``count`` slots."""
        for name in self.slotted:
            buffer = getattr(self, name)
            if (more := count - buffer.shape[-2]) > 0:
                size = [-1] * (buffer.ndim - 2) + [more, -1]
                setattr(self, name, torch.cat([buffer, buffer.mean(-2, keepdim=True).expand(size)], -2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Resize the buffers to the checkpoint's number of statistics batches, then load."""
        for name in self.slotted:
            buffer, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and saved.ndim == buffer.ndim and not self.pooled:
                setattr(self, name, buffer[..., :1, :].expand(*buffer.shape[:-2], saved.shape[-2], -1).clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, buffer_size={self.buffer_size}"


def _push_and_average(buffer: Tensor, newest: Tensor, step: Tensor, warmup: Tensor) -> Tensor:
    """Write ``newest`` ``(groups, C)`` into the buffer ``(m, slots, C)``; its mean, or in the warm-up ``newest``."""
    buffer = buffer[:, : len(newest)]
    size = len(buffer)
    stored = _to_slots(newest, buffer[0])
    buffer.index_copy_(0, (step % size).view(1), stored[None].to(buffer.dtype))
    mean = (buffer.sum(0) + (newest - stored)) / (step + 1).clamp_max(size)
    return torch.where(warmup, newest, mean)


def _to_slots(of_groups: Tensor, slots: Tensor) -> Tensor:
    """``(groups, C)`` for ``(slots, C)``: one group for each slot, or the mean for a single slot."""
    return of_groups if len(of_groups) == len(slots) else of_groups.mean(0, keepdim=True)


class _Divide(torch.autograd.Function):
    """``x / chi``; its gradient treats ``chi`` as the batch's own, with ``psi`` averaged over steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chi: Tensor, responses: Tensor, step: Tensor, warmup: Tensor) -> Tensor:
        z = x / chi
        ctx.save_for_backward(z, chi, step, warmup)
        ctx.responses = responses  # written to in the backward pass, so it must not be a saved tensor
        return z

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        z, chi, step, warmup = ctx.saved_tensors
        newest = (gradient * z).mean([1, *range(3, z.ndim)])
        psi = _push_and_average(ctx.responses, newest, step, warmup)
        return (gradient - z * psi.view(chi.shape)) / chi, None, None, None, None


class _Centralized(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(list(range(1, weight.ndim)), keepdim=True)


def centralize(model: nn.Module) -> nn.Module:
    """Subtract its mean from every filter of every convolution inside ``model``, in place.

    It is a parametrization: the learned parameter is the filter with its mean. Transposed
    convolutions and filters of a single number stay as they are.
    """
    for layer in list(model.modules()):
        if isinstance(layer, _ConvNd) and not layer.transposed and layer.weight[0].numel() > 1:
            parametrize.register_parametrization(layer, "weight", _Centralized())
    return model


def to_moving_average(model: nn.Module, centralized: bool = True, momentum: float = 0.02, **options: Any) -> nn.Module:
    """Replace every BatchNorm inside ``model``, in place, by `MovingAverageNorm`.

    With ``centralized``, also `centralize` the convolutions; a bias before the layer undoes its effect.

    Example:
        >>> to_moving_average(nn.Sequential(nn.BatchNorm2d(8)), buffer_size=4)[0].squares.shape
        torch.Size([4, 1, 8])
    """
    replace_batchnorm(
        model, lambda norm: MovingAverageNorm(norm.num_features, norm.eps, momentum, norm.affine, **options)
    )
    return centralize(model) if centralized else model
