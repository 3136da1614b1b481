"""A trained ResNet's weights in a detector: all but the classifier's, or an error that names what differs."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

import kalmannorm
from kalmannorm.lab.baselines.group import to_groupnorm
from kalmannorm.lab.detection import Detector
from kalmannorm.lab.models.detection import mask_rcnn_c4, mask_rcnn_fpn
from kalmannorm.lab.pretrained import resnet_of, trained_weights

both = pytest.mark.parametrize("make", [mask_rcnn_c4, mask_rcnn_fpn])


def trained(normalize=lambda network: network):
    """A ResNet whose every tensor differs from a fresh one's."""
    network = normalize(resnet50(num_classes=5))
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.add_(1)
    return network


def write(network, path, checkpoint=False):
    state = network.state_dict()
    if checkpoint:
        state = {"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
    torch.save(state, path)
    return str(path)


def assert_taken_over(detector, network):
    own = resnet_of(detector.network).state_dict()
    theirs = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    assert {"conv1.weight", "layer4.2.bn3.weight"} <= set(own) <= set(theirs)
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
    state = resnet50().state_dict()
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
