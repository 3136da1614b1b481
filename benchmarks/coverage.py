"""Which layers of which models get a prior: torchvision's, each family of timm's, and networks of other packages.

``python -m benchmarks.coverage --output docs/results`` writes the table and its page; rows of models that are not
selected stay. Each model is built without weights, converted, described, trained for one step on a batch of noise, and
deployed. Models too large for that are only described, on the meta device.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.progress import track
from torch import Tensor, nn

import kalmannorm as kn
from benchmarks.coverage_networks import NETWORKS, Network, is_installed, outputs_of
from kalmannorm.lab.formatting import filled
from kalmannorm.stand_ins import stand_in

# The smallest model of each of timm's families with BatchNorm (a family is a file of timm.models), and more models of
# families with several kinds of network.
TIMM = """
    halonet_h1 lambda_resnet26t botnet26t_256 eca_halonext26ts sehalonet33ts repvgg_a0 mobileone_s0 gernet_s
    resnet33ts eca_resnet33ts resnet50_clip convmixer_768_32 cpubone_nano cs3darknet_focus_s cspresnet50 darknet53
    sedarknet21 cspnext_tiny densenet121 densenetblur121d dla46x_c dpn48b efficientformer_l1 efficientformerv2_s0
    efficientnet_b0 mobilenetv2_035 mixnet_s tinynet_e spnasnet_100 efficientnetv2_rw_t efficientvim_m1
    efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small
    iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
    lowformer_b0 coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256 coatnet_bn_0_rw_224
    mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium mobilevit_xxs
    mobilevitv2_050 nasnetalarge nextvit_small pnasnet5large regnetx_002 repghostnet_050 repvit_m1 res2next50
    resnest14d resnet10t resnet26d seresnet33ts ecaresnet26t resnetaa34d resnetblur18 resnetv2_18 rexnet_100
    selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m vgg11_bn
    visformer_tiny vit_small_resnet50d_s16_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41
    xcit_nano_12_p16_224
""".split()  # noqa: SIM905 - a list of one name a line would fill two screens

# Models with more parameters are described on the meta device.
_LARGEST = 70_000_000


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to examine."""

    library: str
    name: str
    task: str
    network: Network | None = None
    """How to build it; None for torchvision and timm, which build models by name."""

    def build(self) -> nn.Module:
        """The model, without weights."""
        if self.network is not None:
            return self.network.build()
        if self.library == "timm":
            import timm  # noqa: PLC0415 - slow

            model: nn.Module = timm.create_model(self.name)
            return model
        from torchvision.models import get_model  # noqa: PLC0415 - slow

        options: dict[str, Any] = {"weights": None}
        if self.task in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if self.task == "detection" and not self.name.startswith("ssd"):
            options.update(min_size=96, max_size=96)
        if self.name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        built: nn.Module = get_model(self.name, **options)
        return built

    def inputs(self, model: nn.Module, size: int, samples: int) -> tuple[Any, ...]:
        """The arguments to call it with."""
        if self.network is not None:
            return self.network.call(torch.randn(samples, *self.network.shape))
        if self.task == "video":
            return (torch.randn(samples, 3, max(size // 4, 14), size, size),)
        if self.task == "optical flow":
            return torch.randn(samples, 3, 2 * size, 2 * size), torch.randn(samples, 3, 2 * size, 2 * size), 2
        if self.task == "detection":
            return [torch.rand(3, 96, 96) for _ in range(samples)], [_target(self.name) for _ in range(samples)]
        return (torch.randn(samples, _channels(model), size, size),)

    def sizes(self, model: nn.Module) -> list[int]:
        """Side lengths to try, the smallest first."""
        if self.network is not None:
            return [self.network.shape[-1]]
        if self.task == "detection":
            return [96]
        own = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
        return sorted({64, 96, 128, own, 299})

    def input_stats(self, model: nn.Module) -> tuple[Any, Any]:
        """Zeros and ones, for each channel; scalars for other packages, whose inputs have different axes."""
        if self.network is not None:
            return 0.0, 1.0
        return [0.0] * _channels(model), [1.0] * _channels(model)


def _channels(model: nn.Module) -> int:
    return int(getattr(model, "default_cfg", {}).get("input_size", (3,))[0])


def _target(name: str) -> dict[str, Tensor]:
    """One object in the middle of the image."""
    target = {"boxes": torch.tensor([[20.0, 20.0, 70.0, 80.0]]), "labels": torch.tensor([1])}
    if name.startswith("mask"):
        target["masks"] = torch.zeros(1, 96, 96, dtype=torch.uint8)
        target["masks"][0, 20:80, 20:70] = 1
    if name.startswith("keypoint"):
        target["keypoints"] = torch.tensor([40.0, 40.0, 1.0]).expand(1, 17, 3).clone()
    return target


@dataclasses.dataclass
class Coverage:
    """The result for one model."""

    library: str
    model: str
    task: str
    size: int
    device: str
    layers: int
    """Layers converted."""
    with_prior: int
    """Converted layers with a prior that comes entirely from rules."""
    from_input: int
    """Converted layers whose prior comes from ``input_stats`` alone."""
    not_called: int
    """Converted layers that the network never called."""
    left_alone: int
    """Normalization layers of a supported kind that were not converted."""
    reasons: str
    """Reasons for layers without a prior, with their numbers of layers."""
    step: str
    """``ok`` after one training step with finite gradients at a batch of 2; ``meta`` if none was tried."""
    deployed: float
    """Largest difference of the ``eval()`` outputs before and after ``to_batchnorm``, over the largest output."""
    seconds: float
    packages: str
    """Versions of the packages."""


def subjects() -> Iterator[Subject]:
    """All torchvision models, those of `TIMM`, and the networks of installed packages; `cover` skips models without
    BatchNorm.
    """
    import torchvision.models as zoo  # noqa: PLC0415 - slow

    tasks = {zoo.segmentation: "segmentation", zoo.detection: "detection", zoo.video: "video",
             zoo.optical_flow: "optical flow", zoo.quantization: "", zoo: "classification"}  # fmt: skip
    seen: set[str] = set()
    for module, task in tasks.items():
        for name in zoo.list_models(module=module):
            if task and name not in seen:
                yield Subject("torchvision", name, task)
            seen.add(name)
    for name in TIMM:
        yield Subject("timm", name, "classification")
    for library, networks in NETWORKS.items():
        if is_installed(library):
            for name, network in networks.items():
                yield Subject(library, name, network.task, network)


def cover(subject: Subject) -> Coverage | None:
    """Convert, describe, train and deploy one model; None if it has no BatchNorm."""
    began = time.perf_counter()
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = subject.build()
        if not any(stand_in(layer)[0] == "batch" for layer in model.modules()):
            return None
        kn.convert(model, input_stats=subject.input_stats(model))
    left_alone = sum("leaves it as it is" in str(each.message) for each in raised)
    large = sum(p.numel() for p in model.parameters()) > _LARGEST
    if large:
        model = model.to("meta")
    size, inputs, description = _describe(subject, model)
    rows = description.rows
    reasons = Counter(re.sub(r"[\d., ]*\d", " N", row.reason) for row in rows if row.reason)
    called = [row for row in rows if row.reason != "the layer was not called"]
    result = Coverage(
        subject.library, subject.name, subject.task, size, "meta" if large else "cpu", len(rows),
        description.with_prior, sum(row.prior_from == ("input",) for row in rows), len(rows) - len(called),
        left_alone, "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common()),
        "meta", 0.0, 0.0, _packages(subject.library),
    )  # fmt: skip
    if not large:
        result.step = _train(model, inputs)
        result.deployed = _deploy(subject, model, inputs)
    result.seconds = round(time.perf_counter() - began, 1)
    return result


def _packages(library: str) -> str:
    """The versions of torch and of a model's package."""
    names = [name for name in ("torch", library) if is_installed(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _describe(subject: Subject, model: nn.Module) -> tuple[int, tuple[Any, ...], kn.Description]:
    """Describe the model at the smallest size that it supports: the size, the inputs and the description."""
    meta = next(model.parameters()).is_meta
    failed: Exception | None = None
    for size in subject.sizes(model):
        inputs = subject.inputs(model, size, 2)
        if meta:
            inputs = tuple(each.to("meta") if isinstance(each, Tensor) else each for each in inputs)
        try:
            return size, inputs, kn.describe(model, *inputs)
        except (RuntimeError, ValueError, AssertionError) as error:  # the size is too small
            failed = error
    assert failed is not None
    raise failed


def _train(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Train one step, and return ``ok`` or the error."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    terms = [t.float().square().mean() for t in outputs_of(model(*inputs)) if t.is_floating_point() and t.requires_grad]
    torch.stack(terms).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} is not finite"
    for name, layer in model.named_modules():
        counter, gain = getattr(layer, "num_batches_tracked", None), getattr(layer, "gain", None)
        if isinstance(counter, Tensor) and counter > 0 and isinstance(gain, Tensor) and gain.grad is None:
            return f"{name}.gain has no gradient"
    return "ok"


def _deploy(subject: Subject, model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest relative difference that ``to_batchnorm`` makes in ``eval()``."""
    model.eval()
    call: Callable[[], Any] = lambda: model(*(inputs[:1] if subject.task == "detection" else inputs))  # noqa: E731
    with torch.no_grad():
        torch.manual_seed(0)
        before = outputs_of(call())
        kn.to_batchnorm(model)
        torch.manual_seed(0)
        after = outputs_of(call())
    differences = [0.0]
    for one, other in zip(before, after, strict=True):
        if one.numel():
            scale = one.double().abs().max().clamp_min(1e-30)
            differences.append(float((one.double() - other.double()).abs().max() / scale))
    return max(differences)


def main(given: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser("python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(), help="folder for coverage.csv and coverage.md")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression for library/name")
    options = parser.parse_args(given)
    chosen = [each for each in subjects() if re.search(options.only, f"{each.library}/{each.name}")]
    if not chosen:
        parser.error(f"no model matches {options.only!r}")
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "coverage.csv"
    # In the order of the existing table, new rows last.
    rows = {(each.library, each.model): each for each in read(table)}
    for subject in track(chosen, "models"):
        key = subject.library, subject.name
        if (found := cover(subject)) is not None:
            rows[key] = found
        else:
            rows.pop(key, None)
        pd.DataFrame(rows.values()).to_csv(table, index=False, lineterminator="\n")
        gc.collect()
    (folder / "coverage.md").write_text(page([*rows.values()]))
    print(f"{folder / 'coverage.md'}: {_total([*rows.values()])}")


def read(path: Path) -> list[Coverage]:
    """The rows of a table; an empty list if there is no such file."""
    if not path.exists():
        return []
    table = pd.read_csv(path, keep_default_na=False, float_precision="round_trip")
    return [Coverage(**row) for row in table.to_dict("records")]


def _total(found: Sequence[Coverage]) -> str:
    return f"{_share(found, ' layers')} of {len(found)} models have a prior by rule"


def _share(found: Sequence[Coverage], unit: str = "") -> str:
    """The number and share of layers with a prior."""
    priors, layers = sum(each.with_prior for each in found), sum(each.layers for each in found)
    return f"{priors:,} of {layers:,}{unit} ({100 * priors / max(layers, 1):.2f} %)"


def page(found: Sequence[Coverage]) -> str:
    """The results, one for each model, as Markdown."""
    libraries: dict[str, list[Coverage]] = defaultdict(list)
    models: dict[str, list[str]] = defaultdict(list)
    layers: Counter[str] = Counter()
    for each in found:
        libraries[each.library].append(each)
        for reason, count in re.findall(r"([^;]+?) \((\d+)\)(?:; |$)", each.reasons):
            models[reason].append(each.model)
            layers[reason] += int(count)
    return filled(
        Path(__file__).with_suffix(".md"),
        found=found,
        packages=sorted({package for each in found for package in each.packages.split(", ")}),
        largest=_LARGEST // 10**6,
        total=_total(found),
        from_input=f"{sum(each.from_input for each in found):,}",
        steps=Counter(each.step if each.step in ("ok", "meta") else "failed" for each in found),
        deployed=f"{max(each.deployed for each in found):.1e}",
        libraries=[(name, len(own), _share(own)) for name, own in libraries.items()],
        reasons=[(reason, count, models[reason]) for reason, count in layers.most_common()],
    )


if __name__ == "__main__":
    main()
