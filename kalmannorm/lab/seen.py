"""Record each normalization layer's prior, observation and posterior."""

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
    """The prior with process noise; None if the layer has none, or ignores it at a gain of 1."""
    observation: Gaussian
    """The group's own moments."""
    posterior: Gaussian
    """The moments that normalized the group."""
    samples: int
    """Samples in each group."""


@contextmanager
def watched(network: nn.Module) -> Iterator[list[Seen]]:
    """Run a network in ``eval()`` by the statistics of each batch, and record its layers' moments.

    `KalmanNorm` layers fuse each batch with their prior as in training, in groups of
    ``stats_batch_size``; BatchNorm layers take a batch as one group. Frozen layers are not recorded.
    Buffers do not change; training flags and random states are restored. Layers with a
    ``process_group`` share statistics here too, so all processes must take part.

    Yields:
        A list that gets an entry for every call of a layer.
    """
    seen: list[Seen] = []
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)]
    watchers = [_Watcher(name, layer, seen) for name, layer in layers if not is_frozen(layer)]
    kalman = [(each.layer, each.observe) for each in watchers if isinstance(each.layer, KalmanNorm)]
    with random_state_kept(network), collecting(network, watchers), inputs_seen(kalman):
        yield seen


class _Watcher:
    """Records the calls of one layer."""

    def __init__(self, name: str, layer: nn.Module, seen: list[Seen]) -> None:
        self.name, self.layer, self.seen = name, layer, seen

    def observe(self, x: Tensor) -> None:
        """Record prior and observation before a call; `add` replaces the posterior afterwards."""
        layer = self.layer if isinstance(self.layer, KalmanNorm) else None
        shared = layer.process_group if layer else None
        if not x.numel() and shared is None:
            return  # nothing to normalize; with a process group, an empty part still observes the others' samples
        groups = layer.statistic_groups(len(x)) if layer else 1
        # The beliefs and draws evaluated here are cached, so the layer gets the same ones.
        prior = layer.prior(x, groups) if layer else None
        if shared is None:
            observation, samples = observe(x, groups), len(x) // groups
        else:
            observation, number, _ = synchronize(x, shared)
            samples = int(number)
        self.seen.append(Seen(self.name, prior, observation, observation, samples))

    def add(self, posterior: Gaussian, samples: int | Tensor) -> None:
        """As `KalmanNorm.collect`."""
        self.seen[-1] = self.seen[-1]._replace(posterior=posterior)


def calls_of(network: nn.Module, batches: Iterable[Any]) -> dict[str, list[Seen]]:
    """All calls of each layer, in the order of first calls; batches are inputs, or tuples that begin with them."""
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
    """The images of a loader of ``(images, labels)`` in statistics batches, incomplete ones left out."""
    return (part for images, _ in loader for part in images.split(size) if len(part) == size)
