"""What each normalization layer sees: its prior, its observation, its posterior."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kalmannorm.freezing import is_frozen
from kalmannorm.functional import observe, synchronize
from kalmannorm.gaussian import Gaussian
from kalmannorm.inference import collecting
from kalmannorm.modules import KalmanNorm
from kalmannorm.traversal import device_of, inputs_seen, random_state_kept


class Seen(NamedTuple):
    """One call of a normalization layer; moments are ``(S, C)``, a row a statistic group."""

    layer: str
    prior: Gaussian | None
    """What it was told, process noise included; None where it has no prior, or the gain leaves it no say."""
    observation: Gaussian
    """What the group itself shows."""
    posterior: Gaussian
    """What normalized it."""
    samples: int
    """Samples a group."""


@contextmanager
def watched(network: nn.Module) -> Iterator[list[Seen]]:
    """Run a network in ``eval()``, each batch normalizing itself, and keep what its layers see.

    `KalmanNorm` layers fuse each batch with their prior as in training, by groups of
    ``stats_batch_size``; BatchNorm layers take a batch as one group. Layers that are frozen are not
    watched. No buffer changes, training flags are restored, and training's random numbers go on as
    if nothing had been drawn. Layers with a ``process_group`` share statistics here too: all
    processes must take part.

    Yields:
        A list that grows with every call of a layer.
    """
    seen: list[Seen] = []
    watchers = [_Watcher(name, layer, seen) for name, layer in network.named_modules() if is_watched(layer)]
    kalman = [(each.layer, each.observe) for each in watchers if isinstance(each.layer, KalmanNorm)]
    with random_state_kept(network), collecting(network, watchers), inputs_seen(kalman):
        yield seen


def is_watched(layer: nn.Module) -> bool:
    """Whether a layer normalizes by statistics of the batch."""
    return isinstance(layer, _BatchNorm) and not is_frozen(layer)


class _Watcher:
    """Keeps the calls of one layer."""

    def __init__(self, name: str, layer: nn.Module, seen: list[Seen]) -> None:
        self.name, self.layer, self.seen = name, layer, seen

    def observe(self, x: Tensor) -> None:
        """Before a call: prior and observation; the posterior is the observation until the layer says else."""
        layer = self.layer
        shared = layer.process_group if isinstance(layer, KalmanNorm) else None
        if not x.numel() and shared is None:
            return  # it normalizes nothing; others' samples are observed by an empty part too
        if not isinstance(layer, KalmanNorm):
            self._add(None, observe(x), len(x))
            return
        groups = layer.statistic_groups(len(x))
        # The layer finds again what this evaluates: the rules' beliefs, and the draws, are kept.
        prior = layer.prior(x, groups)
        if shared is None:
            self._add(prior, observe(x, groups), len(x) // groups)
        else:
            together = synchronize(x, shared)
            self._add(prior, together.observation, int(together.samples))

    def _add(self, prior: Gaussian | None, observation: Gaussian, samples: int) -> None:
        self.seen.append(Seen(self.name, prior, observation, observation, samples))

    def add(self, posterior: Gaussian, samples: int | Tensor) -> None:
        """As `KalmanNorm.collect`."""
        self.seen[-1] = self.seen[-1]._replace(posterior=posterior)


def calls_of(network: nn.Module, batches: Iterable[Any]) -> dict[str, list[Seen]]:
    """Everything each layer saw, in the order of the layers' first calls; of inputs, or tuples that begin with them."""
    with watched(network) as seen:
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch[0]
            network(images.to(device_of(network)))
    layers: dict[str, list[Seen]] = {}
    for each in seen:
        layers.setdefault(each.layer, []).append(each)
    if not layers:
        raise ValueError(f"{type(network).__name__} saw no batch: expected at least one")
    return layers


def statistics_batches(loader: Iterable[Any], size: int) -> Iterator[Tensor]:
    """The images of a loader of ``(images, labels)`` in whole statistics batches."""
    return (part for images, _ in loader for part in images.split(size) if len(part) == size)
