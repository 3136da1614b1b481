"""Steps as CUDA graphs; without a GPU, one that records a function by keeping it stands in for a graph."""

import lightning
import pytest
import torch
from short_trainings import loader, quiet_trainer
from torch import nn

from kalmannorm.lab import capturing, training
from kalmannorm.lab.capturing import CapturedStep
from kalmannorm.lab.curve import Curve
from kalmannorm.lab.models.small import SmallConvNet
from kalmannorm.lab.training import Classifier


def _loss(model):
    return lambda x, y: (model(x) - y).square().mean()


def _batches(count, samples=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(samples, 3, generator=generator), torch.randn(samples, 2, generator=generator))
            for _ in range(count)]  # fmt: skip


def test_the_first_batches_and_others_of_their_shape_run_as_they_are():
    recorded, seen = [], []
    model = nn.Linear(3, 2)

    def loss(x, y):
        seen.append(x)
        return _loss(model)(x, y)

    def record(step):
        recorded.append(len(seen))
        return step

    step = CapturedStep(loss, model.parameters(), warm_up=2, record=record)
    batches = _batches(4)
    for batch in batches[:2]:
        step(*batch)
    assert not recorded
    step(*batches[2])
    step(*batches[3])
    assert recorded == [2]
    assert [x is batch[0] for x, batch in zip(seen, batches, strict=True)] == [True, True, False, False]
    assert seen[2] is seen[3]
    step(*_batches(1, samples=3)[0])
    assert seen[-1].shape == (3, 3)
    assert seen[-1] is not seen[2]


def test_a_loss_is_not_overwritten_by_the_next():
    model = nn.Linear(3, 2)
    written = []

    def record(run):
        def again():
            run()
            written.append(step._value)
            step._value = written[0].copy_(step._value)  # a graph writes to one place

        return again

    step = CapturedStep(_loss(model), model.parameters(), warm_up=1, record=record)
    batches = _batches(3)
    losses = [step(*batch) for batch in batches]
    for loss, batch in zip(losses, batches, strict=True):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, _loss(model)(*batch).detach())


@pytest.fixture
def _graphs_without_a_gpu(monkeypatch):
    def record(step):
        def again():
            for parameter in parameters:
                parameter.grad = None
            step()

        return again

    parameters = []

    class Step(CapturedStep):
        def __init__(self, loss, given):
            parameters.extend(given)
            super().__init__(loss, parameters)

    monkeypatch.setattr(capturing, "_graph", record)
    monkeypatch.setattr(training, "CapturedStep", Step)
    monkeypatch.setattr(training, "_captures", lambda trainer: True)


@pytest.mark.usefixtures("_graphs_without_a_gpu")
@pytest.mark.parametrize("options", [{}, {"normalization": "kn", "anneal": 5.0}, {"normalization": "brn"}])
def test_a_captured_training_is_the_same(options):
    """The rate's course, the gains', weights, statistics, losses: all to the last bit."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    found = []
    for capture in (False, True):
        torch.manual_seed(0)
        module = Classifier(
            SmallConvNet(), num_classes=10, rate=0.05, steps=10, statistics_batch=2, schedule="warmup", capture=capture,
            **{"normalization": "bn", **options},
        )  # fmt: skip
        curve = Curve()
        trainer = quiet_trainer(10, curve)
        trainer.fit(module, loader(images, labels, 4, 0))
        assert trainer.global_step == 10
        assert module.automatic_optimization is not capture
        found.append((curve.losses, module.network.state_dict(), trainer.optimizers[0].param_groups[0]["lr"]))
    (losses, weights, rate), (again, others, same_rate) = found
    assert again == losses
    assert same_rate == rate
    for name, tensor in weights.items():
        assert torch.equal(others[name], tensor), name


@pytest.mark.usefixtures("_graphs_without_a_gpu")
def test_a_captured_training_goes_on_where_it_was(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 1, 32, 32, generator=generator), torch.arange(4)

    def fit(steps, resumed=None):
        torch.manual_seed(0)
        module = Classifier(
            SmallConvNet(), "kn", num_classes=10, rate=0.05, steps=10, statistics_batch=4, schedule="warmup",
            anneal=5.0, capture=True,
        )  # fmt: skip
        trainer = quiet_trainer(steps)
        trainer.fit(module, loader(images, labels, 4, 0), ckpt_path=resumed)
        assert trainer.global_step == steps
        return trainer, module

    _, whole = fit(10)
    fit(5)[0].save_checkpoint(tmp_path / "half.ckpt")
    _, parts = fit(10, tmp_path / "half.ckpt")
    for (name, tensor), other in zip(
        whole.network.state_dict().items(), parts.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("_graphs_without_a_gpu")
def test_what_is_captured_on_one_device_is_not_on_the_next(monkeypatch):
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    module = Classifier(SmallConvNet(), "kn", num_classes=10, rate=0.05, steps=2, statistics_batch=2, capture=True)
    for captures in (True, False):
        monkeypatch.setattr(training, "_captures", lambda trainer, found=captures: found)
        quiet_trainer(2, max_epochs=1).fit(module, loader(images, labels, 4, 0))
        assert module.automatic_optimization is not captures


@pytest.mark.usefixtures("_graphs_without_a_gpu")
def test_methods_that_count_in_python_are_not_captured():
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    module = Classifier(SmallConvNet(), "cbn", num_classes=10, rate=0.05, steps=2, statistics_batch=2, capture=True)
    quiet_trainer(2).fit(module, loader(images, labels, 4, 0))
    assert module.automatic_optimization


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
def test_without_a_gpu_or_between_gradients_and_steps_nothing_is_captured(options):
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    module = Classifier(SmallConvNet(), "kn", num_classes=10, rate=0.05, steps=2, statistics_batch=2, capture=True)
    quiet_trainer(1, **options).fit(module, loader(images, labels, 4, 0))
    assert module.automatic_optimization


class _Strategy:
    def __init__(self, device):
        self.root_device = torch.device(device)


@pytest.mark.parametrize(
    ("device", "world", "accumulated", "clipped", "scaler", "expected"),
    [
        ("cuda", 1, 1, None, None, True),
        ("cpu", 1, 1, None, None, False),
        ("cuda", 2, 1, None, None, False),
        ("cuda", 1, 2, None, None, False),
        ("cuda", 1, 1, 0.5, None, False),
        ("cuda", 1, 1, None, object(), False),
    ],
)
def test_what_a_graph_stands_for(device, world, accumulated, clipped, scaler, expected):
    class Trainer:
        strategy, world_size = _Strategy(device), world
        accumulate_grad_batches, gradient_clip_val = accumulated, clipped

        class precision_plugin:
            pass

    Trainer.precision_plugin.scaler = scaler
    assert training._captures(Trainer) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["bn", "gn", "brn", "mabn", "kn", "kn-paper"])
def test_on_a_gpu(method):
    """A graph of the real step trains as the step does."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)
    losses = []
    for capture in (False, True):
        lightning.seed_everything(0, verbose=False)
        module = Classifier(
            SmallConvNet(), method, num_classes=10, rate=0.02, steps=12, statistics_batch=2, capture=capture
        )
        curve = Curve()
        quiet_trainer(12, curve, accelerator="gpu").fit(module, loader(images, labels, 8, 0))
        assert module.automatic_optimization is not capture
        losses.append(torch.tensor(curve.losses))
    tolerance = 0.2 if method == "kn-paper" else 1e-2  # its draws differ
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
