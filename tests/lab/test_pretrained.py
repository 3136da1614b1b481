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
from kalmannorm.lab.pretrained import resnet, trained_weights
from kalmannorm.lab.training import Classifier

both = pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn])
pytestmark = pytest.mark.usefixtures("shallow")


def changed(network):
    """Every tensor differs from a fresh one's."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(1 if tensor.is_floating_point() else 30)
    return network


def trained(normalize=lambda network: network):
    return changed(normalize(detection.resnet50(num_classes=5)))


def write(network, path, checkpoint=False):
    state = network.state_dict()
    if checkpoint:
        state = {"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(state, path)
    return str(path)


def assert_taken_over(detector, network):
    own = resnet(detector.network)[0].state_dict()
    theirs = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    assert {"conv1.weight", "layer4.0.bn3.weight"} <= set(own) <= set(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    return set(theirs) - set(own)


@both
@pytest.mark.parametrize("checkpoint", [False, True])
def test_batchnorm_weights_go_into_frozen_layers(make, checkpoint, tmp_path):
    network = trained()
    detector = Detector(make(3), "frozen", weights=write(network, tmp_path / "r.pt", checkpoint))
    assert not assert_taken_over(detector, network)


@both
def test_batchnorm_weights_keep_their_scales_under_other_methods(make, tmp_path):
    network = trained()
    detector = Detector(make(3), "gn", weights=write(network, tmp_path / "r.pt"))
    assert all("running" in name or "tracked" in name for name in assert_taken_over(detector, network))


@both
@pytest.mark.parametrize("method", ["kn", "gn"])
def test_weights_of_the_method_itself_are_loaded_after_the_conversion(make, method, tmp_path):
    replace = {"kn": kalmannorm.convert, "gn": to_groupnorm}
    network = trained(replace[method])
    detector = Detector(make(3), method, weights=write(network, tmp_path / "r.pt"))
    assert not assert_taken_over(detector, network)


@both
def test_weights_that_differ_are_named(make, tmp_path):
    file = write(trained(kalmannorm.convert), tmp_path / "r.pt")
    with pytest.raises(ValueError, match=r"weights: bn1\.\w+ is .* there; expected absent"):
        Detector(make(3), "frozen", weights=file)
    state = detection.resnet50().state_dict()
    state["layer4.0.conv1.weight"] = torch.zeros(2, 2)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"layer4\.0\.conv1\.weight is \(2, 2\) there; expected \(512, 1024, 1, 1\)"):
        Detector(make(3), weights=file)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*absent"):
        trained_weights(tmp_path / "absent")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="text holds no state dict"):
        trained_weights(tmp_path / "text")
    torch.save([nn.Parameter(torch.ones(2))], tmp_path / "list")
    with pytest.raises(ValueError, match="list holds no state dict"):
        trained_weights(tmp_path / "list")


def small(num_classes=5, depth=8):
    return CifarResNet(depth, num_classes, width=4)


def trunk(network):
    return {name: value for name, value in network.state_dict().items() if not name.startswith("classifier.")}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("method", ["bn", "frozen", "kn"])
def test_a_classifier_starts_from_batchnorm_s_weights_with_a_new_head(tmp_path, checkpoint, method):
    before, network = changed(small(3)), small()
    head = network.classifier.weight.clone()
    weights = write(before, tmp_path / "r.pt", checkpoint)
    started = Classifier(network, method, weights=weights, num_classes=5, statistics_batch=2).network
    own, theirs = trunk(started), trunk(before)
    assert {"conv.weight", "norm.running_var", "last_norm.weight"} <= set(own) & set(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in set(own) & set(theirs))
    assert torch.equal(started.classifier.weight, head)


def test_the_network_has_its_weights_before_the_method_comes(tmp_path, monkeypatch):
    weights = write(changed(small()), tmp_path / "r.pt")
    seen = []

    def normalized(network, method, **options):
        seen.append((method, network.norm.num_batches_tracked.item(), network.norm.running_var.tolist()))
        return network

    monkeypatch.setattr("kalmannorm.lab.training.normalize", normalized)
    Classifier(small(), "kn", weights=weights, num_classes=5)
    assert seen == [("kn", 30, [2.0] * 4)]


def test_a_classifier_starts_from_weights_of_the_method_itself(tmp_path):
    trained_network = changed(to_groupnorm(small(3), 4))
    weights = write(trained_network, tmp_path / "r.pt")
    started = Classifier(small(), "gn", weights=weights, normalization_options={"groups": 4}, num_classes=5).network
    own, theirs = trunk(started), trunk(trained_network)
    assert set(own) == set(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_weights_that_are_not_a_classifier_s_are_named(tmp_path):
    weights = write(small(depth=14), tmp_path / "r.pt")
    with pytest.raises(
        ValueError, match=r"weights: stages\.0\.1\.\S+ is \(.* there; expected absent, as in the network"
    ):
        Classifier(small(), weights=weights, num_classes=5)
    with pytest.raises(ValueError, match=r"weights: Conv2d has no head to leave out: expected a linear layer"):
        Classifier(nn.Conv2d(3, 5, 3), weights=weights, num_classes=5)
    with pytest.raises(ValueError, match=r"no file .*absent"):
        Classifier(small(), weights=str(tmp_path / "absent"), num_classes=5)
