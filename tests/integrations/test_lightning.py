"""The callback: who is converted and when, checkpoints, statistics in scoring, and what stops a training."""

import copy
import functools
import math
import os
import warnings
from contextlib import nullcontext
from unittest import mock

import lightning
import pytest
import torch
from network import in_two_processes
from short_trainings import Nested, assert_same, pairs, quiet_trainer
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn import functional as F

import kalmannorm as kn
from kalmannorm.integrations.lightning import KalmanNormCallback, annealing, network_of
from kalmannorm.traversal import kalman_layers


class Flat(Nested):
    """The module is the network."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.relu, self.conv2, self.norm2 = self.net
        del self.net

    def forward(self, x):
        return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))).mean((2, 3))

    called = nn.Module.__call__


def trainer_of(callback, steps, *others, **options):
    return quiet_trainer(steps, callback, *others, log_every_n_steps=1, **options)


@pytest.mark.parametrize("kind", [Nested, Flat])
@pytest.mark.parametrize("input_stats", [None, ([3.0], [1.0])], ids=["", "input_stats"])
def test_it_converts_before_the_optimizer_is_made_and_every_layer_gets_its_prior(kind, input_stats):
    class Watching(lightning.Callback):
        seen = None

        def on_train_batch_end(self, trainer, pl_module, *rest):
            self.seen = {n: p.grad for n, p in pl_module.named_parameters() if n.endswith("process_noise")}

    module, watching = kind(), Watching()
    trainer = trainer_of(KalmanNormCallback(input_stats=input_stats, guard=50.0), 2, watching)
    trainer.fit(module, pairs())
    assert [layer.guard for _, layer in kalman_layers(module)] == [50.0, 50.0]
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    # Process noise gets a gradient other than zero where there was a prior.
    assert [bool(grad.any()) for grad in watching.seen.values()] == [input_stats is not None, True]


def test_kinds_of_layers_may_be_one_word():
    module = Nested()
    module.net.append(nn.GroupNorm(1, 2))
    trainer_of(KalmanNormCallback(layers="group"), 1).fit(module, pairs())
    assert [type(layer) for _, layer in kalman_layers(module)] == [kn.GroupKalmanNorm]
    assert type(module.net[1]) is nn.BatchNorm2d


def test_a_network_with_kalman_layers_stays_as_it_is():
    module = Nested()
    kn.convert(module.net, gain=0.5, input_stats=([3.0], [1.0]))
    before = [*module.net, *module.net._forward_pre_hooks.values()]
    trainer_of(KalmanNormCallback(gain=0.25), 1).fit(module, pairs())
    assert before == [*module.net, *module.net._forward_pre_hooks.values()]


@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_weights_come_later(kind):
    if not hasattr(lightning.pytorch.callbacks, kind):
        pytest.skip("not in this release of Lightning")
    options = {"swa_lrs": 0.01} if kind == "StochasticWeightAveraging" else {}

    def fit(averaging_first):
        callbacks = [KalmanNormCallback(), getattr(lightning.pytorch.callbacks, kind)(**options)]
        trainer = quiet_trainer(-1, *callbacks[:: -1 if averaging_first else 1], max_epochs=2)
        trainer.fit(Nested(), pairs())

    with pytest.raises(ValueError, match=f"got {kind} before it .* expected KalmanNormCallback first"):
        fit(averaging_first=True)
    fit(averaging_first=False)


class Pretrained(Nested):
    """Its network has seen some batches."""

    def __init__(self):
        super().__init__()
        for _ in range(50):
            self.net(3 + torch.randn(8, 1, 8, 8))


@pytest.mark.parametrize("kind", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_of_a_pretrained_network_are_scored_by_batches(kind):
    if not hasattr(lightning.pytorch.callbacks, kind):
        pytest.skip("not in this release of Lightning")
    average, module = getattr(lightning.pytorch.callbacks, kind), Pretrained()
    callback = KalmanNormCallback(online=True, input_stats=([3.0], [1.0]))
    trainer = trainer_of(callback, 4, average(), num_sanity_val_steps=1)
    trainer.fit(module, pairs(), pairs())
    assert math.isfinite(float(trainer.callback_metrics["loss"]))
    assert all(buffer.isfinite().all() for buffer in module.buffers())
    with pytest.raises(ValueError, match="got recalibrate=3 with WeightAveraging, which sets the weights after it"):
        trainer_of(KalmanNormCallback(recalibrate=3), 4, average()).fit(Nested(), pairs())
    trainer_of(KalmanNormCallback(recalibrate=3, freeze_from=0.5), 4, average()).fit(Nested(), pairs())


def test_layers_that_are_frozen_have_no_statistics_to_be_averaged_anew():
    average = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01)
    with pytest.raises(ValueError, match=r"got freeze_from=0\.5 with StochasticWeightAveraging"):
        trainer_of(KalmanNormCallback(freeze_from=0.5), 2, average).fit(Nested(), pairs())


def test_nothing_to_convert_is_an_error():
    module = Nested()
    module.net = nn.Conv2d(1, 2, 3)
    with pytest.raises(ValueError, match="nothing to convert"):
        trainer_of(KalmanNormCallback(), 1).fit(module, pairs())


@pytest.mark.parametrize("kind", [Nested, Flat])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(kind, tmp_path):
    whole, first, second = kind(), kind(), kind()
    # By epochs: Lightning itself does not resume exactly where `max_steps` ended one.
    trainer_of(KalmanNormCallback(), -1, max_epochs=2).fit(whole, pairs())
    trainer = trainer_of(KalmanNormCallback(), -1, max_epochs=1)
    trainer.fit(first, pairs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer_of(KalmanNormCallback(), -1, max_epochs=2)
    resumed.fit(second, pairs(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == 8
    assert bool(first.state_dict()["net.4.gain" if kind is Nested else "norm2.gain"])
    assert_same(second.state_dict(), whole.state_dict())


def test_a_checkpoint_is_tested_with_the_callback_and_deployed_without(tmp_path):
    module = Nested()
    trainer = trainer_of(KalmanNormCallback(), 3)
    trainer.fit(module, pairs())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer.test(module, pairs(), verbose=False)
    again = trainer_of(KalmanNormCallback(), 1)
    assert again.test(Nested(), pairs(), ckpt_path=tmp_path / "end.ckpt", verbose=False) == expected
    plain = Nested.load_from_checkpoint(tmp_path / "end.ckpt", strict=False).eval()
    assert type(plain.net[1]) is nn.BatchNorm2d
    images = pairs().dataset.tensors[0]
    assert torch.equal(plain(images), module.eval()(images))


@pytest.mark.parametrize("run", ["validate", "test"])
def test_online_scoring_uses_batches_and_changes_no_buffer(run):
    module = Nested()
    kn.convert(module)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    trainer = trainer_of(KalmanNormCallback(online=True), 1)
    online = getattr(trainer, run)(module, pairs(), verbose=False)[0]["loss"]
    running = getattr(trainer_of(KalmanNormCallback(), 1), run)(module, pairs(), verbose=False)[0]["loss"]
    assert_same(dict(module.named_buffers()), buffers)
    module.eval()
    with torch.no_grad(), kn.online_statistics(module):
        losses = [float(F.cross_entropy(module(images), labels)) for images, labels in pairs()]
    assert online == pytest.approx(sum(losses) / len(losses))
    assert online != pytest.approx(running)
    assert not any(layer.online for _, layer in kalman_layers(module))


def test_an_error_in_online_validation_switches_back():
    module = kn.convert(Nested())
    module.validation_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer_of(KalmanNormCallback(online=True), 1).validate(module, pairs())
    assert not any(layer.online for _, layer in kalman_layers(module))


@pytest.mark.parametrize("kind", [Nested, Flat])
def test_recalibrated_statistics_are_those_of_the_training_batches(kind):
    recalibrated, plain = kind(), kind()
    trainer_of(KalmanNormCallback(recalibrate=3), 2).fit(recalibrated, pairs())
    trainer_of(KalmanNormCallback(), 2).fit(plain, pairs())
    buffers = dict(recalibrated.named_buffers())
    assert any(not torch.equal(buffer, buffers[name]) for name, buffer in plain.named_buffers())
    kn.recalibrate(plain.net if kind is Nested else plain, pairs(), max_batches=3, progress=False)
    assert_same(recalibrated.state_dict(), plain.state_dict())


class OfTwoLoaders(Nested):
    """Trained on the batches of two loaders, by names."""

    def training_step(self, batch, batch_idx):
        return sum(super(OfTwoLoaders, self).training_step(batch[name], batch_idx) for name in ("one", "two"))


def test_a_batch_that_the_network_does_not_take_is_told_before_a_step_is_done():
    module, loaders = OfTwoLoaders(), {"one": pairs(), "two": pairs(4)}
    before = module.net[0].weight.clone()
    with pytest.raises(ValueError, match=r"got recalibrate=3, but Sequential cannot be called .* expected forward="):
        trainer_of(KalmanNormCallback(recalibrate=3), 4).fit(module, loaders)
    assert torch.equal(module.net[0].weight, before)
    trainer_of(KalmanNormCallback(recalibrate=3, forward=by_names), 4).fit(module, loaders)
    buffers = {name: buffer.clone() for name, buffer in module.net.named_buffers()}
    ones, twos = list(pairs()), list(pairs(4))
    together = [{"one": ones[i], "two": twos[i % 2]} for i in range(3)]
    kn.recalibrate(module.net, together, forward=by_names, progress=False)
    assert_same(dict(module.net.named_buffers()), buffers)


def by_names(network, batch):
    return [network(batch[name][0]) for name in ("one", "two")]


def test_the_mean_gain_is_logged():
    module = Nested()
    trainer = trainer_of(KalmanNormCallback(log_gains=True, gain=0.5), -1, max_epochs=1)
    trainer.fit(module, pairs())
    assert trainer.logged_metrics["kalman_gain"] == 0.5


@pytest.mark.parametrize(("accumulated", "start"), [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_gains_are_annealed_step_by_step(accumulated, start):
    gains = {}
    for factor in (1.0, 10.0):
        module = Nested()
        callback = KalmanNormCallback(anneal=factor, anneal_from=start)
        trainer = trainer_of(callback, -1, max_epochs=2, accumulate_grad_batches=accumulated)
        trainer.fit(module, pairs())
        assert trainer.global_step == 8 // accumulated
        gains[factor] = [layer.gain.item() for _, layer in kalman_layers(module)]
    apart = [annealed - plain for annealed, plain in zip(gains[10.0], gains[1.0], strict=True)]
    assert apart == pytest.approx([math.log(10)] * 2, abs=0.05)  # but for what was learned otherwise


class Manual(Nested):
    """Two optimizers of a part each, whose steps the trainer counts together."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[place].parameters(), lr=0.01) for place in (0, 3)]


def annealed_by(module, callback, steps, **options):
    trainer_of(callback, steps, **options).fit(module, pairs())
    return [math.exp(layer.gain.item()) for _, layer in kalman_layers(module)]


def test_each_of_several_trainings_is_annealed_as_asked():
    callback = KalmanNormCallback(anneal=10.0, anneal_from=0.5)
    for _ in range(2):
        assert annealed_by(Manual(), callback, -1, max_epochs=1) == pytest.approx([10.0, 10.0])


def test_steps_of_several_optimizers_are_those_of_a_batch():
    assert annealed_by(Manual(), KalmanNormCallback(anneal=10.0), 8) == pytest.approx([10.0, 10.0])


def test_without_an_end_of_training_nothing_can_be_annealed():
    with pytest.raises(ValueError, match=r"anneal=10\.0, freeze_from=1\.0 and a training of inf steps, expected"):
        trainer_of(KalmanNormCallback(anneal=10.0), -1).fit(Nested(), pairs())
    with pytest.raises(ValueError, match="KalmanNormCallback: anneal must be above 0; got 0"):
        KalmanNormCallback(anneal=0)
    with pytest.raises(ValueError, match="KalmanNormCallback: anneal_from must be a share of the training"):
        KalmanNormCallback(anneal=10.0, anneal_from=1.0)


class Breaking(lightning.Callback):
    """Spoils the second convolution after a step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            pl_module.net[3].weight.data.fill_(torch.nan)


def test_a_loss_that_is_not_finite_names_the_layer_where_it_began():
    with pytest.raises(FloatingPointError, match=r"loss nan after step 2: .* in layer 'net\.4'"):
        trainer_of(KalmanNormCallback(), 4, Breaking()).fit(Nested(), pairs())
    trainer = trainer_of(KalmanNormCallback(stop_at_nonfinite=False), 4, Breaking())
    trainer.fit(Nested(), pairs())
    assert trainer.global_step == 4


def test_it_says_so_where_all_statistics_are_finite():
    module = Nested()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) * torch.nan
    with pytest.raises(FloatingPointError, match="were finite so far"):
        trainer_of(KalmanNormCallback(), 4).fit(module, pairs())


class Ranks(lightning.Callback):
    """Keeps what each process has in the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        groups = [layer.process_group is not None for _, layer in kalman_layers(pl_module)]
        torch.save((pl_module.state_dict(), groups), self.folder / f"rank-{trainer.global_rank}.pt")


def train_by_two(rank, folder, callback, strategy):
    if strategy == "ddp":
        os.environ["LOCAL_RANK"] = str(rank)  # Lightning starts no process, as the other one is there
    options = {"devices": 2, "strategy": strategy, "sync_batchnorm": strategy == "ddp"}
    module = Nested()
    trainer_of(callback, 2, Ranks(folder), **options).fit(module, pairs())
    torch.save(module.state_dict(), folder / "main.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
def test_two_processes(strategy, tmp_path):
    callback = KalmanNormCallback(recalibrate=2, input_stats=([3.0], [1.0]))
    work = functools.partial(train_by_two, folder=tmp_path, callback=callback, strategy=strategy)
    if strategy == "ddp":
        in_two_processes(work, tmp_path)
    else:  # from a process that has no threads
        start_processes(work, nprocs=1, start_method="forkserver")
    (first, groups), (second, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert_same(first, second)  # recalibrated statistics too: of both processes' data
    assert bool(first["net.1.process_noise"].any())
    assert groups == [strategy == "ddp"] * 2
    main = torch.load(tmp_path / "main.pt")
    for name, value in main.items():  # forked: BatchNorm's, which has no gain
        assert torch.equal(value, first[name])


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
        trainer_of(KalmanNormCallback(recalibrate=2, log_gains=True, online=True), 2).fit(Nested(), pairs())




def test_online_prediction_uses_batches():
    module = kn.convert(Nested())
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    got = torch.cat(trainer_of(KalmanNormCallback(online=True), 1).predict(module, pairs()))
    module.eval()
    with torch.no_grad(), kn.online_statistics(module):
        expected = torch.cat([module(images) for images, _ in pairs()])
    torch.testing.assert_close(got, expected)


class Gains(lightning.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.net[1].gain.item())


def test_the_first_half_of_the_steps_goes_before_the_first_factor():
    seen = {}
    for factor in (1.0, 10.0):
        gains = Gains()
        trainer_of(KalmanNormCallback(anneal=factor, anneal_from=0.5), 4, gains).fit(Nested(), pairs())
        seen[factor] = gains.seen
    assert seen[10.0][:2] == seen[1.0][:2]
    assert seen[10.0][3] - seen[1.0][3] == pytest.approx(math.log(10), abs=0.05)


def test_annealing_goes_on_from_a_checkpoint_without_its_state(tmp_path):
    module = kn.convert(Nested())
    trainer = quiet_trainer(2)
    trainer.fit(module, pairs())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    gains = {}
    for factor in (1.0, 10.0):
        module = kn.convert(Nested())
        callback = KalmanNormCallback(anneal=factor, anneal_from=0.5)
        trainer_of(callback, 4).fit(module, pairs(), ckpt_path=tmp_path / "half.ckpt")
        gains[factor] = module.net[1].gain.item()
    assert gains[10.0] - gains[1.0] == pytest.approx(math.log(10), abs=0.05)


def test_the_logged_gain_is_that_of_one_map():
    module = Nested()
    trainer = trainer_of(KalmanNormCallback(log_gains=True), -1, max_epochs=1)
    trainer.fit(module, pairs())
    gains = [float(layer.kalman_gain(1)) for _, layer in kalman_layers(module)]
    assert float(trainer.logged_metrics["kalman_gain"]) == pytest.approx(sum(gains) / 2)


def test_a_training_may_go_on_behind_a_loss_that_is_not_finite():
    trainer = trainer_of(KalmanNormCallback(stop_at_nonfinite=False), 4, Breaking())
    trainer.fit(Nested(), pairs())
    assert trainer.global_step == 4


def test_arguments_of_annealing():
    with pytest.raises(ValueError, match="anneal must be above 0; got inf"):
        KalmanNormCallback(anneal=math.inf)


@pytest.mark.parametrize(("steps", "start"), [(8, 0.0), (8, 0.5), (8, 0.99), (7, 0.3), (1, 0.9)])
def test_shares_of_annealing_make_the_factor(steps, start):
    shares = [annealing(step, steps, 10.0, start) for step in range(steps)]
    assert math.prod(shares) == pytest.approx(10.0)
    assert shares == sorted(shares)
    assert sum(share == 1 for share in shares) == min(math.ceil(start * steps), steps - 1)


def test_several_parts_are_one_network():
    module = nn.ModuleDict({"one": nn.Sequential(nn.BatchNorm1d(2)), "two": nn.Sequential(nn.BatchNorm1d(2))})
    assert network_of(module, lambda layer: isinstance(layer, nn.BatchNorm1d)) is module


def test_recalibration_runs_in_the_trainers_precision():
    seen = []
    module = Nested()
    trainer = trainer_of(KalmanNormCallback(recalibrate=2), 2, precision="bf16-mixed")
    module.net[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    trainer.fit(module, pairs())
    assert seen == [torch.bfloat16] * len(seen)
    assert len(seen) >= 4


@pytest.mark.parametrize("accumulated", [1, 2])
def test_layers_are_frozen_for_the_last_steps_also_from_a_checkpoint(accumulated, tmp_path):
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append({layer.frozen for _, layer in kalman_layers(pl_module)})

    module, options = Nested(), {"max_epochs": 2, "accumulate_grad_batches": accumulated}
    trainer = trainer_of(KalmanNormCallback(freeze_from=0.75), -1, Watch(), **options)
    trainer.fit(module, pairs())
    assert seen == [{False}] * 6 + [{True}] * 2
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    seen.clear()
    options["max_epochs"] = 3
    again = trainer_of(KalmanNormCallback(freeze_from=0.5), -1, Watch(), **options)
    again.fit(Nested(), pairs(), ckpt_path=tmp_path / "frozen.ckpt")
    assert seen == [{True}] * 4


def test_arguments_of_freezing():
    with pytest.raises(ValueError, match=r"KalmanNormCallback: freeze_from must be a share of the training, .* got 0"):
        KalmanNormCallback(freeze_from=0.0)
    with pytest.raises(ValueError, match="got recalibrate=0, expected None or a number above 0"):
        KalmanNormCallback(recalibrate=0)


@pytest.mark.parametrize(("accumulated", "wanted", "first"), [(1, 3, 4), (1, 50, 0), (2, 3, 4)])
def test_before_layers_are_frozen_they_get_the_statistics_of_the_latest_batches(accumulated, wanted, first, tmp_path):
    """That of the step included; from a checkpoint they keep them."""
    before = {}

    class Copying(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6 // accumulated and not before:
                before["module"] = copy.deepcopy(pl_module)

    module, options = Nested(), {"max_epochs": 2, "accumulate_grad_batches": accumulated}
    callback = KalmanNormCallback(freeze_from=0.75, recalibrate=wanted)
    trainer = quiet_trainer(-1, Copying(), callback, log_every_n_steps=1, **options)
    trainer.fit(module, pairs())
    expected = before["module"].net
    kn.recalibrate(expected, (list(pairs()) * 2)[first:7], progress=False)
    buffers = dict(module.net.named_buffers())
    assert_same({name: buffers[name] for name, _ in expected.named_buffers()}, dict(expected.named_buffers()))
    assert not torch.equal(module.net[1].running_mean, torch.zeros(4))
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    again, options["max_epochs"] = Nested(), 3
    trainer_of(KalmanNormCallback(freeze_from=0.5, recalibrate=wanted), -1, **options).fit(
        again, pairs(), ckpt_path=tmp_path / "frozen.ckpt"
    )
    assert_same(dict(again.net.named_buffers()), buffers)


def test_a_training_that_ends_before_layers_are_frozen_recalibrates_at_its_end():
    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    module = Nested()
    trainer_of(KalmanNormCallback(freeze_from=0.75, recalibrate=3), 40, Stop()).fit(module, pairs())
    statistics = module.net[1].running_mean.clone()
    kn.recalibrate(module.net, pairs(), max_batches=3, progress=False)
    assert torch.equal(module.net[1].running_mean, statistics)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_frozen_layers_need_a_strategy_that_waits_for_no_gradient(strategy):
    module = Nested()
    trainer = trainer_of(KalmanNormCallback(freeze_from=0.5), 4, devices=1, accelerator="cpu", strategy=strategy)
    refused = pytest.raises(ValueError, match=r"freeze_from=0\.5 with DistributedDataParallel, which waits")
    try:
        with mock.patch.dict(os.environ), refused if strategy == "ddp" else nullcontext():  # Lightning sets a rank
            trainer.fit(module, pairs())
    finally:
        torch.distributed.destroy_process_group()
    assert {layer.frozen for _, layer in kalman_layers(module)} == {strategy != "ddp"}
