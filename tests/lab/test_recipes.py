"""Recipes: every YAML file is whole, merges as it says, and trains what its table names."""

import re

import pytest
import yaml

from kalmannorm.lab import recipes, study_file
from kalmannorm.lab.computed import parameters
from kalmannorm.lab.costs import build
from kalmannorm.lab.recipes import merge, names, read, tables
from kalmannorm.lab.tables import Cell, layout

EVERY = [name for table in tables() for name in names(table)]
PAPER = ["table1", "table2", "table3", "table4", "table5", "table7", "table8", "figure3", "figure4", "figure5"]


def init_args(config, part="model"):
    return config[part]["init_args"]


def test_every_table_and_figure_of_the_paper_is_there():
    assert set(PAPER) | {"arxiv-v1", "peers"} <= set(tables())
    assert len(names("table8")) == 24


@pytest.mark.parametrize("name", [name for name in EVERY if name.partition("/")[0] in PAPER])
def test_a_cell_has_its_place_and_can_be_scaled(name):
    recipe = read(name)
    cell = Cell(recipe, recipe.config)
    order = yaml.safe_load((recipes.CONFIGS / recipe.cell["table"] / "table.yaml").read_text())
    assert recipe.cell["table"] == name.partition("/")[0]
    for _, row, column in cell.places():
        assert row in order["rows"]
        assert column in order["columns"]
    shown = {metric for metric, _, _ in cell.places()}
    assert set(recipe.cell.get("reported", {})) <= shown
    if "baseline" in recipe.cell:
        assert read(recipe.cell["baseline"]).cell["table"] == recipe.cell["table"]
    assert recipe.scaled("tiny")["trainer"]["max_steps"] <= 10
    assert init_args(recipe.config, "data")["gradient_batch"] % init_args(recipe.config)["statistics_batch"] == 0


def test_tables_are_full():
    """Nothing but what the paper leaves out is empty."""
    cells = [Cell(recipe, recipe.config) for recipe in map(read, names("table8"))]
    order = layout("table8", cells)
    places = [(row, column) for cell in cells for _, row, column in cell.places()]
    assert (len(order.rows), len(order.columns), len(places), len(set(places))) == (9, 5, 24, 24)


def test_every_network_can_be_built_as_it_is_and_tiny():
    import torch

    built = set()
    for config in (read(name).scaled(scale) for name in EVERY for scale in (1.0, "tiny")):
        given = init_args(config)
        key = repr([given.get(name) for name in ("network", "normalization", "normalization_options")])
        if config["model"]["class_path"].endswith("Classifier") and key not in built:
            with torch.device("meta"):
                build(config, "model")
            built.add(key)
    assert len(built) > 40


@pytest.mark.parametrize("name", names("table2"))
def test_parameters_are_those_of_table_2(name):
    recipe = read(name)
    assert round(parameters(recipe.config)["parameters"], 2) == recipe.cell["reported"]["parameters"]


def test_the_width_compensated_network_has_as_many_parameters_as_kn():
    wide, kn = (parameters(read(f"arxiv-v1/inception-v2-32-256-{name}").config) for name in ("bn-wide", "kn"))
    assert wide["parameters"] == 11.294498
    assert abs(wide["parameters"] - kn["parameters"]) < 0.001


def test_methods_on_the_same_network_and_data_have_one_rate_and_schedule_but_for_weight_normalization():
    """As docs/laboratory.md says."""
    found = {}
    for recipe in map(read, EVERY):
        given, data = init_args(recipe.config), init_args(recipe.config, "data")
        rate, method = given["rate"], given.get("normalization")
        if method == "wn":
            assert (rate, recipe.cell["table"] in ("table8", "peers")) == (0.001, True)
            continue
        key = (recipe.cell["table"], repr(given["network"]), repr(data), recipe.config["trainer"]["accelerator"])
        found.setdefault(key, set()).add((rate, given["schedule"], repr(given.get("milestones"))))
    assert len(found) > 20
    assert {len(ways) for ways in found.values()} == {1}


def test_the_paper_schedule_on_cifar():
    """Rate 0.1, from epoch 82 on 0.01, from 123 on 0.001, from 300 on 0.0002, to epoch 400."""
    from kalmannorm.lab.optimization import share_of_rate

    recipe = read("table8/resnet32-kn-bs2")
    given = init_args(recipe.config)
    steps = recipe.config["trainer"]["max_steps"]
    assert steps == 400 * 50_000 / 128
    epochs = {0: 0.1, 81: 0.1, 83: 0.01, 122: 0.01, 124: 0.001, 299: 0.001, 301: 0.0002, 399: 0.0002}
    for epoch, rate in epochs.items():
        share = share_of_rate(round(epoch / 400 * steps), steps, given["schedule"], given["milestones"])
        assert share * given["rate"] == pytest.approx(rate)


def test_groups_do_not_follow_from_a_default():
    """Of recipes and studies alike: results that are kept must not change their meaning with `to_groupnorm`."""
    configs = {name: read(name).config for name in EVERY}
    configs |= {f"{name}/{arm.name}": arm.recipe.config for name in study_file.names()
                for arm in study_file.read(name).arms}  # fmt: skip
    found = {name: init_args(config) for name, config in configs.items()
             if init_args(config).get("normalization") in ("gn", "gkn")}  # fmt: skip
    groups = {name: given.get("normalization_options", {}).get("groups") for name, given in found.items()}
    assert groups["table8/resnet32-gn-bs2"] == groups["figure4/resnet32-gkn"] == groups["batch-sizes-cpu/gn-2"] == 4
    assert groups["table1/resnet50-gn"] == 32
    assert None not in groups.values()


IMAGENET = [name for name in EVERY if init_args(read(name).config, "data").get("folder") == "imagenet"]


@pytest.mark.parametrize("name", [name for name in IMAGENET if isinstance(read(name).cell["note"], dict)])
def test_a_note_tells_how_long_a_training_is(name):
    recipe = read(name)
    words = re.findall(r"([\d,]+) steps of (\d+) images \(([\d.]+) epochs\)", " ".join(recipe.notes))
    steps, images = recipe.config["trainer"]["max_steps"], init_args(recipe.config, "data")["gradient_batch"]
    assert words == [(f"{steps:,}", str(images), f"{float(f'{steps * images / 1_281_167:.2g}'):g}")]
    assert not re.search(r"\d epochs", " ".join(recipe.notes).replace(f"({words[0][2]} epochs)", ""))


def test_several_bases_and_theirs_are_merged_in_order():
    given = init_args(read("table8/inception-svhn-bn-bs128").config)
    assert given["statistics_batch"] == 128
    assert given["network"]["class_path"].endswith("CifarInception")
    assert init_args(read("table8/inception-svhn-bn-bs128").config, "data")["name"] == "svhn_extra"
    assert len(read("table8/inception-svhn-bn-bs128").notes) >= 3


def test_a_run_of_another_recipe_is_that_training_in_another_place():
    own, shown = read("table8/inception-cifar10-kn-bs2"), read("table7/inception-kn-bs2")
    assert (shown.config, shown.tiny, shown.run) == (own.config, own.tiny, own.name)
    assert own.run == own.name
    assert shown.cell["table"] == "table7"
    assert shown.cell["note"] == own.cell["note"]


def test_merging_replaces_all_but_mappings_and_changes_neither():
    base, over = {"a": {"b": [1], "c": 2}, "d": 3}, {"a": {"b": [4, 5]}, "d": {"e": 6}}
    assert merge(base, over) == {"a": {"b": [4, 5], "c": 2}, "d": {"e": 6}}
    assert base == {"a": {"b": [1], "c": 2}, "d": 3}
    merge(base, over)["a"]["b"].append(7)
    assert over["a"]["b"] == [4, 5]


def test_a_scale_multiplies_lengths_and_nothing_else():
    recipe = read("table8/resnet32-kn-bs2")
    scaled = recipe.scaled(0.05)
    assert (scaled["trainer"]["max_steps"], scaled["trainer"]["val_check_interval"]) == (7812, 100)
    assert scaled["checkpoint_every"] == 100
    assert scaled["model"] == recipe.config["model"]
    assert recipe.scaled(1e-9)["trainer"]["max_steps"] == 1
    with pytest.raises(ValueError, match=r"above 0; got -1"):
        recipe.scaled(-1)


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 5}\nmodel: {a: 1}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrainer: {max_steps: 7}\ntiny: {model: {a: 2}}\n")
    recipe = read(tmp_path / "mine.yaml")
    assert (recipe.name, recipe.config) == ("mine", {"trainer": {"max_steps": 7}, "model": {"a": 1}})
    assert recipe.scaled("tiny")["model"] == {"a": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [("base: [gone.yaml]", "gone.yaml"), ("- a", "keys and values; got list"), ("a: [", "not YAML")],
)
def test_a_file_that_is_none_is_named_in_one_line(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        read(tmp_path / "mine.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("table8/resnet32", ["'table8/resnet32'", "table8/resnet32-kn-bs2"]),
        ("table99/x", ["'table99/x'", "table8"]),
        ("bases/cifars", ["table8"]),
    ],
)
def test_an_unknown_recipe_lists_the_known_ones(name, words):
    with pytest.raises(ValueError, match="no recipe") as raised:
        read(name)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_an_unknown_table_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no table 'table9'; known are .*table8"):
        names("table9")
