"""Try one network: convert, describe, train, score in `eval()`, convert back to BatchNorm, save and load."""

import copy
import io
import math
import re
import warnings
from collections import Counter

import torch
from torch import nn

import kalmannorm as kn
from benchmarks.coverage_networks import outputs_of
from kalmannorm.lab.baselines.replacing import replace_batchnorm

STEPS, LAST, RATE, RECALIBRATION = 20, 5, 1e-3, 64


def examples(network, samples, seed):
    """Samples of two classes, -1 and 1, which differ by the frequency of a wave along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (samples,), generator=generator)
    period = torch.where(classes == 0, 8.0, 3.0).view(-1, *[1] * len(network.shape))
    phase = torch.rand(period.shape, generator=generator)
    wave = torch.sin(2 * math.pi * (torch.arange(network.shape[-1]) / period + phase))
    return wave + 0.5 * torch.randn(samples, *network.shape, generator=generator), 2.0 * classes - 1


def loss_of(output, classes):
    """The mean squared difference of the output's numbers from their sample's class, averaged over its tensors."""
    terms = [
        (t.float() - classes.repeat_interleave(len(t) // len(classes)).view(-1, *[1] * (t.ndim - 1))).square().mean()
        for t in outputs_of(output)
        if t.is_floating_point() and t.ndim and len(t) and len(t) % len(classes) == 0
    ]
    return torch.stack(terms).mean()


def converted(network):
    """The network with Kalman layers, and with the initial weights of the stock network."""
    torch.manual_seed(0)
    return kn.convert(network.build(), input_stats=(0.0, 1.0))


def trained(model, network, samples):
    """Train with Adam, and return the losses."""
    steps, frozen = getattr(network, "steps", STEPS), getattr(network, "frozen", 0)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if steps > STEPS else None
    losses = []
    for step in range(steps):
        if frozen and step == steps - frozen:
            kn.freeze(model)
        x, classes = examples(network, samples, step)
        torch.manual_seed(step)  # dropout
        loss = loss_of(model.train()(*network.call(x)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if falling:
            falling.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def in_eval(model, network):
    """The output's tensors and the loss, for new samples."""
    x, classes = examples(network, 8, 10**6)
    torch.manual_seed(0)
    output = model.eval()(*network.call(x))
    return [t for t in outputs_of(output) if t.is_floating_point()], loss_of(output, classes).item()


@torch.no_grad()
def alone(model, network):
    """The loss of `in_eval`'s samples, each normalized by its own statistics; NaN if a layer does not support that."""
    x, classes = examples(network, 8, 10**6)
    torch.manual_seed(0)
    try:
        with kn.online_statistics(model.eval()):
            losses = [loss_of(model(*network.call(x[[i]])), classes[[i]]).item() for i in range(len(x))]
    except ValueError:  # BatchNorm, at one value a channel
        return math.nan
    return sum(losses) / len(losses)


def recalibrated(model, network, samples):
    """The loss in `eval()` after `kn.recalibrate` by other batches like those of training; NaN without such layers."""
    x, _ = examples(network, RECALIBRATION * samples, 10**5)
    try:
        kn.recalibrate(model, x.split(samples), forward=lambda m, part: m(*network.call(part)), progress=False)
    except ValueError:
        return math.nan
    return in_eval(model, network)[1]


def difference(one, other):
    """The largest relative difference; infinite if a number is not finite."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30))
            worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def reloaded(model):
    """The model's state dict after saving and loading."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def side(kind, model, network, samples):
    """The columns of one side: its losses, or the error."""
    try:
        losses = trained(model, network, samples)
        return {
            f"{kind}_first": losses[0], f"{kind}_last": sum(losses[-LAST:]) / LAST, f"{kind}_largest": max(losses),
            f"{kind}_eval": in_eval(model, network)[1], f"{kind}_alone": alone(model, network),
            f"{kind}_recalibrated": recalibrated(model, network, samples),
        }  # fmt: skip
    except Exception as error:  # a package's code may raise anything
        return {f"{kind}_error": described(error)}


def described(error):
    """An error's first line, for a table cell."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}".replace("|", "/")


def tried(network, samples):
    """The columns of a network's row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        row = side("batchnorm", network.build(), network, samples)
        if hasattr(network, "steps") and not network.frozen:
            torch.manual_seed(0)
            model = replace_batchnorm(network.build(), lambda norm: nn.GroupNorm(8, norm.num_features))
            trained(model, network, samples)
            row["groupnorm_eval"] = in_eval(model, network)[1]
        try:
            model = converted(network)
            row |= _described(kn.describe(model, *network.call(examples(network, samples, 0)[0])))
            row |= side("kalman", model, network, samples)
            row |= _saved(model, network)
        except Exception as error:
            row["kalman_error"] = described(error)
    return row


def _described(description):
    reasons = Counter(re.sub(r"[\d., ]*\d", " N", each.reason) for each in description.rows if each.reason)
    return {
        "layers": len(description.rows),
        "with_prior": description.with_prior,
        "reasons": "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common()),
    }


def _saved(model, network):
    """Differences in `eval()` after loading a checkpoint, after `to_batchnorm`, and after loading that into a stock
    network.
    """
    before, _ = in_eval(model, network)
    again = converted(network)
    again.load_state_dict(reloaded(model))
    torch.manual_seed(0)
    stock = network.build()
    back = kn.to_batchnorm(copy.deepcopy(model))
    row = {"reloaded": difference(before, in_eval(again, network)[0])}
    row["deployed"] = difference(before, in_eval(back, network)[0])
    stock.load_state_dict(reloaded(back))
    row["in_stock"] = difference(before, in_eval(stock, network)[0])
    return row
