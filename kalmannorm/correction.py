"""The correction of a layer's prior: a shift and a scale for each channel (`kalmannorm.calibrate`).

With ``R`` the process noise, the layer fuses with

    m_prior' = m_prior + shift        v_prior' = scale (v_prior + R)

A layer that comes with trained running statistics gets the correction that leads to these, at its first call.
"""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kalmannorm.gaussian import Gaussian
from kalmannorm.kernels.autograd import is_transformed
from kalmannorm.kernels.formulas import at_least_float32
from kalmannorm.priors import with_noise

# The largest scale. Half precision holds it, and a gradient through the prior stays finite.
_LARGEST_SCALE = 1e4


def is_trained(mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether running statistics, ``(C,)`` each, differ from zeros and ones; False on the meta device and the like."""
    if mean is None or var is None or mean.is_meta or type(mean) not in (Tensor, nn.Parameter):
        return False
    return bool((mean != 0).any()) or bool((var != 1).any())


class _Reading:
    """A tensor that was read, torch's count of its changes then, and the mode. A layer's copy has read nothing.

    torch counts no write through ``.data``, such as of Lightning's averages of weights, which validation alone sees.
    """

    def __init__(self, t: Tensor, training: bool) -> None:
        self.tensor, self.version = weakref.ref(t), t._version  # no `id`, which a later tensor may have again
        self.training = training

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _counts_changes(t: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or t.is_meta or t.is_inference())


def _is_batched(t: Tensor) -> bool:
    """Whether ``torch.vmap`` goes over it, so that nobody can look at its numbers."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def _is_one_tensor(a: Any, b: Tensor) -> bool:
    """Whether both are one tensor, or have the same memory, as a detached one has."""
    plain = (Tensor, nn.Parameter)
    return a is b or (type(a) in plain and type(b) in plain and not b.is_meta and a.data_ptr() == b.data_ptr())


class CorrectedPrior(nn.Module):
    """The buffers ``prior_shift`` and ``prior_scale``, ``(C,)``, and how they are found and loaded.

    Each layer has them, so that all processes and checkpoints do: zeros and ones without a correction.
    """

    weight: Any
    _label: Any
    _warn_once: Any
    process_noise: nn.Parameter | None
    prior_shift: Tensor
    prior_scale: Tensor
    is_corrected: bool  # or will be
    awaits_correction: bool  # the next call that computes a prior finds it; until then the scale is below 0
    # Whether running statistics in a BatchNorm checkpoint correct the prior; None: if they are trained ones.
    calibrates: bool | None = None
    dropped_statistics: Gaussian | None  # the target of an awaited correction, if running statistics were dropped
    _settled: _Reading | None = None  # of the scale, when it was read or found

    def await_correction(self) -> None:
        """Correct the prior by the running statistics at the next call that computes a prior."""
        # An average of weights moves the scale towards others, and must not reach 0.
        self._begin_correction(-1e30)
        self.is_corrected = self.awaits_correction = True

    def drop_correction(self) -> None:
        """Use priors as the layers below predict them."""
        self._begin_correction(1.0)
        self.is_corrected = self.awaits_correction = False
        self.dropped_statistics = None

    def _begin_correction(self, scale: float) -> None:
        beside = self.prior_shift if self._of_checkpoints is None else self._of_checkpoints
        dtype = torch.promote_types(self.prior_shift.dtype, torch.float32)
        with torch.inference_mode(False):  # a later pass writes into them
            self.prior_shift = torch.zeros(self.prior_shift.shape, device=beside.device, dtype=dtype)
            self.prior_scale = torch.full_like(self.prior_shift, scale)
        self._settled = None

    def _read_correction(self) -> None:
        """Take the correction as the buffers have it."""
        shift, scale = self.prior_shift, self.prior_scale
        waits = scale < 0
        if waits.is_meta or type(waits) is not Tensor:  # a compiler's or exporter's stand-in
            return
        self.awaits_correction = bool(waits.any())
        self.is_corrected = bool((shift != 0).any()) or bool((scale != 1).any())
        self._settled = _Reading(scale, self.training) if _counts_changes(scale) else None

    def _note_if_corrected(self) -> None:
        """Read the correction again if the buffers may have changed: a state may be restored, DistributedDataParallel
        sends the first process's, and ``torch.func.functional_call`` replaces tensors for one call.
        """
        scale = self.prior_scale
        if not _counts_changes(scale):
            return
        last = self._settled if self._settled is not None and self._settled.tensor() is scale else None
        is_same = last is not None and last.version == scale._version and last.training == self.training
        if is_same or _is_batched(scale) or "_is_replica" in self.__dict__:
            return
        # DistributedDataParallel writes its buffers at each call, the same numbers; to look makes a device wait.
        is_written = scale.device.type != "cpu" and dist.is_available() and dist.is_initialized()
        if last is None or last.training != self.training or not is_written:
            self._read_correction()

    @torch.no_grad()
    def correction_to(self, prior: Gaussian, target: Gaussian) -> tuple[Tensor, Tensor]:
        """Shift and scale, ``(C,)``, that turn a prior without process noise into a target, ``(1, C)`` each.

        The scale is at most 10,000. A channel that is not finite gets shift 0 and scale 1.
        """
        var = with_noise(prior, self.process_noise).var[0]
        shift = target.mean[0] - prior.mean[0]
        scale = target.var[0] / var.clamp_min(torch.finfo(var.dtype).tiny)
        finite = shift.isfinite() & scale.isfinite()
        return torch.where(finite, shift, 0.0), torch.where(finite, scale, 1.0).clamp(0.0, _LARGEST_SCALE)

    def _correction(self, prior: Gaussian) -> tuple[Tensor, Tensor] | tuple[()]:
        """Shift and scale, ``(C,)`` each, if there are any; the first call finds them."""
        if not (self.is_corrected or _is_batched(self.prior_scale)):
            return ()
        shift, scale = self.prior_shift, self.prior_scale
        compiling, is_batched = torch.compiler.is_compiling(), _is_batched(scale)
        if not (self.awaits_correction or is_batched):
            return shift, scale
        if self.dropped_statistics is None and getattr(self, "running_mean", None) is None:
            return (shift, scale) if is_batched else self._without_target()
        given = prior.detach().per_channel(1)
        found = self.correction_to(given, self.correction_target().map(lambda t: t.to(given.mean.device)))
        if is_batched:
            return torch.where(scale < 0, found[0], shift), torch.where(scale < 0, found[1], scale)
        if scale.is_meta or (is_transformed() and not compiling):  # buffers cannot be changed in place there
            return found
        # A batch that is not finite may make priors so; the next one corrects them.
        if not (compiling or all(bool(t.isfinite().all()) for t in (given.mean, given.var))):
            return found
        with torch.no_grad():
            shift.copy_(found[0])
            scale.copy_(found[1].detach())  # from the process noise: an exported graph forgets `no_grad`
        self.dropped_statistics = None
        self.awaits_correction = False
        self._settled = _Reading(scale, self.training) if _counts_changes(scale) else None
        return shift, scale

    def _without_target(self) -> tuple[()]:
        """Drop the correction: `replace_all_batch_norm_modules_`, for one, removes running statistics."""
        if not torch.compiler.is_compiling():
            self._warn_once(
                f"{self._label()} lost its running statistics before they corrected its prior, which stays "
                "uncorrected. Call the network, or kalmannorm.calibrate(model, inputs), before you set them to None"
            )
            self.drop_correction()
        return ()

    def keep_correction_target(self) -> None:
        """Let an awaited correction lead to the running statistics as they are, whatever becomes of them."""
        self._note_if_corrected()
        if self.awaits_correction:
            self.dropped_statistics = self.correction_target().map(Tensor.clone)

    def correction_target(self) -> Gaussian:
        """The statistics that a correction leads to, ``(1, C)``."""
        return self._running_belief() if self.dropped_statistics is None else self.dropped_statistics

    def _running_belief(self) -> Gaussian:
        """The running statistics, ``(1, C)``."""
        layer: Any = self
        return Gaussian(layer.running_mean[None], layer.running_var[None]).map(at_least_float32)

    @property
    def _of_checkpoints(self) -> Tensor | None:
        """A tensor that each checkpoint has, to live where it does; None without any."""
        return self.weight if self.weight is not None else getattr(self, "running_mean", None)

    @property
    def has_known_statistics(self) -> bool:
        """Whether there are trained statistics that can correct the prior."""
        mean, var = getattr(self, "running_mean", None), getattr(self, "running_var", None)
        return self.dropped_statistics is not None or is_trained(mean, var)

    def _prepare_correction(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Without a correction in a checkpoint, drop the layer's, and await one if it has BatchNorm's statistics."""
        self._leave_out_own_tensors(state_dict, prefix)
        found = {name for name in ("prior_scale", "weight", "running_mean", "gain", "process_noise")
                 if prefix + name in state_dict}  # fmt: skip
        if not found or "prior_scale" in found:
            return
        mean, var = state_dict.get(prefix + "running_mean"), state_dict.get(prefix + "running_var")
        self.drop_correction()
        is_stock = not found & {"gain", "process_noise"}
        asks = is_stock and self.calibrates is not False and "running_mean" in self._buffers
        if not asks or mean is None or var is None or not is_trained(mean, var):
            return
        if self._buffers["running_mean"] is None:
            like = mean if self.weight is None or self.weight.is_meta else self.weight
            dtype = torch.promote_types(mean.dtype, torch.float32)
            self.dropped_statistics = Gaussian(mean[None], var[None]).map(lambda t: t.to(like.device, dtype, copy=True))
        self.await_correction()

    def _leave_out_own_tensors(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Where a checkpoint lacks a key, torch.distributed's ``set_model_state_dict`` adds the layer's own tensor. So
        does ``own = model.state_dict(); own.update(checkpoint)``.
        """
        own = [name for name, t in chain(self._parameters.items(), self._buffers.items())
               if t is not None and _is_one_tensor(state_dict.get(prefix + name), t)]  # fmt: skip
        is_sharded = hasattr(self.weight, "placements")  # torch may have broadcast the checkpoint's into it
        told = ("running_mean",) if is_sharded else ("weight", "running_mean")
        stock = {name for name in told if prefix + name in state_dict}
        if stock and not stock & set(own):
            for name in {*own} - {"weight", "bias"}:
                del state_dict[prefix + name]

    def _check_loaded_correction(self) -> bool:
        """Whether a loaded correction can be used or found; if not, it is dropped."""
        self._read_correction()
        if not self.awaits_correction:
            self.dropped_statistics = None
        elif not self.has_known_statistics and not self.prior_scale.is_meta:
            self.drop_correction()
            return False
        return True
