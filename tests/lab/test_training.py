"""Training and scoring: who is decayed, in what order data come, and that both scores are what they say."""

import math
import re
from itertools import pairwise

import fake_cuda
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from short_trainings import assert_same, loader, quiet_trainer
from torch import nn

import kalmannorm
from kalmannorm.freezing import unfrozen_layers
from kalmannorm.lab.curve import Curve
from kalmannorm.lab.methods import normalize
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.optimization import parameter_groups
from kalmannorm.lab.scoring import online_logits
from kalmannorm.lab.training import Classifier


def _data(count=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def _kalman_layers(network):
    return [layer for layer in network.modules() if isinstance(layer, kalmannorm.KalmanNorm)]


def _classifier(model, **options):
    return Classifier(model, num_classes=10, **({"rate": 0.01, "steps": 8, "statistics_batch": 2} | options))


def rate_of(trainer):
    return trainer.optimizers[0].param_groups[0]["lr"]


FILTERS = r"(convs\.\d|classifier)\.weight"


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [("kn", {}, FILTERS), ("wn", {}, r".*\.original1"), ("gn", {"proxy": True}, rf"{FILTERS}|.*\.proxy")],
)
def test_only_filters_and_proxies_are_decayed(method, options, names):
    """But not the scales of weight normalization."""
    model = normalize(SmallConvNet(), method, **options)
    decayed, others = parameter_groups(model, 0.1)
    ids = {id(p) for p in decayed["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in ids} == {
        name for name, _ in model.named_parameters() if re.fullmatch(names, name)
    }
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


COSINE = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]


@pytest.mark.parametrize(
    ("method", "schedule", "milestones", "expected"),
    [
        ("gn", "cosine", None, COSINE),
        ("gn", "warmup", None, [1 / 8, *COSINE[1:]]),
        ("gn", "milestones", {0.5: 0.1, 0.75: 0.01}, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("frn", "cosine", None, [1 / 8, *COSINE[1:]]),
        ("frn", "milestones", {0.5: 0.1, 0.75: 0.01}, [1 / 8, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
    ],
)
def test_training_moves_the_rate_along_its_schedule(method, schedule, milestones, expected):
    """Which rises at the start where a method asks for it."""
    rates = []
    watch = LambdaCallback(on_train_batch_start=lambda trainer, *_: rates.append(rate_of(trainer)))
    options = {"normalization": method, "schedule": schedule, "milestones": milestones, "rate": 0.02}
    classifier = _classifier(SmallConvNet(((8, 2),)), **options)
    quiet_trainer(8, watch).fit(classifier, loader(*_data(), 2, 0))
    assert rates == pytest.approx([0.02 * share for share in expected])


def test_annealing_may_begin_late():
    gains = []
    watch = LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: gains.append(_kalman_layers(module.network)[1].gain.item())
    )
    classifier = _classifier(SmallConvNet(), normalization="kn", rate=1e-9, anneal=16.0, anneal_from=0.5)
    quiet_trainer(8, watch).fit(classifier, loader(*_data(), 2, 0))
    expected = [0, 0, 0, 0, *(math.log(16) * done / 4 for done in (1, 2, 3, 4))]
    assert gains == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalization", ["kn", "bn"])
def test_layers_are_frozen_for_the_last_steps(normalization):
    variances = []
    classifier = _classifier(SmallConvNet(), normalization=normalization, steps=4, freeze_from=0.7)
    watch = LambdaCallback(
        on_train_batch_end=lambda *_: variances.append(classifier.network.norms[0].running_var.clone())
    )
    quiet_trainer(4, watch).fit(classifier, loader(*_data(), 2, 0))
    assert [bool((a == b).all()) for a, b in pairwise(variances)] == [False, False, True]
    assert unfrozen_layers(classifier.network) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anneal": 2.0, "anneal_from": 1.0}, "anneal_from must be a share of the training, 0 up to below 1; got 1.0"),
        ({"schedule": "steps"}, "got 'steps'"),
        ({"milestones": {0.5: 0.1}}, "milestones go with schedule='milestones'"),
        ({"schedule": "milestones"}, "got None with 'milestones'"),
        ({"schedule": "milestones", "milestones": {82: 0.1}}, "0 to 1; got 82"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": 0.0}, "rate above 0"),
        ({"anneal": 0.0}, "anneal must be above 0; got 0.0"),
        ({"freeze_from": 0.5, "normalization": "gn"}, "freeze_from=0.5 needs BatchNorm or Kalman layers; got .*'gn'"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _classifier(SmallConvNet(), **options)


def _a_step(method, statistics_batch, images, labels):
    torch.manual_seed(0)
    classifier = _classifier(SmallConvNet(((8, 2), (16, 2))), normalization=method, statistics_batch=statistics_batch)
    curve = Curve()
    trainer = quiet_trainer(1, curve)
    trainer.fit(classifier, loader(images, labels, len(images)))
    return curve.losses[0], dict(classifier.network.named_parameters()), classifier


@pytest.mark.parametrize("statistics_batch", [2, 4])
def test_a_loop_over_parts_trains_as_one_pass_in_groups(statistics_batch):
    """SyncBatchNorm in a single process is BatchNorm, but of whole batches alone."""
    data = _data(8)
    loss, parameters, looped = _a_step("sync", statistics_batch, *data)
    expected_loss, expected, _ = _a_step("bn", statistics_batch, *data)
    assert looped.network.norms[0].num_batches_tracked == 8 / statistics_batch
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name
    assert loss != pytest.approx(_a_step("bn", 8, *data)[0], rel=1e-3)


@pytest.mark.parametrize("method", ["sync", "cbn"])
def test_passes_of_one_step_count_once(method):
    """Four passes of the same images move the averages as one does."""
    images, labels = _data(2)
    _, _, once = _a_step(method, 2, images, labels)
    _, _, looped = _a_step(method, 2, images.repeat(4, 1, 1, 1), labels.repeat(4))
    for name, buffer in once.network.named_buffers():
        if "running" in name:
            assert torch.allclose(looped.network.get_buffer(name), buffer, atol=1e-6), name
    assert once.network.norms[0].momentum == 0.1  # to the digit: nothing was rounded
    assert looped.network.norms[0].momentum == pytest.approx(1 - 0.9**0.25)


def test_cross_iteration_waits_for_steps_and_not_for_passes():
    classifier = _classifier(SmallConvNet(((8, 2),)), normalization="cbn", steps=3)  # as BatchNorm for 2 of them
    begun = []

    def look(layer, _):
        begun.append(layer._steps >= layer.burn_in * layer.passes)

    hook = classifier.network.norms[0].register_forward_pre_hook(look)
    quiet_trainer(3).fit(classifier, loader(*_data(32), 8, 0))
    hook.remove()
    assert begun == [False] * 8 + [True] * 4


def test_batchnorm_over_all_images_is_torchs_own_and_leaves_standardized_filters_to_be_trained():
    assert isinstance(_a_step("bn", 4, *_data(8))[2].network.norms[0], kalmannorm.KalmanNorm)
    network = kalmannorm.standardize_weights(SmallConvNet(((8, 2),)))
    raw = network.convs[0].weight.detach().clone()
    classifier = _classifier(network, normalization="bn", statistics_batch=8)
    classifier.training_logits(_data(8)[0])
    assert type(classifier.network.norms[0]) is nn.BatchNorm2d
    assert type(classifier.network.convs[0]).__name__ == "StandardizedConv2d"
    torch.testing.assert_close(classifier.network.convs[0].weight, raw, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["bn", "sync", "brn"])
def test_a_statistics_batch_that_does_not_divide_is_refused(method):
    with pytest.raises(ValueError, match=r"statistics_batch must divide the 8 images .* at a time; got 3"):
        _a_step(method, 3, *_data(8))
    if method == "bn":  # which a method that takes each image by itself doesn't mind
        _a_step("gn", 3, *_data(8))


def test_online_scores_can_be_left_out():
    (scores,) = quiet_trainer(1).validate(
        _classifier(SmallConvNet(), score_online=False), loader(*_data(), 8), verbose=False
    )
    assert set(scores) == {"accuracy_running"}


def _scores(model, images, labels, **options):
    (scores,) = quiet_trainer(1).validate(_classifier(model, **options), loader(images, labels, 8), verbose=False)
    return scores["accuracy_running"], scores["accuracy_online"]


def test_scores_are_plain_eval_and_batches_of_two_that_normalize_themselves():
    torch.manual_seed(0)
    model, images = SmallConvNet(), _data(64)[0]
    for _ in range(30):
        model(images)
    model.eval()
    with torch.no_grad():
        plain = model(images).argmax(1)
        online = online_logits(model, images, 2).argmax(1)
    assert not torch.equal(plain, online)
    # Labels taken from one kind of prediction: that kind must score 1 and the other must not.
    assert _scores(model, images, plain)[0] == 1.0
    assert _scores(model, images, plain)[1] < 1.0
    assert _scores(model, images, online)[1] == 1.0


@pytest.mark.parametrize("method", ["bn", "kn"])
def test_in_channels_last_memory_it_is_the_same_training(method):
    def trained(**options):
        torch.manual_seed(0)
        classifier = _classifier(SmallConvNet(((8, 2), (16, 2))), normalization=method, **options)
        layouts = []
        convolution = next(m for m in classifier.modules() if isinstance(m, nn.Conv2d) and m.in_channels > 1)
        convolution.register_forward_hook(
            lambda layer, inputs, output: layouts.append(
                [x.is_contiguous(memory_format=torch.channels_last) for x in (layer.weight, inputs[0])]
            )
        )
        curve = Curve()
        trainer = quiet_trainer(3, curve)
        trainer.fit(classifier, loader(*_data(), 8, 0))
        (scores,) = trainer.validate(classifier, loader(*_data(), 8), verbose=False)
        return curve.losses, scores, dict(classifier.network.named_parameters()), layouts

    plain_losses, plain_scores, plain, plain_layouts = trained()
    losses, scores, parameters, layouts = trained(channels_last=True)
    assert all(flag for both in layouts for flag in both)
    assert not any(weight for weight, _ in plain_layouts)
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert scores == pytest.approx(plain_scores)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter, plain[name], atol=1e-4), name


@pytest.mark.parametrize("options", [{}, {"normalization": "kn", "anneal": 5.0}, {"normalization": "brn"}])
def test_a_captured_training_is_the_same(options, monkeypatch):
    """The rate's course, the gains', weights, statistics, losses: all to the last bit."""
    fake_cuda.install(monkeypatch)
    found = []
    for capture in (False, True):
        torch.manual_seed(0)
        module = _classifier(SmallConvNet(), schedule="warmup", steps=10, capture=capture, **options)
        curve = Curve()
        trainer = quiet_trainer(10, curve)
        trainer.fit(module, loader(*_data(), 4, 0))
        found.append((curve.losses, module.network.state_dict(), rate_of(trainer)))
    assert len(module.network.forward.graphs) == 1
    (losses, weights, rate), (again, others, same_rate) = found
    assert again == losses
    assert same_rate == rate
    assert_same(others, weights)


def test_methods_that_count_in_python_are_not_captured():
    for method, captured in (("kn", True), ("cbn", False)):
        module = _classifier(SmallConvNet(), normalization=method, capture=True)
        assert ("forward" in vars(module.network)) is captured
