"""Models as their users build them: converted, described, trained for a step, deployed."""

import dataclasses
from functools import partial

import pandas as pd
import pytest
import timm
import torch
from networks import made_of
from torch import nn

import kalmannorm as kn
from benchmarks.coverage import TIMM, Coverage, Subject, cover, main, page, read, subjects
from benchmarks.coverage_networks import NETWORKS, Network, graph
from kalmannorm.rules import RULES, aliases

# One of each kind of building block, small enough for every run of the tests; `python -m benchmarks.coverage` runs all.
_QUICK = """
    torchvision/densenet121 torchvision/efficientnet_b0 torchvision/googlenet torchvision/mnasnet0_5
    torchvision/mobilenet_v2 torchvision/mobilenet_v3_small torchvision/regnet_y_400mf torchvision/resnet18
    torchvision/shufflenet_v2_x0_5 torchvision/lraspp_mobilenet_v3_large torchvision/deeplabv3_mobilenet_v3_large
    torchvision/raft_large torchvision/ssdlite320_mobilenet_v3_large torchvision/r3d_18
    timm/repvgg_a0 timm/cs3darknet_focus_s timm/dla46x_c timm/dpn48b timm/efficientformerv2_s0 timm/efficientnet_b0
    timm/efficientvim_m1 timm/ghostnet_050 timm/hrnet_w18_small timm/iformer_t timm/levit_128s
    timm/mobilenetv4_conv_small_035 timm/mobilevit_xxs timm/mobilevitv2_050 timm/regnetx_002 timm/repghostnet_050
    timm/resnest14d timm/resnet10t timm/resnetv2_18 timm/shvit_s1 timm/skresnet18 timm/swiftformer_xs
    timm/ese_vovnet19b_slim_dw timm/xcit_nano_12_p16_224
""".split()  # noqa: SIM905 - a list of one name a line would fill a screen
_KNOWN = {f"{each.library}/{each.name}": each for each in subjects()}


# The rest of timm's families, but for those that take long or have layers without a prior.
_REST = sorted({f"timm/{name}" for name in TIMM} - set(_QUICK) - {
    "timm/halonet_h1", "timm/inception_v4", "timm/inception_resnet_v2", "timm/nasnetalarge",
    "timm/pnasnet5large", "timm/vgg11_bn", "timm/vit_small_resnet50d_s16_224",
})  # fmt: skip


# Their layers are of the images' size, but can be made for smaller ones.
_SIZED = ("botnet26t_256", "coatnet_bn_0_rw_224", "coatnet_pico_rw_224", "maxvit_rmlp_pico_rw_256", "volo_d1_224")


def small(name):
    """A model for images of 64 pixels where it can be built so, and for short videos."""
    known = _KNOWN[name]
    network = None
    if known.task == "video":
        network = Network(known.task, known.build, (3, 4, 32, 32))
    if known.name in _SIZED:
        network = Network(known.task, partial(timm.create_model, known.name, img_size=64))
    return dataclasses.replace(known, network=network or known.network)


@pytest.mark.parametrize("name", [*_QUICK, *[pytest.param(name, marks=pytest.mark.slow) for name in _REST]])
def test_every_layer_has_a_prior(name):
    found = cover(small(name))
    assert found.reasons == ""
    assert found.with_prior == found.layers > 0
    assert found.left_alone == 0
    assert found.not_called == 0
    assert found.step == "ok"
    assert found.deployed <= 1e-6


def test_what_cannot_be_followed_is_reported(monkeypatch):
    for function in aliases("div", "__truediv__"):
        monkeypatch.delitem(RULES, function)
    found = cover(_KNOWN["timm/efficientvit_b0"])
    assert found.reasons == "no rule for torch.Tensor.div (4)"
    assert found.with_prior == found.layers - 4


def test_large_models_on_the_meta_device():
    found = cover(_KNOWN["torchvision/vgg11_bn"])
    assert (found.device, found.step) == ("meta", "meta")
    assert found.with_prior == found.layers == 8


def test_models_without_batch_norm_are_passed_over():
    assert cover(_KNOWN["torchvision/squeezenet1_1"]) is None


def test_timm_knows_the_models():
    missing = [name for name in TIMM if not timm.is_model(name)]
    assert not missing
    assert len(set(TIMM)) == len(TIMM)


def test_a_model_that_fails_is_reported(monkeypatch):
    def build(subject):
        return made_of(lambda self, x: self.norm(x) * float("inf"), norm=nn.BatchNorm2d(3), unused=nn.BatchNorm2d(3))

    monkeypatch.setattr(Subject, "build", build)
    found = cover(Subject("mine", "broken", "classification"))
    assert "is not finite" in found.step
    assert found.not_called == 1
    assert found.reasons == "the layer was not called (1)"


def test_the_command_writes_a_table_and_a_page(tmp_path, capsys):
    main(["--output", str(tmp_path), "--only", "torchvision/(mobilenet_v3_small|mnasnet0_5)$"])
    assert [row.model for row in read(tmp_path / "coverage.csv")] == ["mnasnet0_5", "mobilenet_v3_small"]
    text = (tmp_path / "coverage.md").read_text()
    assert "**86 of 86 layers (100.00 %) of 2 models have a prior by rule.**" in text
    assert "| torchvision | classification | mnasnet0_5 | 64 | 52 of 52 | ok |" in text
    assert "86 of 86" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "nothing like it"])
    assert "no model matches 'nothing like it'" in capsys.readouterr().err


def test_rows_of_other_models_stay(tmp_path):
    other = Coverage("l", "m", "t", 64, "cpu", 9, 5, 1, 0, 0, "no rule for f (3); masked (1)", "ok", 0.0, 1.0, "p 2")
    pd.DataFrame([other]).to_csv(tmp_path / "coverage.csv", index=False)
    for _ in range(2):
        main(["--output", str(tmp_path), "--only", "torchvision/mnasnet0_5$"])
    kept, new = read(tmp_path / "coverage.csv")
    assert kept == other
    assert (new.model, new.with_prior) == ("mnasnet0_5", 52)
    text = (tmp_path / "coverage.md").read_text()
    assert "| l | 1 | 5 of 9 (55.56 %) |\n| torchvision | 1 | 52 of 52 (100.00 %) |" in text
    assert "| no rule for f | 3 | m |" in text


@pytest.mark.parametrize("name", ["monai/UNet", "torch_geometric/GCN", "transformers/ResNet", "ultralytics/yolov8n"])
def test_networks_of_other_packages(name):
    pytest.importorskip(name.split("/")[0])
    found = cover(_KNOWN[name])
    assert found.with_prior == found.layers > 0
    assert (found.step, found.reasons) == ("ok", "")
    assert found.deployed <= 1e-6


def test_graphs_are_separate_and_sequences_shorter():
    nodes, edges = graph(torch.randn(3, 5, 2))
    assert nodes.shape == (15, 2)
    assert torch.equal(edges[0] // 5, edges[1] // 5)
    assert set((edges // 5).flatten().tolist()) == {0, 1, 2}
    x, lengths = NETWORKS["torchaudio"]["Conformer"].call(torch.randn(2, 40, 8))
    assert (x.shape, lengths.tolist()) == ((2, 40, 8), [40, 30])


def test_the_page_lists_reasons():
    row = Coverage("l", "m", "t", 64, "cpu", 9, 5, 1, 0, 0, "no rule for f (3); masked (1)", "ok", 0.0, 1.0, "torch 2")
    text = page([row, row])
    assert "| no rule for f | 6 | m, m |" in text
    assert "| masked | 2 | m, m |" in text


def test_in_place_of_timms_layers():
    """State-dict keys, attributes, `eval()` output and the way back."""
    torch.manual_seed(0)
    model = timm.create_model("regnetx_002", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    keys, before = set(model.state_dict()), model(x)
    kinds = [type(layer) for layer in model.modules()]
    kn.convert(model)
    layer = model.stem.bn
    assert type(layer) is kn.KalmanNormAct2d
    assert isinstance(layer.act, nn.ReLU)
    assert {key.rpartition(".")[2] for key in set(model.state_dict()) - keys} == {
        "gain", "process_noise", "prior_shift", "prior_scale",
    }  # fmt: skip
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    kn.to_batchnorm(model)
    assert [type(layer) for layer in model.modules()] == kinds
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sync", "frozen", "group", "group1", "plain group"])
def test_relatives_of_timms_layers(kind):
    from timm.layers import BatchNormAct2d, GroupNorm, GroupNorm1Act, GroupNormAct, freeze_batch_norm_2d
    from timm.layers.norm_act import convert_sync_batchnorm

    torch.manual_seed(0)
    groups = {"group": GroupNormAct(4, 2), "group1": GroupNorm1Act(4), "plain group": GroupNorm(4, 2)}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), groups.get(kind) or BatchNormAct2d(4, act_layer=nn.SiLU))
    if kind == "sync":
        convert_sync_batchnorm(model)
    if kind == "frozen":
        freeze_batch_norm_2d(model)
    x, options = torch.randn(2, 3, 6, 6), {"layers": ("group",), "gain": 1.0} if "group" in kind else {}
    model.eval()
    before, original = model(x), type(model[1])
    kn.convert(model, **options)
    assert isinstance(model[1], kn.GroupKalmanNorm if "group" in kind else kn.KalmanNormAct2d)
    torch.testing.assert_close(model(x), before)
    kn.to_batchnorm(model)
    # A frozen layer's buffers have become parameters: torch.nn's layers, one after the other.
    assert type(model[1]) is (nn.Sequential if kind == "frozen" else original)
    torch.testing.assert_close(model(x), before)
