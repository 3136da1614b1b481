"""The normalizations by name: their labels and colours, and how they replace a network's BatchNorm layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

import kalmannorm
from kalmannorm.lab.baselines.cross_iteration import to_cross_iteration
from kalmannorm.lab.baselines.moving_average import to_moving_average
from kalmannorm.lab.baselines.norm_act import to_evonorm, to_frn
from kalmannorm.lab.baselines.proxy import to_proxy
from kalmannorm.lab.baselines.renorm import RenormSchedule, to_batch_renorm
from kalmannorm.lab.baselines.stock import to_frozen, to_ghost, to_groupnorm, to_instancenorm, to_layernorm, to_sync
from kalmannorm.lab.baselines.weight_norm import to_weight_norm
from kalmannorm.modules import is_stock_batchnorm
from kalmannorm.steps import detached, put, step_of
from kalmannorm.traversal import kalman_layers

# Training steps in the paper of Batch Renormalization, whose schedule is in steps.
_RENORM_STEPS = 130_000


@dataclass(frozen=True)
class Method:
    """A normalization.

    Attributes:
        label: Its name in tables.
        colour: Its colour in figures.
        replace: Replaces a network's BatchNorm layers; takes the method's options, returns the network.
        statistics: ``"sample"``: of each image, or none. ``"groups"``: of groups of images within one forward pass, of
            the size given by ``samples``. ``"batch"``: of the whole batch, so that smaller statistics batches take a
            forward pass each.
        samples: The option of ``replace`` for the number of images in a group.
        timed: From the number of training steps to the options that depend on it.
        capturable: Whether a CUDA graph of one step can be replayed: no layer counts in Python, or reads a value.
        warmup: Whether its paper asks for a rate that rises at the start; it then does with every schedule.
    """

    label: str
    colour: str
    replace: Callable[..., nn.Module]
    statistics: Literal["sample", "groups", "batch"] = "sample"
    samples: str = "samples"
    timed: Callable[[int], dict[str, Any]] = lambda steps: {}
    capturable: bool = True
    warmup: bool = False


def _batchnorm(network: nn.Module, samples: int | None = None) -> nn.Module:
    """Keep the network's layers, or use Ghost BatchNorm for smaller statistics batches of stock BatchNorm layers."""
    stock = any(map(is_stock_batchnorm, network.modules()))
    return to_ghost(network, samples) if stock and samples is not None else network


def _renorm(network: nn.Module, schedule: Any = None, **options: Any) -> nn.Module:
    # Configuration files have mappings and lists.
    if isinstance(schedule, Mapping):
        schedule = RenormSchedule(**schedule)
    elif isinstance(schedule, list):
        schedule = tuple(schedule)
    return to_batch_renorm(network, schedule=schedule, **options)


def _kalman(network: nn.Module, constant_priors: bool = False, **options: Any) -> nn.Module:
    """`kalmannorm.convert`; with ``constant_priors`` no gradient flows through priors, for an ablation."""
    network = kalmannorm.convert(network, **options)
    if constant_priors:
        for _, layer in kalman_layers(network):
            layer.register_forward_pre_hook(_detach_belief)
    return network


def _detach_belief(layer: nn.Module, args: tuple[Tensor]) -> None:
    if (step := step_of(args[0])) is not None:
        put(args[0], detached(step))


def _group_kalman(network: nn.Module, groups: int = 32, **options: Any) -> nn.Module:
    return kalmannorm.convert(to_groupnorm(network, groups), layers=("group",), **options)


def _renorm_timed(steps: int) -> dict[str, Any]:
    # The paper corrects towards the averages after 50 times their time constant. Here it is after three times, in at
    # most a tenth of the steps: trainings of fewer than 3,000 steps get faster averages than the paper's, but none
    # faster than BatchNorm's.
    momentum = min(0.1, max(0.01, 30 / steps))
    schedule = RenormSchedule().scaled(min(1.0, steps / _RENORM_STEPS))
    return {"schedule": schedule.delayed(max(0.0, 3 / momentum - schedule.start)), "momentum": momentum}


def _moving_average_timed(steps: int) -> dict[str, Any]:
    # The released code's 100 and 1000 steps are a small part of its training; scale them down for a short one.
    return {"warmup": min(100, steps // 20), "renorm_start": min(1000, steps // 10)}


def _cross_iteration_timed(steps: int) -> dict[str, Any]:
    # 8 epochs of 12 in the authors' released configuration, cbn_buffer3_burnin8_1x.
    return {"burn_in": 2 * steps // 3}


_PAPER, _RELEASED = (partial(kalmannorm.convert, **kalmannorm.preset(name)) for name in ("paper", "released"))
_KALMAN: dict[str, Any] = {"statistics": "groups", "samples": "stats_batch_size"}

# "evonorm" and "frn" trace the network (see `activated`), and "ghost" needs batches of an even size.
METHODS = {
    "bn": Method("BatchNorm", "#c44e52", _batchnorm, "groups"),
    "brn": Method("Batch Renorm", "#8172b3", _renorm, "groups", timed=_renorm_timed),
    "gn": Method("GroupNorm", "#8c8c8c", to_groupnorm),
    "ln": Method("LayerNorm", "#ccb974", to_layernorm),
    "in": Method("InstanceNorm", "#64b5cd", to_instancenorm),
    "wn": Method("WeightNorm", "#937860", to_weight_norm, capturable=False),
    "frozen": Method("BatchNorm, frozen", "#e3a8aa", to_frozen),
    "ghost": Method("Ghost BatchNorm", "#da8bc3", to_ghost, "groups"),
    "sync": Method("SyncBatchNorm", "#7a1f2b", to_sync, "batch"),
    "mabn": Method("MABN", "#3f7d8c", to_moving_average, "groups", timed=_moving_average_timed),
    "cbn": Method("CBN", "#a05d2c", to_cross_iteration, "batch", timed=_cross_iteration_timed, capturable=False),
    "evonorm": Method("EvoNorm-S0", "#6b8e23", to_evonorm),
    "frn": Method("FRN", "#b5b34a", to_frn, warmup=True),
    "kn": Method("KalmanNorm (default)", "#4c72b0", _kalman, **_KALMAN),
    "kn-paper": Method("KalmanNorm (paper)", "#dd8452", _PAPER, **_KALMAN),
    "kn-released": Method("KalmanNorm (released)", "#55a868", _RELEASED, **_KALMAN),
    "gkn": Method("GroupKalmanNorm", "#1f3b70", _group_kalman),
}


# Methods with an activation of their own, or without a normalization layer.
_WITHOUT_PROXY = ("wn", "evonorm", "frn")


def normalize(
    network: nn.Module, method: str, *, statistics_batch: int | None = None, steps: int | None = None,
    weight_standardization: bool = False, inputs: Any = None, proxy: bool | Literal["fixed"] = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """Replace a network's BatchNorm layers by a normalization, in place.

    Args:
        network: Built with BatchNorm.
        method: A key of `METHODS`.
        statistics_batch: Images that are normalized together in training, for methods that support
            groups within one forward pass; the whole batch if None. Must divide every batch.
        steps: Length of the training, for methods with schedules in steps.
        weight_standardization: Standardize the filters below the layers too
            (`kalmannorm.standardize_weights`).
        inputs: Inputs to call the network with to find these filters, if ``torch.fx`` cannot trace it.
        proxy: Normalize the activations after the layers too, by Proxy Normalization; ``"fixed"``
            without its own two parameters a channel. See `kalmannorm.lab.baselines.proxy.to_proxy`.
        options: The method's own; they override those that follow from the other arguments.

    Returns:
        The same network, or the one that takes its place.

    Example:
        >>> normalize(nn.Sequential(nn.BatchNorm2d(8)), "kn", statistics_batch=2, gain=0.1)[0].stats_batch_size
        2
    """
    if method not in METHODS:
        raise ValueError(f"normalization must be one of {', '.join(METHODS)}; got {method!r}")
    if statistics_batch is not None and statistics_batch < 1:
        raise ValueError(f"statistics_batch must be at least 1; got {statistics_batch}")
    if weight_standardization and method == "wn":
        raise ValueError("normalization 'wn' normalizes weights by itself; got weight_standardization=True")
    if proxy and method in _WITHOUT_PROXY:
        raise ValueError(f"proxy goes with a normalization layer before an activation; got it with {method!r}")
    if proxy not in (False, True, "fixed"):
        raise ValueError(f"proxy must be False, True or 'fixed'; got {proxy!r}")
    if weight_standardization:
        network = kalmannorm.standardize_weights(network, inputs=inputs)
    if proxy:
        network = to_proxy(network, learned=proxy is True)
    known = METHODS[method]
    chosen = known.timed(steps) if steps is not None else {}
    if known.statistics == "groups" and statistics_batch is not None:
        chosen[known.samples] = statistics_batch
    try:
        return known.replace(network, **{**chosen, **options})
    except TypeError as error:
        raise ValueError(f"normalization {method!r} does not take these options: {error}") from error
