"""The figures show the numbers that they were given."""

import io
import math

import numpy as np
import pytest
import torch

from kalmannorm.lab import figures
from kalmannorm.lab.analysis import PriorError


def drawn(drawing):
    """The figure, after it was really drawn."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return drawing


def test_heat_maps_stand_side_by_side_on_one_logarithmic_scale():
    torch.manual_seed(0)
    names = [f"layer{i}" for i in range(9)]
    bn, kn = ({name: torch.rand(5, 3) * size for name in names} for size in (1.0, 0.1))
    kn["layer0"][0, 0] = 0
    *panels, bar = drawn(figures.variance_gaps({"BN": bn, "KN": {**kn, "more": kn["layer0"]}}, at_most=3)).axes
    assert [axes.get_title() for axes in panels[:2]] == ["BN", "KN"]
    assert [axes.get_ylabel() for axes in panels[::2]] == [f"layer{i}\nchannel" for i in (0, 4, 8)]
    images = [axes.images[0] for axes in panels]
    np.testing.assert_allclose(images[2].get_array(), bn["layer4"].T, rtol=1e-6)  # channels from top to bottom
    assert len({id(image.norm) for image in images}) == 1
    largest = max(float(gap.max()) for name, gap in bn.items() if name in ("layer0", "layer4", "layer8"))
    assert images[0].norm.vmax == pytest.approx(largest)
    assert images[0].norm.vmin >= largest / 1e4
    assert "moving variance" in bar.get_ylabel()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_gaps_that_are_all_alike_are_drawn_too(value):
    drawn(figures.variance_gaps({"BN": {"norm": torch.full((2, 2), value)}}))


def test_heat_maps_need_a_common_layer():
    gap = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"\['BN', 'KN'\] have no layer in common"):
        figures.variance_gaps({"BN": {"a": gap}, "KN": {"b": gap}})


def test_prior_errors_are_a_line_an_estimate():
    rows = [
        PriorError("first", "observation", "population", 0.5, 0.0, 0.1),
        PriorError("second", "prior", "population", 0.25, 0.3, 0.5),
        PriorError("second", "prior", "observation", 9.0, 9.0, 9.0),
        PriorError("second", "observation", "population", 0.75, -0.1, 0.1),
    ]
    means, ratios = drawn(figures.prior_errors(rows)).axes
    lines = {line.get_label(): line for line in means.lines}
    np.testing.assert_allclose(lines["observation"].get_ydata(), [0.5, 0.75])
    np.testing.assert_allclose(lines["prior"].get_xdata(), [1])
    assert "posterior" not in lines
    band = ratios.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.3 - 0.4, 0.3 + 0.4))
    assert [text.get_text() for text in means.get_xticklabels()] == ["first", "second"]


def test_many_layers_are_not_all_named():
    rows = [PriorError(f"layer{i}", "prior", "population", 1.0, 0.0, 0.1) for i in range(30)]
    means, _ = drawn(figures.prior_errors(rows)).axes
    assert "layer3" not in [text.get_text() for text in means.get_xticklabels()]


def test_the_search_is_a_line_an_arm_in_order_of_the_values():
    points = {"KN": [(0.1, 50.0), (0.01, 80.0)], "BN": []}
    (axes,) = drawn(figures.search(points, {"KN": "red", "BN": "blue"}, "rate")).axes
    assert axes.get_xlabel() == "rate"
    line, empty = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.01, 0.1], [80, 50])
    assert len(empty.get_xdata()) == 0
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.01", "0.1"]


def test_arms_are_means_with_bars_of_a_deviation():
    several = drawn(figures.arms({"BN": {"128": [90.0, 92.0], "2": [60.0]}, "KN": {"2": [88.0, 90.0]}}, "accuracy, %"))
    (axes,) = several.axes
    bn, kn = axes.containers
    np.testing.assert_allclose(np.asarray(bn[0].get_ydata(), float), [91, 60])
    np.testing.assert_allclose(np.asarray(bn[0].get_xdata(), float), [0, 1], atol=0.1)
    np.testing.assert_allclose(np.asarray(kn[0].get_ydata(), float), [89])
    (segment,) = kn[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [89 - math.sqrt(2), 89 + math.sqrt(2)])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["128", "2"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["BN", "KN"]
    (axes,) = drawn(figures.arms({"BN": {"all": []}, "KN": {"all": [88.0, 90.0]}}, "accuracy, %")).axes
    np.testing.assert_allclose(np.asarray(axes.containers[0][0].get_xdata(), float), [89])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["BN", "KN"]
