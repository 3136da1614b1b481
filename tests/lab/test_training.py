"""Training and scoring: who is decayed, in what order data come, and that both scores are what they say."""

import pytest
import torch
from torch import nn

import kalmannorm
from kalmannorm.lab.baselines.group import to_groupnorm
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.training import Classifier, Recorder, loader, parameter_groups, quiet_trainer


def _data(count=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def _classifier(model, **options):
    return Classifier(model, num_classes=10, **({"rate": 0.01, "steps": 8} | options))


def test_only_weights_of_convolutions_and_linear_layers_are_decayed():
    model = kalmannorm.convert(SmallConvNet())
    decayed, others = parameter_groups(model, 0.1)
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decayed["params"]} == expected
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) not in expected}
    assert {"gain", "process_noise"} <= names
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_loader_repeats_its_order_by_seed_and_sees_every_image_once():
    images, labels = torch.arange(10.0)[:, None], torch.arange(10)
    first, again, other = ([batch[1].tolist() for batch in loader(images, labels, 2, seed)] for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(label for batch in first for label in batch) == list(range(10))
    assert [len(batch[1]) for batch in loader(images, labels, 4, 0)] == [4, 4]


def test_training_moves_the_rate_along_its_schedule_and_records_every_step():
    rates = {}
    for schedule in ("cosine", "warmup"):
        told = []
        recorder = Recorder(told.append, every=3)
        classifier = _classifier(SmallConvNet(), schedule=schedule)
        trainer = quiet_trainer(8, recorder)
        trainer.fit(classifier, loader(*_data(), 2, 0))
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
        rates[schedule] = [classifier._share_of_rate(step) for step in range(8)]
        assert len(recorder.losses) == len(recorder.seconds) == 8
        assert told == [3, 6]
        assert min(recorder.seconds) > 0
    assert rates["cosine"] == sorted(rates["cosine"], reverse=True)
    assert rates["cosine"][0] == 1
    assert rates["warmup"][0] == 1 / 8
    assert rates["warmup"][1:] == rates["cosine"][1:]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="got 'steps'"):
        _classifier(SmallConvNet(), schedule="steps")


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    recorder = Recorder()
    images, labels = _data(8)
    quiet_trainer(40, recorder).fit(
        _classifier(kalmannorm.convert(SmallConvNet()), steps=40), loader(images, labels, 8, 0)
    )
    assert recorder.losses[-1] < 0.5 * recorder.losses[0]


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
        # BatchNorm in training mode on a copy is the definition of online statistics.
        copy = SmallConvNet()
        copy.load_state_dict(model.state_dict())
        online = torch.cat([copy(part) for part in images.split(2)]).argmax(1)
    assert not torch.equal(plain, online)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # Labels taken from one kind of prediction: that kind must score 1 and the other must not.
    assert _scores(model, images, plain)[0] == 1.0
    assert _scores(model, images, plain)[1] < 1.0
    assert _scores(model, images, online)[1] == 1.0
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_groupnorm_scores_the_same_both_ways():
    torch.manual_seed(0)
    running, online = _scores(to_groupnorm(SmallConvNet()), *_data(64))
    assert running == online
    running, online = _scores(kalmannorm.freeze(SmallConvNet()), *_data(64))
    assert running == online


def test_nothing_is_printed(capfd, recwarn):
    trainer = quiet_trainer(2)
    classifier = _classifier(SmallConvNet())
    trainer.fit(classifier, loader(*_data(), 2, 0))
    trainer.test(classifier, loader(*_data(), 8), verbose=False)
    out, err = capfd.readouterr()
    assert out + err == ""
