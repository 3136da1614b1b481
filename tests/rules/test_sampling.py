"""Values read in between pixels, against draws through the real functions."""


import pytest
import torch
import torch.nn.functional as F
from drawing import agree, believe, check_draws, check_unknown, covers, draw_through, samples, values
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import prior_of
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, deform_conv2d

import kalmannorm as kn
from kalmannorm.gaussian import Gaussian
from kalmannorm.recording import Recorder, attach
from kalmannorm.rules import RULES
from kalmannorm.rules.sampling import know_torchvision

know_torchvision()

_MODES = {1: ["nearest", "nearest-exact", "linear", "area"],
          2: ["nearest", "nearest-exact", "bilinear", "bicubic", "area"],
          3: ["nearest", "nearest-exact", "trilinear", "area"]}  # fmt: skip


@covers(F.interpolate, F.upsample)
@pytest.mark.parametrize("spatial", [1, 2, 3])
@given(data=st.data(), seed=st.integers(0, 99), groups=st.integers(1, 2))
@settings(max_examples=15)
def test_interpolate(function, spatial, data, seed, groups):
    modes = [m for m in _MODES[spatial] if m != "nearest-exact" or function is F.interpolate]
    mode = data.draw(st.sampled_from(modes))
    kwargs = {"mode": mode}
    space = data.draw(st.lists(st.integers(3, 7), min_size=spatial, max_size=spatial))
    if data.draw(st.booleans()):
        outs = data.draw(st.integers(2, 11) | st.lists(st.integers(2, 11), min_size=spatial, max_size=spatial))
        kwargs["size"] = outs
    else:
        scale = st.sampled_from([0.5, 1.5, 2, 3.0])
        kwargs["scale_factor"] = data.draw(scale | st.lists(scale, min_size=spatial, max_size=spatial))
    if mode.endswith(("linear", "cubic")):
        kwargs["align_corners"] = data.draw(st.booleans())
        if mode.startswith("bi") and function is F.interpolate and not kwargs["align_corners"]:
            kwargs["antialias"] = data.draw(st.booleans())
    n = samples(2 * max(11**spatial, 1), groups)
    x = believe((n, 2, *space), seed, groups)
    outputs = function(torch.zeros(1, 1, *space), **kwargs).numel()
    inputs = torch.Size(space).numel()
    # Neighbouring outputs blend the same inputs, of which edges count more than others.
    check_draws(function, x, **kwargs, groups=groups, effective=0.3**spatial * min(1, inputs / outputs))


def test_antialiased_resizing():
    check_draws(
        F.interpolate, believe((2**9, 2, 12, 12)), scale_factor=0.5, mode="bilinear", antialias=True, effective=0.3
    )


def test_resizing_pools_a_belief_that_varies_over_space():
    x = believe((6, 2, 4, 4), axes=(1, 2, 3))
    got, expected = (
        RULES[F.interpolate](each.of(x.shape), scale_factor=2, mode="bilinear") for each in (x, x.pool([2, 3]))
    )
    torch.testing.assert_close((got.mean, got.var), (expected.mean, expected.var))


# -- at known places -----------------------------------------------------------------------------------


def _prior_of_call(x, function):
    """The belief about the output of a call, and draws of it; the belief about its input is ``x``."""
    drawn = x.draw(x.shape, torch.Generator().manual_seed(0))
    with Recorder():
        attach(drawn, x, "layer")
        output = function(drawn)
        return prior_of(output, 1), output


@pytest.mark.parametrize("shape", [(2**9, 3, 8, 8), (2**6, 3, 6, 6, 6)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@covers(F.grid_sample)
def test_grid_sample(function, shape, mode):
    """At places all over the inner map."""
    grid = torch.rand(shape[0], *shape[2:], len(shape) - 2, dtype=torch.float64) * 1.4 - 0.7
    x = believe(shape, groups=2)
    belief, drawn = RULES[function](x, grid, mode), draw_through(function, (x, grid, mode), {"align_corners": False})
    agree(belief.of(drawn.shape), drawn, 2, effective=0.1)


@covers(torch.grid_sampler)
def test_grid_sampler(function):
    x = believe((4, 3, 5, 5))
    for mode, name in enumerate(("bilinear", "nearest")):
        first, second = RULES[function](x, None, mode, 0, False), RULES[F.grid_sample](x, None, name)
        assert torch.equal(first.var, second.var)
    check_unknown("grid_sample with mode='bicubic'", F.grid_sample, x, None, "bicubic")


def test_places_that_the_network_computes_count_as_known():
    x = believe((2, 3, 8, 8), dtype=torch.float32)

    def warped(h):
        theta = h.mean((2, 3)).cumsum(1).repeat(1, 2).view(2, 2, 3)  # of which nothing is believed
        return F.grid_sample(h, F.affine_grid(theta, (2, 3, 8, 8), align_corners=False), align_corners=False)

    belief, _ = _prior_of_call(x, warped)
    torch.testing.assert_close(belief.var[0], x.var[0, :, 0, 0] * 4 / 9)


def test_a_known_map_at_computed_places_is_no_constant():
    grid = believe((2, 8, 8, 2), dtype=torch.float32)
    belief, _ = _prior_of_call(grid, lambda g: F.grid_sample(torch.ones(2, 3, 8, 8), g, align_corners=False))
    assert isinstance(belief, kn.Unknown)


@covers(torch.ops.torchvision.roi_align)
def test_regions_of_interest(function):
    """Of one scale: regions as large as the output, some between pixels."""
    x = believe((64, 3, 16, 16), dtype=torch.float32)
    corners = torch.rand(64, 2) * 6
    boxes = torch.cat([torch.arange(64)[:, None], corners, corners + 7], 1)
    belief, output = _prior_of_call(x, lambda h: function(h, boxes, 1.0, 7, 7, 1, True))
    agree(Gaussian(belief.mean[..., None, None], belief.var[..., None, None], output.shape), output, effective=0.02)


@pytest.mark.parametrize(
    ("groups", "offset_groups", "masked"), [(1, 1, True), (2, 1, True), (1, 2, True), (2, 2, False)]
)
@covers(torch.ops.torchvision.deform_conv2d)
def test_deform_conv2d(function, groups, offset_groups, masked):
    """Without offsets, as training starts."""
    weight, bias = values(6, 4 // groups, 3, 3).float(), values(6).float()
    x, mask = believe((2**11, 4, 10, 10)), believe((2**11, 9 * offset_groups, 8, 8), 1)
    x, mask = (each.map(torch.Tensor.float).of(each.shape) for each in (x, mask))
    generator = torch.Generator().manual_seed(0)
    with Recorder():
        h, m = (each.draw(each.shape, generator) for each in (x, mask))
        attach(h, x, "layer")
        attach(m, mask, "layer")
        offsets = torch.zeros(2**11, 18 * offset_groups, 8, 8)
        output = function(h, weight, offsets, m, bias, 1, 1, 0, 0, 1, 1, groups, offset_groups, masked)
        belief = prior_of(output, 1)
    agree(Gaussian(belief.mean[..., None, None], belief.var[..., None, None], output.shape), output, effective=0.02)


def test_deform_conv2d_with_a_mask_in_numbers():
    x, weight = believe((4, 2, 6, 6), dtype=torch.float32), values(3, 2, 3, 3).float()
    mask = torch.full((4, 9, 4, 4), 0.5)
    halved, _ = _prior_of_call(x, lambda h: deform_conv2d(h, torch.zeros(4, 18, 4, 4), weight, mask=mask))
    whole, _ = _prior_of_call(x, lambda h: F.conv2d(h, weight / 2))
    torch.testing.assert_close((halved.mean, halved.var), (whole.mean, whole.var))


class _Pyramid(nn.Module):
    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8, 8)
        )

    def forward(self, x):
        levels = {}
        for i, stage in enumerate(self.stages):
            x = levels[str(i)] = stage(x)
        return levels


@pytest.mark.parametrize("compiled", [False, True])
def test_every_layer_of_a_detector_has_a_prior(compiled):
    """Also the first of its head, whose rows are put together from several levels."""
    names = ["0", "1", "2"]
    head = FastRCNNConvFCHead((8, 5, 5), [8, 8], [16], norm_layer=nn.BatchNorm2d)
    model = kn.convert(
        FasterRCNN(_Pyramid(), min_size=96, max_size=96, box_head=head, box_predictor=FastRCNNPredictor(16, 2),
                   rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3),
                   box_roi_pool=MultiScaleRoIAlign(names, 5, 2, canonical_scale=24, canonical_level=2)),
        input_stats=(torch.zeros(3), torch.ones(3)),
    )  # fmt: skip
    boxes = torch.tensor([[10.0, 10, 20, 20], [5, 5, 80, 80], [20, 20, 55, 50]])
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    targets = [{"boxes": boxes, "labels": torch.ones(3, dtype=torch.long)} for _ in images]
    if compiled:
        model.roi_heads.box_head.compile(backend="aot_eager")
        sum(model(images, targets).values()).backward()
    rows = kn.describe(model, images, targets).rows
    assert [row.reason for row in rows] == [""] * 5
    assert set(rows[3].prior_from) == {f"backbone.stages.{i}.1" for i in range(3)}
