"""The figures show the numbers that they were given."""

import io
import math

import numpy as np
import pytest
import torch

from kalmannorm.lab import figures


def drawn(drawing):
    """The figure, after it was really drawn."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=40)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return drawing


def test_heat_maps_stand_below_one_another_on_one_logarithmic_scale():
    torch.manual_seed(0)
    gaps = {f"layer{i}": torch.rand(5, 3) for i in range(9)}
    gaps["layer0"][0, 0] = 0
    *panels, bar = drawn(figures.variance_gaps("2 images", gaps, at_most=3)).axes
    assert panels[0].get_title() == "2 images"
    assert [axes.get_ylabel() for axes in panels] == [f"layer{i}\nchannel" for i in (0, 4, 8)]
    images = [axes.images[0] for axes in panels]
    np.testing.assert_allclose(images[1].get_array(), gaps["layer4"].T, rtol=1e-6)  # channels from top to bottom
    assert len({id(image.norm) for image in images}) == 1
    largest = max(float(gaps[name].max()) for name in ("layer0", "layer4", "layer8"))
    assert images[0].norm.vmax == pytest.approx(largest)
    assert images[0].norm.vmin >= largest / 1e4
    assert "moving variance" in bar.get_ylabel()


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_gaps_that_are_all_alike_are_drawn_too(value):
    drawn(figures.variance_gaps("BN", {"norm": torch.full((2, 2), value)}))


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
