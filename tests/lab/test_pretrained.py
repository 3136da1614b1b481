"""Trained weights in a detector or a classifier: all but its head's, or an error that names what differs."""

import pytest
import torch
from torch import nn

import kalmannorm
from kalmannorm.lab.baselines.stock import to_groupnorm
from kalmannorm.lab.detection import Detector
from kalmannorm.lab.models import detection
from kalmannorm.lab.models.cifar_resnet import CifarResNet
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn
from kalmannorm.lab.pretrained import resnet
from kalmannorm.lab.training import Classifier
from kalmannorm.traversal import kalman_layers

pytestmark = pytest.mark.usefixtures("shallow")


def small(num_classes=5, depth=8):
    return CifarResNet(depth, num_classes, width=4)


def trained(make, replace=lambda network: network):
    """A network to start one of `make` from: of other classes, and with BatchNorm or what replaced it."""
    return changed(replace(small(3) if make is small else detection.resnet50(num_classes=7)))


def changed(network):
    """Every tensor differs from a fresh one's."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(1 if tensor.is_floating_point() else 30)
    return network


def write(network, path, checkpoint=False):
    state = network.state_dict()
    if checkpoint:
        state = {"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(state, path)
    return str(path)


# What BatchNorm's state dict does not share with a method's.
OF_ONE_ALONE = {
    "gn": {"running_mean", "running_var", "num_batches_tracked"},
    "kn": {"gain", "process_noise", "prior_scale", "prior_shift"},
}


@pytest.mark.parametrize(
    ("method", "replace", "checkpoint"),
    [
        ("bn", None, True), ("frozen", None, False), ("frozen", None, True), ("kn", None, False), ("gn", None, True),
        ("kn", kalmannorm.convert, True), ("gn", to_groupnorm, False),
    ],
    ids=["bn", "frozen", "frozen from a run", "kn", "gn", "kn from kn", "gn from gn"],
)  # fmt: skip
@pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn, small])
def test_all_but_the_head_starts_from_weights_of_batchnorm_or_of_the_method_itself(
    make, method, replace, checkpoint, tmp_path
):
    before = trained(make, replace) if replace else trained(make)
    network, weights = make(5), write(before, tmp_path / "r.pt", checkpoint)
    if make is small:
        head = network.classifier.weight.clone()
        part = Classifier(network, method, weights=weights, num_classes=5, statistics_batch=2).network
        assert torch.equal(part.classifier.weight, head)
    else:
        part = resnet(Detector(network, method, weights=weights).network)[0]
    own, theirs = (
        {name: value for name, value in each.state_dict().items() if not name.startswith(("fc.", "classifier."))}
        for each in (part, before)
    )
    assert {"conv.weight" if make is small else "layer4.0.bn3.weight"} <= own.keys() & theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own.keys() & theirs.keys())
    # What is converted has the weights already: the priors are corrected by their statistics.
    assert all(layer.awaits_correction != bool(replace) for _, layer in kalman_layers(part) if make is small)
    differ = {name.rpartition(".")[2] for name in own.keys() ^ theirs.keys()}
    assert differ == (set() if replace else OF_ONE_ALONE.get(method, set()))


@pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn])
def test_weights_that_differ_are_named(make, tmp_path):
    file = write(trained(make, kalmannorm.convert), tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"weights: bn1\.\w+ is .* there; expected absent"):
        Detector(make(3), "frozen", weights=file)
    state = detection.resnet50().state_dict()
    state["layer4.0.conv1.weight"] = torch.zeros(2, 2)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"layer4\.0\.conv1\.weight is \(2, 2\) there; expected \(512, 1024, 1, 1\)"):
        Detector(make(3), weights=file)


def test_files_that_are_none_are_named(tmp_path):
    (tmp_path / "text").write_text("text")
    torch.save([nn.Parameter(torch.ones(2))], tmp_path / "list")
    for name, words in (
        ("absent", "no file .*absent"),
        ("text", "text holds no state"),
        ("list", "list holds no state"),
    ):
        with pytest.raises(ValueError, match=words):
            Classifier(small(), weights=str(tmp_path / name), num_classes=5)


def test_weights_that_are_not_a_classifier_s_are_named(tmp_path):
    weights = write(small(depth=14), tmp_path / "r.pt")
    with pytest.raises(
        ValueError, match=r"weights: stages\.0\.1\.\S+ is \(.* there; expected absent, as in the network"
    ):
        Classifier(small(), weights=weights, num_classes=5)
    with pytest.raises(ValueError, match=r"weights: Conv2d has no head to leave out: expected a linear layer"):
        Classifier(nn.Conv2d(3, 5, 3), weights=weights, num_classes=5)
