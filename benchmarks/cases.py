"""The cases of each device, the most informative first."""

import itertools
from dataclasses import dataclass, replace

BN, GN, SYNC, GHOST = "batch_norm", "group_norm", "sync_batch_norm", "ghost_batch_norm"
KN, ACT, MC = "kalman_norm", "kalman_norm_act", "kalman_norm_monte_carlo"
BN_LOOP, KN_LOOP, PLAIN, COPY = "batch_norm_loop", "kalman_norm_loop", "to_batchnorm", "copy"
ONE, WS = "one_by_one", "kalman_norm_standardized"
KN_CAPTURED, BN_CAPTURED = "kalman_norm_captured", "batch_norm_captured"
FROZEN = "frozen_batch_norm"

PAIR = (BN, KN)
GRAPHS = (BN, KN, KN_CAPTURED, BN_CAPTURED)
SIDES = (BN, KN, FROZEN, WS, MC, GN)
LAYERS = (BN, KN, ACT, MC, GN)
GROUPS = (BN, GHOST, KN, BN_LOOP, KN_LOOP)
DEPLOYED = (BN, PLAIN, KN, ONE, GN)

BATCHES = (1, 2, 4, 8, 32)
DEPTHS, WIDTHS, CHAIN_BATCHES = (2, 4, 8, 16, 32, 64), (16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 32, 128)


@dataclass(frozen=True)
class Case:
    """A workload, and the methods that are compared on it."""

    kind: str
    """``step``, ``layer``, ``groups``, ``chain``, ``inference`` or ``copy``."""
    network: str
    batch: int
    size: int
    """Side of the square or cubic input; for a copy, MiB."""
    methods: tuple[str, ...]
    mode: str = "eager"
    """``eager``, ``compiled``, ``reduce_overhead`` (torch.compile's) or ``graph`` (the eager step, captured)."""
    dtype: str = "float32"
    """``bfloat16`` by autocast."""
    memory_format: str = "contiguous"
    channels: int = 3
    """Channels of the input; a chain's width."""
    depth: int = 0
    """Layers of a chain."""
    stats_batch: int = 0
    """Samples that are normalized together; 0 for the whole batch."""
    steps: int = 40
    warm_up: int = 5
    """Steps of each side before the first round."""
    repeats: int = 1
    """Steps in each reading of the clock."""

    @property
    def name(self):
        """The name in ``--only``, the goals and the CSV."""
        work = f"{self.network}/b{self.batch}/{self.size}"
        if self.kind == "chain":
            work = f"d{self.depth}-w{self.channels}-b{self.batch}"
        elif self.network == "layer":
            work = f"n{self.batch}-c{self.channels}-{self.size}x{self.size}"
        elif self.kind == "copy":
            work = f"{self.size}MiB"
        groups = f"({self.stats_batch},{self.batch})/" if self.stats_batch else ""
        return f"{self.kind}/{groups}{work}/{self.mode}/{self.dtype}"


def cases(device, tiny=False, everything=False):
    """The cases of a device, without duplicates."""
    if tiny:
        return _tiny()
    chosen = (_cpu() if device == "cpu" else _cuda()) + (_product() if everything else [])
    unique = {}
    for case in chosen:
        unique.setdefault(case.name, case)
    return [case if device == "cpu" else _on_gpu(case) for case in unique.values()]


def _step(network, batch, size, mode="eager", dtype="float32", methods=PAIR, **more):
    return Case("step", network, batch, size, methods, mode, dtype, **more)


def _layer(batch, channels, size, mode="eager", dtype="float32", methods=LAYERS, **more):
    more = {"steps": 200, **more}
    return Case("layer", "layer", batch, size, methods, mode, dtype, channels=channels, **more)


def _groups(network, batch, size, dtype="float32", **more):
    return Case("groups", network, batch, size, GROUPS, "eager", dtype, stats_batch=2, steps=20, warm_up=2,
                **more)  # fmt: skip


def _chain(depth, width, batch, mode="eager", methods=PAIR, **more):
    return Case("chain", "chain", batch, 16, methods, mode, channels=width, depth=depth, **more)


def _chains(mode="eager"):
    """Vary depth, width and batch one at a time, around 8 layers of 64 channels at a batch of 2."""
    yield _chain(8, 64, 2, mode, (BN, KN, MC))
    for depth in DEPTHS:
        yield _chain(depth, 64, 2, mode)
    for width in WIDTHS:
        yield _chain(8, width, 2, mode)
    for batch in CHAIN_BATCHES:
        yield _chain(8, 64, batch, mode)


def _cpu():
    """About 20 minutes on 2 cores."""
    found = [
        _step("resnet50", 2, 128, methods=SIDES),
        Case("copy", "copy", 1, 128, (COPY,)),
        _groups("cifar_resnet32", 128, 32),
        _step("resnet50", 2, 128, "compiled"),
        *(_step("resnet18", batch, 64, methods=SIDES if batch == 2 else PAIR) for batch in (2, 1, 4, 8, 32)),
        _step("resnet18", 2, 64, dtype="bfloat16", steps=20),
        _step("resnet50", 2, 64),
        _step("resnet18", 2, 96),
        _step("maskrcnn", 1, 320, methods=(BN, KN, FROZEN), steps=12, warm_up=2),
        _step("inception_v2", 2, 128),
        _step("mobilenet_v3_large", 2, 160),
        _step("efficientnet_b0", 2, 128),
        _step("unet3d", 1, 32),
        _step("monai_unet3d", 1, 32),
    ]
    for shape in ((2, 64, 56), (2, 256, 28), (2, 512, 7), (1, 64, 112), (8, 64, 28), (32, 64, 32)):
        found.append(_layer(*shape))
    found += [_layer(2, 64, 56, "compiled", methods=(BN, KN, ACT)), _groups("layer", 128, 16, channels=64)]
    for network, batch, size in (("resnet18", 2, 64), ("resnet50", 2, 128)):
        found.append(Case("inference", network, batch, size, DEPLOYED))
    return [*found, *_chains(), _step("resnet18", 2, 64, "compiled")]


def _cuda():
    """About 25 minutes, most of them in torch.compile."""
    half = "bfloat16"
    found = [
        _step("resnet50", 2, 224, dtype=half, methods=(*GRAPHS, MC)),
        _step("resnet50", 32, 224, dtype=half, methods=(*GRAPHS, WS, MC, GN)),
        _step("resnet50_wide", 2, 800, dtype=half, methods=GRAPHS),
        _step("maskrcnn", 2, 800, dtype=half, methods=(*GRAPHS, FROZEN)),
        *(_step("deeplabv3", batch, 768, dtype=half, methods=GRAPHS) for batch in (2, 4)),
        _step("unet3d", 1, 128, dtype=half, methods=GRAPHS),
        _step("resnet50", 2, 224, "graph", half),
        Case("copy", "copy", 1, 2048, (COPY,)),
        *(_layer(*shape, dtype=half) for shape in ((128, 64, 112), (64, 256, 56))),
        _groups("cifar_resnet32", 128, 32),
        _groups("layer", 128, 16, channels=64),
        _step("resnet50", 32, 224, "compiled", half),
        _step("resnet50", 2, 224, "compiled", half),
        _layer(128, 64, 112, "compiled", half, (BN, KN, ACT)),
        _step("resnet50", 32, 224, methods=PAIR),
        _step("resnet50", 2, 224, methods=PAIR),
        _step("resnet50", 32, 224, "graph", half),
        *(_step("resnet18", batch, 224, dtype=half) for batch in BATCHES),
        *(_step("inception_v2", batch, 224, dtype=half) for batch in (2, 32)),
        *(_step("unet3d", batch, 96, dtype=dtype) for batch in (1, 2) for dtype in ("float32", half)),
        _step("monai_unet3d", 1, 96),
    ]
    for shape in ((32, 64, 112), (32, 256, 56), (32, 512, 28), (32, 1024, 14), (32, 2048, 7), (8, 256, 56)):
        found.append(_layer(*shape, dtype=half, methods=(BN, KN, ACT, GN)))
    for shape in ((2, 256, 56), (2, 2048, 7)):
        found += [_layer(*shape, mode, half, (BN, KN, ACT)) for mode in ("eager", "graph")]
    found.append(_layer(128, 64, 112, methods=(BN, KN, ACT)))
    # NCCL comes last: if it hangs, no other case is lost.
    synchronized = [_layer(*shape, dtype=half, methods=(BN, KN, SYNC)) for shape in ((128, 256, 28), (4, 256, 56))]
    for network, batch, size in (("resnet50", 32, 224), ("resnet50", 2, 224)):
        found.append(Case("inference", network, batch, size, DEPLOYED, dtype=half))
    return [
        *found,
        *_chains("graph"),
        *_chains(),
        _step("resnet50", 2, 224, "reduce_overhead", half),
        _step("unet3d", 1, 96, "compiled"),
        _step("inception_v2", 32, 224, "compiled", half),
        *synchronized,
    ]


def _product():
    """For ``--all``: every network at every batch, eager and compiled, fp32 and bf16; takes hours."""
    networks = (("resnet18", 224), ("resnet50", 224), ("inception_v2", 224), ("unet3d", 64))
    modes = itertools.product(("eager", "compiled"), ("float32", "bfloat16"))
    return [
        _step(network, batch, size, mode, dtype)
        for (mode, dtype), (network, size), batch in itertools.product(modes, networks, BATCHES)
    ]


def _on_gpu(case):
    """The case with channels-last memory, if it is 2-d, and with several steps in each reading."""
    repeats = {"step": 3, "layer": 10, "groups": 1, "chain": 3, "inference": 5, "copy": 1}
    layout = "contiguous" if case.network.endswith("3d") or case.kind == "copy" else "channels_last"
    return replace(case, repeats=repeats[case.kind], memory_format=layout)


def _tiny():
    """Every kind and mode that a CPU supports, in seconds; their numbers mean nothing."""
    return [
        _step("cifar_resnet8", 2, 16, methods=SIDES),
        _step("cifar_resnet8", 2, 16, dtype="bfloat16", memory_format="channels_last"),
        _step("unet3d", 1, 16),
        _step("absent", 1, 8),
        Case("copy", "copy", 1, 1, (COPY,)),
        _layer(2, 8, 8, methods=(*LAYERS, SYNC), repeats=2),
        _layer(2, 8, 8, "compiled", methods=PAIR),
        _layer(2, 8, 8, "graph", methods=PAIR),
        _groups("cifar_resnet8", 8, 16),
        _groups("layer", 8, 4, channels=8),
        Case("inference", "cifar_resnet8", 2, 16, DEPLOYED),
        *(_chain(depth, 8, 2, methods=methods) for depth, methods in ((1, PAIR), (2, (BN, KN, MC)))),
    ]
