"""Networks for signals and rows: their shapes and priors, and that `Classifier` trains and scores them."""

import pytest
import torch
from short_trainings import loader, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kalmannorm
from kalmannorm.lab.curve import Curve
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.models.signal import LAYERS, SignalNet, TabularNet
from kalmannorm.lab.training import Classifier

NETWORKS = {"signals": (SignalNet, (1, 64), 10), "rows": (TabularNet, (30,), 2)}
every_network = pytest.mark.parametrize("kind", NETWORKS)


def data(kind, count):
    _, shape, classes = NETWORKS[kind]
    return torch.randn(count, *shape), torch.arange(count) % classes


def classifier(kind, method="bn", network=None, **options):
    make, _, classes = NETWORKS[kind]
    given = {"statistics_batch": 2, "rate": 0.02, "steps": 30, "num_classes": classes} | options
    return Classifier(network or make(), method, **given)


def test_shapes():
    assert SignalNet(((8, 1), (16, 2)), kernel=3, num_classes=4, in_channels=2)(torch.randn(3, 2, 20)).shape == (3, 4)
    assert TabularNet(7, (8, 9), num_classes=4)(torch.randn(3, 7)).shape == (3, 4)


def test_strides_shorten_a_signal_and_odd_kernels_do_not():
    model, lengths = SignalNet(), []
    for conv in model.convs:
        conv.register_forward_hook(lambda _module, _args, out: lengths.append(tuple(out.shape[1:])))
    model(torch.randn(2, 1, 64))
    assert lengths == [(16, 64), (32, 32), (32, 32), (64, 16), (64, 16), (64, 8)]
    with pytest.raises(ValueError, match="kernel=4, expected an odd number"):
        SignalNet(kernel=4)


@every_network
@pytest.mark.parametrize("known", [True, False])
def test_every_layer_but_perhaps_the_first_has_a_prior(kind, known):
    make, shape, _ = NETWORKS[kind]
    stats = ([0.0] * shape[0], [1.0] * shape[0])
    model = kalmannorm.convert(make(), input_stats=stats if known else None)
    description = kalmannorm.describe(model, torch.randn(2, *shape))
    assert len(description.rows) == len(LAYERS if kind == "signals" else model.linears)
    assert [row.name for row in description.rows if row.reason] == ([] if known else ["norms.0"]), str(description)


@every_network
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("evonorm", "frn")])  # of images alone
def test_every_method_takes_a_step(kind, method):
    curve = Curve()
    quiet_trainer(3, curve).fit(classifier(kind, method), loader(*data(kind, 8), 2, 0))
    assert torch.isfinite(torch.tensor(curve.losses)).all()


@every_network
@pytest.mark.parametrize("method", ["bn", "kn"])
def test_a_classifier_learns_a_batch_by_heart(kind, method):
    curve = Curve()
    quiet_trainer(30, curve).fit(classifier(kind, method, statistics_batch=8), loader(*data(kind, 8), 8, 0))
    assert curve.losses[-1] < curve.losses[0] / 2


@every_network
@pytest.mark.parametrize("method", ["bn", "kn", "brn"])
def test_online_scores_are_of_two_that_normalize_themselves(kind, method):
    """Labels taken from such predictions score 1, and less in plain eval."""
    inputs, _ = data(kind, 64)
    module = classifier(kind, method)
    module.network.train()
    for _ in range(10):
        module.network(2 * inputs + 1)
    module.network.eval()
    with torch.no_grad():
        for layer in module.network.modules():
            if isinstance(layer, kalmannorm.KalmanNorm):
                layer.stats_batch_size = None
        with kalmannorm.online_statistics(module.network):
            labels = torch.cat([module.network(pair) for pair in inputs.split(2)]).argmax(1)
    batches = DataLoader(TensorDataset(inputs, labels), 32)
    (scores,) = quiet_trainer(1).validate(module, batches, verbose=False)
    assert scores["accuracy_online"] == 1.0
    assert scores["accuracy_running"] < 1.0


def test_batchnorm_is_what_they_are_built_with():
    for kind, (make, _, _) in NETWORKS.items():
        assert all(type(norm) is nn.BatchNorm1d for norm in make().norms), kind
