"""EvalNorm, and its trial: networks of the study, every share on both splits, the share chosen on validation images."""

import datasets
import pandas as pd
import pytest
import torch

from benchmarks import evalnorm
from benchmarks.evalnorm import evalnorm as blended
from kalmannorm.lab import fitting
from kalmannorm.lab.data.generated import generate_images
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.small import SmallConvNet


def trained(method):
    network = normalize(SmallConvNet(((8, 2), (16, 2))), method)
    for _ in range(5):
        network(torch.randn(8, 1, 16, 16))
    return network.eval()


@pytest.mark.parametrize("method", ["bn", "kn"])
def test_evalnorm_is_the_blend_of_an_images_and_the_running_statistics(method):
    network = trained(method).double()
    layers = [layer for layer in network.modules() if getattr(layer, "running_mean", None) is not None]
    seen = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]}))  # before evalnorm's own
        layer.register_forward_hook(lambda layer, args, output: seen.update({layer: (seen[layer], output.clone())}))
    with torch.no_grad(), blended(network, 0.3):
        network(images := torch.randn(4, 1, 16, 16).double())
    assert len(layers) == 2
    for layer in layers:
        x, y = seen[layer]
        m, v = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, correction=0)
        mean, var = layer.running_mean.view(-1, 1, 1), layer.running_var.view(-1, 1, 1)
        blend = 0.3 * v + 0.7 * var + 0.3 * 0.7 * (m - mean) ** 2
        expected = (x - 0.3 * m - 0.7 * mean) / (blend + layer.eps).sqrt()
        expected = expected * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        assert torch.allclose(y, expected)
    plain = network(images)
    with blended(network, 0.0):
        assert torch.allclose(network(images), plain)
    with blended(network, 0.5):
        assert not torch.allclose(network(images), plain)
        assert torch.allclose(network(images)[:1], network(images[:1]))
    assert torch.equal(network(images), plain)


def test_evalnorm_says_what_it_wants():
    with pytest.raises(ValueError, match="alpha must be from 0 to 1; got 2"), blended(trained("bn"), 2):
        pass
    for network in (trained("gn"), trained("bn").train()):
        with pytest.raises(ValueError, match="in eval"), blended(network, 0.5):
            pass


def test_a_trial_scores_every_share_on_both_splits(monkeypatch, tmp_path):
    monkeypatch.setenv("KALMANNORM_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    generate_images(tmp_path, "cifar10", train=64, test=32)
    fit = fitting.fit
    tiny = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.init_args.limit=null",
            "--data.init_args.validation=16", "--data.init_args.gradient_batch=8"]  # fmt: skip
    monkeypatch.setattr(
        fitting, "fit",
        lambda config, folder, overrides, split: fit(config, folder, overrides=[*overrides, *tiny], split=split),
    )  # fmt: skip
    rows = evalnorm.trial("kn-1", 0.1, 0, tmp_path / "run")
    assert [(row["split"], row["share"]) for row in rows] == [
        (split, share) for split in ("validation", "test") for share in evalnorm.SHARES
    ]
    assert len({row["accuracy"] for row in rows}) > 1


def test_the_share_is_chosen_without_test_images():
    scores = {("validation", 0.0): 0.5, ("validation", 0.1): 0.6, ("test", 0.0): 0.5, ("test", 0.1): 0.4}
    rows = pd.DataFrame(
        [{"arm": "kn-1", "seed": seed, "split": split, "share": share, "accuracy": accuracy + seed / 100}
         for (split, share), accuracy in scores.items() for seed in range(3)]
    )  # fmt: skip
    assert evalnorm.summary(rows).splitlines()[-1] == "| kn-1 | 51.0 ± 1.0 | 41.0 ± 1.0 | 0.1 |"
