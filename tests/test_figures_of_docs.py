"""The figures of docs/how-it-works.md and of the README, and tables of results: the scripts make those that are
committed, and they show what the pages say.
"""

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DOCS = Path(__file__).parent.parent / "docs"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"figures_{name}", DOCS / "figures" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make():
    return loaded("make")


@pytest.fixture(scope="module")
def noise(make):
    return make.batch_noise(count=500, draws=200)


def test_the_script_makes_what_the_page_shows_and_the_same_again(make, noise, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "batch_noise", lambda: noise)
    pages = (DOCS / "how-it-works.md", DOCS / "architecture.md", DOCS.parent / "README.md")
    shown = {name for page in pages for name in re.findall(r"figures/(\w+\.svg)\)", page.read_text())}
    assert {path.name for path in (DOCS / "figures").glob("*.svg")} == shown
    first, second = make.main(tmp_path / "first"), make.main(tmp_path / "second")
    assert {path.name for path in first} == shown
    for one, other in zip(first, second, strict=True):
        text = one.read_text()
        assert text == other.read_text()
        assert "<text" in text, "letters as paths"
        assert len(text) < 100_000
        committed = (DOCS / "figures" / one.name).read_text()
        assert re.findall(r"<text[^>]*>([^<]*)", committed) == re.findall(r"<text[^>]*>([^<]*)", text), "make it again"


def test_noise_falls_with_the_images_and_not_with_their_pixels(make, noise):
    two = make.SIZES.index(2)
    for found in noise.values():
        # One image has the error of `worth` samples, n images that of n times as many.
        for size, error in zip(make.SIZES, found.mean, strict=True):
            assert error == pytest.approx(1 / math.sqrt(size * found.worth), rel=0.15)
        assert 0.28 < found.mean[two] < 0.38
    first, last = noise["first layer"], noise["last layer"]
    assert (first.pixels, last.pixels) == (256, 4)
    assert 3 < first.worth < 5
    assert 1.4 < math.exp(first.var[two]) < 1.6
    assert 2 < math.exp(last.var[two]) < 2.5


def test_the_update_is_the_mixture(make):
    for n, posterior in make.updates().items():
        q = n / (n + make.STRENGTH)
        assert float(posterior.mean) == pytest.approx(1.5 * q)
        assert float(posterior.var) == pytest.approx(1 - q + 0.36 * q + q * (1 - q) * 1.5**2)


def test_beliefs_agree_with_independent_draws_and_are_too_narrow_for_alike_ones(make):
    for stage in make.way():
        assert float(stage.independent.mean()) == pytest.approx(float(stage.belief.mean), abs=0.02)
        assert float(stage.independent.var()) == pytest.approx(float(stage.belief.var), rel=0.02)
        assert float(stage.smooth.var()) > 2 * float(stage.belief.var)


def test_depth_is_the_file_and_the_page_says_what_is_in_it(make):
    found = make.by_depth()
    means, ratios = ({name: torch.tensor(each[i]) for name, each in found.items()} for i in (0, 1))
    assert all(len(each) == 13 for each in means.values())
    narrow = {name: 1 / each[2:] for name, each in ratios.items()}
    assert 4.5 < float(narrow["prior"].min()) < float(narrow["prior"].max()) < 11
    assert 3 < float(narrow["posterior"].min()) < float(narrow["posterior"].max()) < 6
    assert float(ratios["observation"][2:].min()) > 5 / 6
    assert float(means["prior"].median()) < float(means["observation"].median()) * 1.2


def test_the_front_figure_is_of_the_files(make):
    scores = make.accuracies()
    wanted = {f"{key}-{size}" for key in make.METHODS for size in make.TOGETHER}
    others = [*make.STANDARDIZED.values(), *make.PROXIED.values()]
    wanted |= {make.RIVAL, *(arm for arms in others for arm in arms.values())}
    assert wanted <= set(scores)
    assert all(len(scores[arm]) >= 3 for arm in wanted)


def test_the_table_of_the_papers_figure_5_is_of_the_files(make):
    assert make.variance_gaps() == (DOCS / "results" / "figure5-cpu" / "table.md").read_text(), "make report"


def test_the_picture_of_a_comparisons_page_is_what_the_script_makes(tmp_path):
    made, committed = loaded("screenshot").main(tmp_path / "page.png"), DOCS / "figures" / "comparison.png"
    images = [Image.open(path) for path in (made, committed)]
    assert images[0].width == images[1].width
    assert images[0].height == pytest.approx(images[1].height, rel=0.1), "other fonts, or make it again"
    assert all(path.stat().st_size < 150_000 for path in (made, committed))
    assert "figures/comparison.png" in (DOCS / "notebooks" / "what-you-see.md").read_text()
