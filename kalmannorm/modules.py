"""The layers: drop-in for torch.nn's BatchNorm and GroupNorm."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.checkpoints import is_recomputing, is_reentrant, of_first_run
from kalmannorm.correction import CorrectedPrior
from kalmannorm.functional import KalmanNormOutput, group_kalman_norm, kalman_norm, synchronize
from kalmannorm.gaussian import Gaussian, Packed, Unknown
from kalmannorm.kernels.arguments import Given, Options, Running
from kalmannorm.kernels.autograd import is_transformed
from kalmannorm.kernels.formulas import at_least_float32, gain_by, move_running
from kalmannorm.kernels.layer import layer
from kalmannorm.paper import drawn_belief
from kalmannorm.priors import INITIAL_NOISE, Prior, tensors_of
from kalmannorm.propagation import belief_for, without_autocast
from kalmannorm.recording import Recorder, attach, current, is_open, is_resting, paused
from kalmannorm.rules import Belief
from kalmannorm.steps import Step, put, step_of

_L = TypeVar("_L", bound="KalmanLayer")
Gain = float | Literal["prior-strength", "learned"]
Carry = Literal["output", "posterior"]
Estimator = Literal["exact", "monte_carlo"]

# The released code's gain at 2 samples a group is 0.1: a prior worth 18 samples.
_INITIAL_STRENGTH = 18.0
_INITIAL_LOGIT = math.log(0.1 / 0.9)


def is_stock_batchnorm(layer: nn.Module) -> bool:
    """Whether a layer is BatchNorm and not a Kalman layer, which ``isinstance`` takes for BatchNorm too."""
    return isinstance(layer, _BatchNorm) and not isinstance(layer, KalmanLayer)


def _by_its_type(layer: KalmanLayer, x: Any) -> Any:
    """Normalize what is not a plain tensor: torch.fx traces the layer whole, and a subclass types its output."""
    if isinstance(x, fx.Proxy):
        if type(layer).forward is not KalmanLayer.forward:
            raise TypeError(f"torch.fx cannot trace the forward of {layer._label()}, expected it to be a leaf module")
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), {})  # type: ignore[attr-defined]
    if hasattr(x, "device_mesh"):
        raise TypeError(f"{layer._label()} got a DTensor, expected a torch.Tensor: tensor parallelism is not supported")
    typed = getattr(type(x), "__torch_function__", None)
    if typed is None or torch.compiler.is_compiling():
        return layer._normalize(x)
    plain = []

    def normalize(x: Tensor) -> Tensor:
        plain.append(layer._normalize(x))
        return plain[0]

    output = typed(normalize, (type(x),), (x,), {})
    if plain and isinstance(output, Tensor) and output is not plain[0]:
        with paused():
            put(output, step_of(plain[0]))
    return output


class KalmanLayer(CorrectedPrior):
    """The options and parameters of the filter, the layer's prior, and the belief that it attaches to its output."""

    weight: Any
    bias: Any
    eps: float
    layer_name: str
    _ranks: tuple[int, ...]  # of inputs
    _channels: Any
    _stock_name = "BatchNorm"
    statistic_groups: Callable[[int], int]
    _normalize: Callable[[Tensor], Tensor]
    # The layer that it replaced, without tensors, if not a plain torch.nn one. The tuple hides it from `modules()`.
    replaces: tuple[nn.Module, ...] = ()
    frozen = False  # set by `kalmannorm.freeze`
    # How often its training flag was set: parameters may have been changed since by `.data`, which nothing counts.
    times_switched = 0

    def _init_filter(self, channels: int, gain: Gain, process_noise: bool, spread: bool, carry: Carry,
                     estimator: Estimator, guard: float | None, device: Any, dtype: Any,
                     bias: bool) -> None:  # fmt: skip
        if not bias:
            self.register_parameter("bias", None)
        self.layer_name = ""
        self.spread = bool(spread)
        self.carry = self._one_of("carry", carry, ("output", "posterior"))
        self.estimator: Estimator = self._one_of("estimator", estimator, ("exact", "monte_carlo"))
        if guard is not None and not guard > 0:
            raise ValueError(f"{self._label()} got guard={guard!r}, expected None or a number above 0")
        self.guard = guard
        self._warned: set[str] = set()
        if isinstance(gain, str):
            self.gain_rule: str = self._one_of("gain", gain, ("prior-strength", "learned"))
            # FSDP shards along one dimension. Zero is the initial gain, to which weight decay then draws it.
            self.gain: Tensor | float = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        elif isinstance(gain, int | float) and not isinstance(gain, bool) and 0 < gain <= 1:
            self.gain_rule = "fixed"
            self.gain = float(gain)
        else:
            raise ValueError(
                f"{self._label()} got gain={gain!r}, expected 'prior-strength', 'learned' or a number in (0, 1]"
            )
        noise = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if process_noise else None
        self.register_parameter("process_noise", noise)
        self.calibrates = None
        for name in ("prior_shift", "prior_scale"):
            empty = torch.empty(channels, device=device, dtype=dtype)
            self.register_buffer(name, empty, persistent=not self.ignores_prior)
        self.drop_correction()
        # On the layer, as a compiler's guards look at instances and not at their class.
        self.online = False  # set by `kalmannorm.online_statistics`
        self.is_observed = False  # set by `kalmannorm.calibrate` while it looks at priors

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            f"torch.jit.script cannot compile {self._label()}, expected stock layers: kalmannorm.to_batchnorm(model) "
            "first, or torch.export in place of torch.jit.script"
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, *)``; the output is of the input's type, for subclasses of tensors too."""
        return self._normalize(input) if type(input) is Tensor else _by_its_type(self, input)  # type: ignore[no-any-return]

    def train(self: _L, mode: bool = True) -> _L:
        """As :meth:`torch.nn.Module.train`; ``eval()`` calls it too. Priors that were kept are computed again."""
        self.times_switched += 1
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Reset all parameters and running statistics to their initial values, those of a frozen layer too."""
        frozen, self.frozen = self.frozen, False
        super().reset_parameters()  # type: ignore[misc]
        self.frozen = frozen
        for parameter in (self._parameters.get("gain"), self._parameters.get("process_noise")):
            if parameter is not None:
                nn.init.zeros_(parameter)
        if "prior_scale" in self._buffers:  # not in torch's constructor
            self.drop_correction()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As torch's. Tensors that no BatchNorm checkpoint has leave the meta device with their initial values."""
        self._leave_meta()
        return self._apply_to_all(fn, recurse)

    def _apply_to_all(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
        added = ("gain", "process_noise", "nonfinite_batches")
        on_meta = [name for name in added if isinstance(t := getattr(self, name, None), Tensor) and t.is_meta]
        was_on_meta = self.prior_scale.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in on_meta:
            getattr(self, name).data.zero_()
        if was_on_meta and not self.prior_scale.is_meta:
            (self.await_correction if self.awaits_correction else self.drop_correction)()
        return self

    def _one_of(self, option: str, value: Any, allowed: tuple[str, ...]) -> Any:
        if value not in allowed:
            raise ValueError(f"{self._label()} got {option}={value!r}, expected one of {list(allowed)}")
        return value

    def _label(self) -> str:
        """The layer's name in errors."""
        name = self.__dict__.get("layer_name", "")
        return type(self).__name__ + (f" {name!r}" if name else "")

    @property
    def ignores_prior(self) -> bool:
        """Whether the gain is fixed at 1: the layer is then the stock layer."""
        return not isinstance(gain := self.gain, Tensor) and gain == 1.0

    def kalman_gain(self, samples: int | Tensor) -> Tensor | float:
        """The gain ``q`` in (0, 1] that fuses an observation of ``samples`` feature maps.

        ``"prior-strength"``: ``q = n / (n + kappa)`` with ``kappa = 18 exp(gain)``.
        ``"learned"``: ``q = sigmoid(gain + logit(0.1))``. A fixed gain stays.
        """
        return gain_by(*self._gain_line(samples))

    def _gain_line(self, samples: Any) -> tuple[Tensor | None, Any, float, float]:
        """The gain as kernels take it: the arguments of :func:`~kalmannorm.kernels.formulas.gain_by`."""
        gain = self.gain
        if not isinstance(gain, Tensor):
            return None, 1, 0.0, gain
        parameter = at_least_float32(gain)
        if self.gain_rule == "learned":
            return parameter, 1, 1.0, _INITIAL_LOGIT
        return parameter, samples, -1.0, -math.log(_INITIAL_STRENGTH)

    def observed_maps(self, samples: int) -> int:
        """The ``n`` of :meth:`kalman_gain` for a batch: how many feature maps a statistic is taken over."""
        return samples // self.statistic_groups(samples)

    @property
    def keeps_priors(self) -> bool:
        """Whether the layer fuses in ``eval()``, by a prior that depends on parameters alone: it is computed once."""
        fuses = not self.training and not self.online and getattr(self, "running_mean", None) is None
        return fuses and self.estimator == "exact" and self.carry == "output"

    def prior(self, x: Tensor, groups: int) -> Gaussian | None:
        """The prior of an input, ``(S, C)``, with process noise and corrected.

        It is None where it is unknown, and where the gain is fixed at 1.
        """
        with without_autocast(x.device):
            return self._prior(x, groups, current()).corrected(groups)

    def _prior(self, x: Tensor, groups: int, mode: Recorder | None) -> Prior:
        """The prior as the kernel takes it: kept from an earlier pass in ``eval()``, or computed."""
        if self.ignores_prior:
            return Prior(None, self.process_noise)
        if mode is None or not self.keeps_priors or torch.compiler.is_dynamo_compiling() or not mode.priors.are_used:
            return self._computed_prior(x, groups, mode)
        return mode.priors.of(self, lambda: self._computed_prior(x, groups, mode))

    def _computed_prior(self, x: Tensor, groups: int, mode: Recorder | None) -> Prior:
        if is_recomputing() and is_reentrant():
            raise RuntimeError(
                f"{self._label()} is run again by a reentrant checkpoint, which loses the belief about its input "
                "and the gradients through it: expected torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if self.training and mode is None:
            self._warn_once(
                f"{self._label()} sees no propagation and acts as {self._stock_name}: no connected module was called "
                "around it. Call model(x) and not its parts or model.forward(x), which leave out the hooks; a model "
                "that kalmannorm.convert did not make needs kalmannorm.connect(model) once"
            )
        self._note_if_corrected()
        belief = self.belief(x, groups)
        if not isinstance(belief, Unknown):
            return Prior(belief, self.process_noise, *self._correction(belief))
        if not self.is_corrected or getattr(self, "running_mean", None) is None:
            if mode is not None and not torch.compiler.is_compiling():
                mode.without_prior[self.layer_name] = belief.reason
            return Prior(None, self.process_noise)
        # A corrected layer then takes its running statistics, without process noise. In the logarithm, so that the
        # parameter keeps a gradient, of zero, for DistributedDataParallel.
        noise = None if self.process_noise is None else self.process_noise - math.inf
        return Prior(of_first_run(self, self._running_belief().map(Tensor.clone)), noise)

    def belief(self, x: Tensor, groups: int) -> Belief:
        """The belief about an input by the layer's estimator, as ``kalmannorm.propagation.belief_for`` gives it."""
        return belief_for(x, groups) if self.estimator == "exact" else drawn_belief(x, groups)

    def _warn_once(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def _attach_belief(self, y: Tensor, posterior: Gaussian, prior: Gaussian | None = None,
                       alone: bool = False) -> None:  # fmt: skip
        """Attach the belief about the output, ``(beta, gamma^2 v / (v + eps))``, or the posterior, ``(m, v)``.

        Where priors are kept, ``v`` is the prior's, so that the beliefs above do not depend on the batch. In training
        groups share their mean; in ``eval()`` no group may depend on another. Of a value ``alone``, without a prior,
        ``v`` would be 0, and the layers above would amplify what rounding leaves: it counts as 1.
        """
        if (mode := current()) is None or is_resting(mode):
            return
        belief = posterior
        if self.keeps_priors or (alone and self.carry == "output"):
            unit = Gaussian(torch.zeros_like(posterior.mean[:1]), torch.ones_like(posterior.var[:1]))
            belief = unit if prior is None else prior.map(lambda t: t[:1])
        if self.carry == "output":
            scale = belief.var / (belief.var + self.eps)
            if self.training:
                scale = scale.mean(0, keepdim=True)
            if self.weight is not None:
                scale = scale * self.weight.to(scale.dtype).square()
            mean = torch.zeros_like(scale) if self.bias is None else self.bias.to(scale.dtype).expand_as(scale)
            belief = Gaussian(mean, scale)
        belief = belief.map(lambda t: t.reshape(*t.shape, *[1] * (y.ndim - 2)))
        attach(y, belief, self.layer_name or type(self).__name__)

    def _refuse_tracing(self) -> None:
        """The sizes of groups would be constants of the trace."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise TypeError(
                f"torch.jit.trace cannot trace the statistic groups of {self._label()}, expected torch.export in its "
                "place, or stock layers: kalmannorm.to_batchnorm(model) first"
            )

    def _check_input(self, x: Tensor) -> None:
        channels = self._channels
        if x.ndim not in self._ranks or x.shape[1] != channels:
            shapes = " or ".join(f"(N, {channels}{', *' * (rank - 2)})" for rank in self._ranks)
            raise ValueError(f"{self._label()} got an input of shape {tuple(x.shape)}, expected {shapes}")
        if not x.is_floating_point():
            raise TypeError(f"{self._label()} got an input of type {x.dtype}, expected a floating-point type")

    def _bias_without_prior(self) -> Tensor | None:
        """The bias, with a zero gradient for unused parameters: DistributedDataParallel expects one for each."""
        bias: Tensor | None = self.bias
        for parameter in (self.gain, self.process_noise):
            if isinstance(parameter, Tensor) and parameter.requires_grad and torch.is_grad_enabled():
                nothing = parameter[:0].sum()  # not 0 times it, which may be NaN
                bias = nothing.expand(self._channels) if bias is None else bias + nothing
        return bias

    def _normalize_nothing(self, x: Tensor) -> Tensor:
        """The output of an empty batch, from which every parameter gets a zero gradient."""
        y = x
        for parameter in self.parameters(recurse=False):
            y = y + parameter[:0].sum().to(x.dtype)
        return y

    def extra_repr(self) -> str:
        """The stock layer's options, and those of the filter."""
        gain = self.gain if self.gain_rule == "fixed" else repr(self.gain_rule)
        text = f"{super().extra_repr()}, gain={gain}, process_noise={self.process_noise is not None}, "
        text += f"spread={self.spread}, carry={self.carry!r}, estimator={self.estimator!r}"
        text += f", guard={self.guard}" if self.guard is not None else ""
        text += ", frozen=True" if self.frozen else ""
        size = getattr(self, "stats_batch_size", None)
        return text + (f", stats_batch_size={size}" if size is not None else "")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              strict: bool, missing_keys: list[str], unexpected_keys: list[str],
                              error_msgs: list[str]) -> None:  # fmt: skip
        """A stock layer's checkpoint leaves ``gain`` and ``process_noise``, and its running statistics correct the
        prior; a Kalman layer's has the correction itself, or none.
        """
        if local_metadata.get("version") is not None or prefix + "running_mean" in state_dict:
            self._prepare_correction(state_dict, prefix)  # else these may be parameters alone
        missing: list[str] = []
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)
        drops = self._buffers.get("running_mean", self) is None
        dropped = {prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")} if drops else ()
        unexpected_keys.extend(key for key in unexpected if key not in dropped)
        optional = {prefix + name for name in ("gain", "process_noise", "prior_shift", "prior_scale")}
        missing_keys.extend(key for key in missing if key not in optional)
        self._leave_meta()
        if not self._check_loaded_correction():
            self._warn_once(
                f"{self._label()} loads a checkpoint that was made before its prior was corrected, and keeps no "
                "running statistics that could do it: its prior stays uncorrected. Run the network once before "
                "its state_dict is saved, or call kalmannorm.calibrate(model, loader)"
            )

    def _leave_meta(self) -> None:
        """Bring what a checkpoint lacked from the meta device to where its tensors are."""
        there = self._of_checkpoints
        if there is not None and not there.is_meta and any(t.is_meta for t in tensors_of(self)):
            self._apply_to_all(lambda t: torch.empty_like(t, device=there.device) if t.is_meta else t, recurse=False)


class KalmanNorm(KalmanLayer, _BatchNorm):
    """Kalman normalization of 2-d to 5-d inputs; :class:`KalmanNorm2d` and the like check the rank.

    In training, each channel is normalized by the batch's statistics fused with what the layers
    below predict (Eq. 7 of the paper). In ``eval()``, by moving averages of the fused statistics, as
    in BatchNorm. With ``gain=1.0``, or without a prior, it equals BatchNorm to rounding; one value a
    channel gives the bias in place of BatchNorm's error.

    Args:
        num_features: channels ``C`` of an input ``(N, C, *)``.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None for their plain mean.
        affine: learn ``weight`` and ``bias``, each ``(C,)``.
        track_running_stats: keep running statistics; without them, ``eval()`` fuses too.
        gain: how far to trust the batch: a number ``q`` in (0, 1]; ``"learned"``, one scalar;
            ``"prior-strength"``, ``q = n / (n + kappa)`` at ``n`` samples a group, with one learned
            ``kappa``, the number of samples that the prior is worth.
        process_noise: learn ``R``, added to the prior's variance, as a share of it for each channel.
        spread: add the distance of the two means to the fused variance.
        carry: pass on the belief about the ``"output"``, or the ``"posterior"`` of the input.
        estimator: move beliefs by ``"exact"`` rules, or ``"monte_carlo"`` draws as in the paper.
        stats_batch_size: normalize groups of so many consecutive samples; None for the whole batch.
        guard: see :func:`kalmannorm.functional.trusted_gain`.
        process_group: share statistics in this group, like ``SyncBatchNorm``.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn a ``bias`` too.

    Shape:
        ``(N, C)`` to ``(N, C, D, H, W)``, and the same out.

    Raises:
        ValueError: for an option or an input shape that is not one of these.
        TypeError: for an input that is not floating-point.
    """

    _ranks: tuple[int, ...] = (2, 3, 4, 5)
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    nonfinite_batches: Tensor | None
    # `kalmannorm.recalibrate` sets it. It gets each call's fused statistics, `(S, C)`, and their number of samples.
    collect: Callable[[Gaussian, int | Tensor], None] | None = None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, *, gain: Gain = "prior-strength", process_noise: bool = True,
                 spread: bool = True, carry: Carry = "output", estimator: Estimator = "exact",
                 stats_batch_size: int | None = None, guard: float | None = None,
                 process_group: dist.ProcessGroup | None = None, device: Any = None, dtype: Any = None,
                 bias: bool = True) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._init_filter(num_features, gain, process_noise, spread, carry, estimator, guard, device, dtype, bias)
        if stats_batch_size is not None and (type(stats_batch_size) is not int or stats_batch_size < 1):
            raise ValueError(
                f"{self._label()} got stats_batch_size={stats_batch_size!r}, expected None or an integer above 0"
            )
        if stats_batch_size is not None and process_group is not None:
            raise ValueError(
                f"{self._label()} got stats_batch_size={stats_batch_size} and a process_group, expected one of them: "
                "groups smaller than the batch, or larger"
            )
        self.stats_batch_size = stats_batch_size
        self.process_group = process_group
        counter = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("nonfinite_batches", counter, persistent=False)

    def drop_running_stats(self) -> None:
        """Keep no running statistics any more: fuse in ``eval()`` too."""
        self.keep_correction_target()
        self.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked", "nonfinite_batches"):
            setattr(self, name, None)

    def reset_running_stats(self) -> None:
        """Reset running statistics and counters, unless the layer is frozen. An awaited correction keeps its target."""
        if self.frozen:
            return
        if "prior_scale" in self._buffers:  # not in torch's constructor
            self.keep_correction_target()
        super().reset_running_stats()
        if (nonfinite := self._buffers.get("nonfinite_batches")) is not None:
            nonfinite.zero_()

    def __deepcopy__(self, memo: dict[int, Any]) -> KalmanNorm:
        """A copy shares its process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """The group of all processes is saved as such, as no group can be pickled."""
        is_world = self.process_group is not None and self.process_group is dist.group.WORLD
        return {**self.__dict__, "process_group": "world"} if is_world else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where processes are not connected, a layer that shared its statistics acts by itself."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if state.get("process_group") == "world":
            self.process_group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    @property
    def _channels(self) -> int:
        return self.num_features

    @property
    def is_fusing(self) -> bool:
        """Whether the next call normalizes by fused batch statistics, not by running ones."""
        return self.running_mean is None or (not self.frozen and (self.training or self.online))

    def _normalize(self, x: Tensor) -> Tensor:
        with paused():
            self._check_input(x)
            if not self.is_fusing:
                return self._by_running_statistics(x)
            if x.numel() == 0 and self.process_group is None:
                return self._normalize_nothing(x)
            groups = self.statistic_groups(x.shape[0])
            return self._by_kernel(x, groups) if self._has_kernel() else self._step_by_step(x, groups)

    def _step_by_step(self, x: Tensor, groups: int) -> Tensor:
        """Observe, fuse, normalize, by the functions of :mod:`kalmannorm.functional`."""
        samples: int | Tensor = self.observed_maps(x.shape[0])
        count: int | Tensor = x.numel() // (groups * self.num_features)
        observation = None
        if self.process_group is not None:
            observation, samples, count = synchronize(x, self.process_group)
        prior = self.prior(x, groups)
        alone = prior is None and not isinstance(count, Tensor) and self._is_alone(count)
        bias = self.bias if prior is not None else self._bias_without_prior()
        out = kalman_norm(
            x, prior, self.weight, bias, gain=self.kalman_gain(samples), spread=self.spread, guard=self.guard,
            groups=groups, eps=self.eps, observation=observation,
        )  # fmt: skip
        if self.training:
            self._remember(out, count, least=1 if prior is None else 0)
        if self.collect is not None:
            self.collect(out.posterior, groups * samples)
        self._attach_belief(out.output, out.posterior, prior, alone)
        return out.output

    def _has_kernel(self) -> bool:
        """Whether the fused kernel can handle this call."""
        if self.guard is not None or self.process_group is not None:
            return False
        return not is_transformed() or (torch.compiler.is_compiling() and self.momentum is not None)

    def _by_kernel(self, x: Tensor, groups: int, relu: bool = False) -> Tensor:
        """The same in one autograd function, which also updates the running statistics and may rectify."""
        mode = current()
        gain, samples, slope, offset = self._gain_line(x.shape[0] // groups)
        with without_autocast(x.device):
            prior = self._prior(x, groups, mode)
            known = prior.belief
            bias, moves, alone = self.bias, self.training, False
            if known is None:
                count = x.numel() // (groups * self.num_features)
                alone = self._is_alone(count)
                moves = moves and count > 1
                if torch.compiler.is_compiling():  # elsewhere the kernel gives zero gradients
                    bias = self._bias_without_prior()
            moments = None if known is None else known.packed().moments
            try:
                out = layer(
                    x, Given(moments, prior.shift, prior.scale, gain, prior.noise, self.weight, bias),
                    Options(groups, samples, slope, offset, INITIAL_NOISE, self.spread, self.eps, relu),
                    running=self._running() if moves else None, posterior=self.carry == "posterior",
                )  # fmt: skip
            except ValueError as error:  # a vector of another length
                error.args = (f"{self._label()} {error}",)
                raise
        if self.collect is not None:
            self.collect(_posterior(out.statistics), x.shape[0])
        if mode is None or is_resting(mode):
            return out.output
        if self.keeps_priors or alone or (groups > 1 and not self.training and self.carry == "output"):
            self._attach_belief(out.output, _posterior(out.statistics), prior.corrected(groups), alone)
        else:
            attach(out.output, Packed(out.belief), self.layer_name or type(self).__name__)
        if relu:
            below = step_of(out.output)
            put(out.output, Step(F.relu, (below,), {}, tuple(x.shape), recorded_in=mode.this_pass()))
        return out.output

    def _is_alone(self, count: int) -> bool:
        """Whether there is one value a channel, without a prior, which is its own mean. BatchNorm raises its error
        there, and this warns.
        """
        alone = count == 1 and (self.training or self.running_mean is None)
        if alone:
            self._warn_once(
                f"{self._label()} got one value a channel, and nothing is believed of its input: its output is its "
                "bias, whatever comes in, and its running statistics stay. Give kalmannorm.convert input_stats, or the "
                "layer more samples; kalmannorm.describe says why there is no prior"
            )
        return alone

    def _running(self) -> Running | None:
        """Buffers to update; None if there are none or a checkpoint is recomputing."""
        mean, var = self.running_mean, self.running_var
        batches, nonfinite = self.num_batches_tracked, self.nonfinite_batches
        if mean is None or var is None or batches is None or nonfinite is None or is_recomputing():
            return None
        if not self.track_running_stats:  # switched off by hand: BatchNorm keeps its statistics then
            return None
        momentum: float | Tensor | None = self.momentum
        if momentum is None:
            momentum = (batches + 1).double().reciprocal() if is_transformed() else 1 / (int(batches) + 1)
        return Running(mean, var, batches, nonfinite, momentum)

    def statistic_groups(self, samples: int) -> int:
        """The number ``S`` of groups in a batch of so many samples, which ``stats_batch_size`` must divide."""
        size = self.stats_batch_size
        if size is None:
            return 1
        self._refuse_tracing()
        if samples % size:
            raise ValueError(
                f"{self._label()} got a batch of {samples}, expected a multiple of stats_batch_size={size}"
            )
        return samples // size

    def _by_running_statistics(self, x: Tensor) -> Tensor:
        # A layer in eval() within a training network needs a gradient for every parameter, too.
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        bias = self.bias if plain else self._bias_without_prior()
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, bias, False, 0.0, self.eps)
        if is_open():  # a frozen layer among training ones
            self._attach_belief(y, self._running_belief())
        return y

    def _remember(self, out: KalmanNormOutput, count: int | Tensor, least: int) -> None:
        """Move the running averages, of the fused mean and (unbiased, as BatchNorm's) variance."""
        running = self._running()
        if running is None:
            return
        try:
            move_running(running, out.posterior, out.gain, out.observation.var, count, least)
        except RuntimeError as error:
            if not is_transformed():
                raise
            raise RuntimeError(
                f"{self._label()} cannot update its running statistics in place inside of this transform, expected "
                "eval(), track_running_stats=False, or buffers that are the transformed function's own"
            ) from error


def _posterior(statistics: Tensor) -> Gaussian:
    return Gaussian(statistics[0], statistics[1])


class KalmanNorm1d(KalmanNorm, nn.BatchNorm1d):
    """:class:`KalmanNorm` for ``(N, C)`` and ``(N, C, L)``: stands in for ``torch.nn.BatchNorm1d``."""

    _ranks = (2, 3)


class KalmanNorm2d(KalmanNorm, nn.BatchNorm2d):
    """:class:`KalmanNorm` for ``(N, C, H, W)``: stands in for ``torch.nn.BatchNorm2d``.

    Example:
        >>> import torch, kalmannorm as kn
        >>> layer = kn.KalmanNorm2d(8, gain=0.2)
        >>> layer.load_state_dict(torch.nn.BatchNorm2d(8).state_dict(), strict=True)  # a checkpoint of BatchNorm
        <All keys matched successfully>
    """

    _ranks = (4,)


class KalmanNorm3d(KalmanNorm, nn.BatchNorm3d):
    """:class:`KalmanNorm` for ``(N, C, D, H, W)``: stands in for ``torch.nn.BatchNorm3d``."""

    _ranks = (5,)


class GroupKalmanNorm(KalmanLayer, nn.GroupNorm):
    """Group Kalman normalization (section 3.3 of the paper): stands in for ``torch.nn.GroupNorm``.

    Each sample's channel groups are normalized by their own statistics, fused with what the layers
    below predict. There are no running statistics, so it fuses in ``eval()`` too. With ``gain=1.0``,
    or without a prior, it equals GroupNorm to rounding. Outputs do not depend on other samples. In
    training, gradients do, a little: the beliefs of the layers above are means over the samples.

    Args:
        num_groups: ``G``; ``C`` groups make it instance normalization.
        num_channels: ``C``, a multiple of ``G``.
        eps: added to the variance.
        affine: learn ``weight`` and ``bias``, each ``(C,)``.
        gain: as :class:`KalmanNorm`'s; the ``n`` of ``"prior-strength"`` is the ``C / G`` feature
            maps that a group observes.
        process_noise, spread, carry, estimator, guard, device, dtype, bias: as :class:`KalmanNorm`'s.
        stats_batch_size, process_group: only None: a group never has more than one sample.

    Shape:
        ``(N, C, *)``, and the same out.

    Raises:
        ValueError: for an option or an input shape that is not one of these.
        TypeError: for an input that is not floating-point.

    Example:
        >>> import torch, kalmannorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(4, 8))
        >>> model = kn.convert(model, layers=("group",))
        >>> type(model[1]).__name__
        'GroupKalmanNorm'
    """

    _stock_name = "GroupNorm"
    # Fewer where it replaces instance normalization, which also takes inputs without a batch axis.
    _ranks: tuple[int, ...] = (2, 3, 4, 5)

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *,
                 gain: Gain = "prior-strength", process_noise: bool = True, spread: bool = True,
                 carry: Carry = "output", estimator: Estimator = "exact", stats_batch_size: int | None = None,
                 guard: float | None = None, process_group: dist.ProcessGroup | None = None, device: Any = None,
                 dtype: Any = None, bias: bool = True) -> None:  # fmt: skip
        if num_channels % num_groups:
            raise ValueError(
                f"{self._label()} got {num_channels} channels, expected a multiple of num_groups={num_groups}"
            )
        if stats_batch_size is not None or process_group is not None:
            raise ValueError(
                f"{self._label()} got stats_batch_size={stats_batch_size!r} and process_group={process_group!r}, "
                "expected None: its statistics are of one sample"
            )
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._init_filter(num_channels, gain, process_noise, spread, carry, estimator, guard, device, dtype, bias)

    @property
    def is_fusing(self) -> bool:
        """Always: there are no running statistics."""
        return True

    def statistic_groups(self, samples: int) -> int:
        """One for each sample."""
        return samples

    @property
    def _channels(self) -> int:
        return self.num_channels

    def observed_maps(self, samples: int) -> int:
        """As the batch layers': the feature maps of a channel group."""
        return self.num_channels // self.num_groups

    def _normalize(self, x: Tensor) -> Tensor:
        with paused():
            self._check_input(x)
            if x.numel() == 0:
                return self._normalize_nothing(x)
            self._refuse_tracing()
            prior = self.prior(x, x.shape[0])
            bias = self.bias if prior is not None else self._bias_without_prior()
            out = group_kalman_norm(
                x, prior, self.num_groups, self.weight, bias,
                gain=self.kalman_gain(self.observed_maps(x.shape[0])), spread=self.spread, guard=self.guard,
                eps=self.eps,
            )  # fmt: skip
            self._attach_belief(out.output, out.posterior, prior)
            return out.output


class _ThenActivation(nn.Module):
    """What follows the normalization in layers that do both: dropout, then an activation."""

    def __init__(self, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def _normalize(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super()._normalize(x)))  # type: ignore[no-any-return, misc]


class KalmanNormAct2d(_ThenActivation, KalmanNorm2d):
    """:class:`KalmanNorm2d` and the activation after it: stands in for timm's ``BatchNormAct2d``.

    Args:
        args, kwargs: as :class:`KalmanNorm2d`'s.
        drop: a module between the two; None for nothing.
        act: the activation; None for nothing.
    """

    def _normalize(self, x: Tensor) -> Tensor:
        """As the parent, a ReLU in the same step."""
        if not self._rectifies() or not self.is_fusing or not self._has_kernel() or x.numel() == 0:
            return super()._normalize(x)
        with paused():
            self._check_input(x)
            return self._by_kernel(x, self.statistic_groups(x.shape[0]), relu=True)

    def _rectifies(self) -> bool:
        """Whether only a ReLU without hooks follows."""
        if type(self.act) is not nn.ReLU or type(self.drop) is not nn.Identity:
            return False
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return not any(getattr(each, name) for each in (self.act, self.drop) for name in hooks)


class GroupKalmanNormAct(_ThenActivation, GroupKalmanNorm):
    """:class:`GroupKalmanNorm` and the activation after it: stands in for timm's ``GroupNormAct``.

    Args:
        args, kwargs: as :class:`GroupKalmanNorm`'s.
        drop, act: as :class:`KalmanNormAct2d`'s.
    """
