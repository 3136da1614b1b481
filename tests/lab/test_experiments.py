"""Experiments' files: what they may say, and that those that come along train what the paper's tables name."""

import re
import sys

import pytest
import torch
import yaml

from kalmannorm.lab.availability import data_at, missing_data
from kalmannorm.lab.configuration import Run, flat
from kalmannorm.lab.costs import parameters, without_memory
from kalmannorm.lab.experiments import config_of, merge, names, read, tables
from kalmannorm.lab.optimization import share_of_rate

PAPER = [*(f"table{number}" for number in range(1, 9)), "figure3", "figure4", "figure5"]
EVERY = {f"{name}/{arm.name}": arm for name in tables() for arm in read(name).arms}
RATE = "model.init_args.rate"


def init_args(config, part="model"):
    return config[part]["init_args"]


def of(normalization, **others):
    return {"model": {"normalization": normalization}, **others}


STUDY = {
    "title": "Small batches",
    "question": "Which one?",
    "base": "base.yaml",
    "search": {RATE: [0.01, 0.02, 0.03]},
    "seeds": 2,
    "arms": {"bn-2": of("bn", label="BN", column=2), "kn-2": of("kn", label="KN", column=2)},
}


@pytest.fixture
def written(writes):
    return writes(STUDY)


def test_every_table_and_figure_of_the_paper_is_there_under_a_name_of_its_own():
    assert set(PAPER) | {"arxiv-v1", "peers-inception", "variants"} <= set(tables())
    assert len([arm for arm in read("table8").arms if arm.form in ("", "paper")]) == 24
    assert len(set(names())) == len(names())


def test_each_number_of_the_paper_has_a_place_of_its_own():
    for name in PAPER:
        found = read(name)
        places = [place for arm in found.arms for place in arm.places(found.metric)]
        assert len({(row, column) for _, row, column in places}) == len(places), name
        for arm in found.arms:
            assert set(arm.reported) <= {metric for metric, _, _ in arm.places(found.metric)}, (name, arm.name)
            assert arm.baseline in ("", *(other.name for other in found.arms))
        rows = {row for _, row, _ in places}
        assert set(found.rows) <= rows


@pytest.mark.parametrize("name", [name for name in tables() if name != "checks"])
def test_a_cell_of_kn_has_the_papers_rule_and_the_images_statistics(name):
    """And our default, its form with standardized filters and the released code's beside it."""
    forms = {arm.name: arm for arm in read(name).arms if arm.form}
    papers = [arm for arm in forms.values() if arm.form == "paper"]
    assert len(forms) == 4 * len(papers) > 0
    for arm in papers:
        given = init_args(arm.config)
        assert given["normalization"] == "kn-paper"
        mean, std = given["normalization_options"]["input_stats"]
        assert (set(mean), len(std)) == ({0.0}, 3)
        default, standardized = (forms[f"{arm.name}-{form}"] for form in ("default", "standardized"))
        assert init_args(default.config) == {**given, "normalization": "kn"}
        assert init_args(standardized.config)["normalization_options"]["weight_standardization"]
        assert not default.reported
        assert default.run == (arm.run[0], f"{arm.run[1]}-default")


def test_every_network_can_be_built_as_it_is_and_tiny(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda tensor, **options: tensor)  # draws take the time
    configs = {}
    for arm in EVERY.values():
        for config in (arm.config, arm.scaled("tiny")):
            names = ("network", "normalization", "normalization_options", "schedule")
            configs[repr([init_args(config).get(name) for name in names])] = config
        group = init_args(arm.config).get("statistics_batch") or 1
        assert init_args(arm.config, "data")["gradient_batch"] % group == 0
        assert arm.scaled("tiny")["trainer"]["max_steps"] <= 10
    assert len(configs) > 50
    for config in configs.values():
        if config["model"]["class_path"].endswith("Classifier"):
            without_memory(config)


def test_the_tiny_scales_data_are_generated_and_read(tmp_path):
    every = [arm.scaled("tiny") for name in names() for arm in read(name).arms]
    configs = {repr(config["data"]): config for config in every if "data" in config}
    assert len(configs) > 20
    with data_at(None, list(configs.values()), tmp_path, "tiny"):
        assert not any(missing_data(config) for config in configs.values())


@pytest.mark.parametrize("arm", read("table2").arms, ids=lambda arm: arm.name)
def test_parameters_are_those_of_table_2(arm):
    """KN's are the paper's: the released code has no process noise."""
    if arm.form == "released":
        assert parameters(arm.config) == parameters(config_of(f"table2/{arm.name.removesuffix('-kn-released')}-bn"))
    elif arm.reported:
        assert round(parameters(arm.config)["parameters"], 2) == arm.reported["parameters"]


def test_the_width_compensated_network_has_as_many_parameters_as_kn():
    wide, kn = (parameters(config_of(f"arxiv-v1/inception-v2-32-256-{name}")) for name in ("bn-wide", "kn-default"))
    assert wide["parameters"] == 11.294498
    assert abs(wide["parameters"] - kn["parameters"]) < 0.001


def test_methods_on_the_same_network_and_data_have_one_rate_and_schedule_but_for_weight_normalization():
    """As docs/reproduce.md says."""
    found = {}
    for name, arm in EVERY.items():
        given, table = init_args(arm.config), name.partition("/")[0]
        if given.get("normalization") == "wn":
            assert given["rate"] == 0.001
            continue
        key = (table, repr(given["network"]), repr(arm.config["data"]), arm.config["trainer"]["accelerator"])
        found.setdefault(key, set()).add((given["rate"], given["schedule"], repr(given.get("milestones"))))
    del found[next(key for key in found if key[0] == "checks" and "preactivation" not in key[1])]
    assert len(found) > 20
    assert {len(ways) for ways in found.values()} == {1}


def rate_at(config, step):
    given, steps = init_args(config), config["trainer"]["max_steps"]
    return given["rate"] * share_of_rate(step, steps, given["schedule"], given["milestones"])


def test_the_paper_schedule_on_cifar():
    """Rate 0.1, from epoch 82 on 0.01, from 123 on 0.001, from 300 on 0.0002, to epoch 400."""
    config = config_of("table8/resnet32-kn-bs2")
    steps = config["trainer"]["max_steps"]
    assert steps == 400 * 50_000 / 128
    epochs = {0: 0.1, 81: 0.1, 83: 0.01, 122: 0.01, 124: 0.001, 299: 0.001, 301: 0.0002, 399: 0.0002}
    for epoch, rate in epochs.items():
        assert rate_at(config, round(epoch / 400 * steps)) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["table5/inception-v2-bn", "figure3/inception-v2-bn"])
def test_table_5_is_the_beginning_of_a_training_over_200000_steps(name):
    short, whole = config_of(name), config_of("arxiv-v1/inception-v2-1-256-bn")
    for step in (0, 19_999, 20_000, 59_999, 60_000, 99_999, 100_000, 119_999):
        assert rate_at(short, step) == rate_at(whole, step)
    assert (short["trainer"]["max_steps"], whole["trainer"]["max_steps"]) == (120_000, 200_000)


def test_groups_do_not_follow_from_a_default():
    """Results that are kept must not change their meaning with `to_groupnorm`."""
    every = (arm for name in names() for arm in read(name).arms)
    arms = [arm for arm in every if init_args(arm.config).get("normalization") in ("gn", "gkn")]
    assert len(arms) > 20
    for arm in arms:
        assert init_args(arm.config)["normalization_options"]["groups"], arm.name
    assert init_args(config_of("table1/resnet50-gn"))["normalization_options"]["groups"] == 32


def test_a_note_tells_how_long_a_training_on_imagenet_is():
    arms = [arm for arm in EVERY.values() if init_args(arm.config, "data").get("folder") == "imagenet"]
    for arm in arms:
        words = re.findall(r"([\d,]+) steps of (\d+) images \(([\d.]+) epochs\)", " ".join(arm.notes))
        steps, images = arm.config["trainer"]["max_steps"], init_args(arm.config, "data")["gradient_batch"]
        assert words == [(f"{steps:,}", str(images), f"{float(f'{steps * images / 1_281_167:.2g}'):g}")], arm.name
    assert len(arms) > 40


def test_bases_are_merged_in_order_and_a_run_of_another_arm_is_that_training():
    given = config_of("table8/inception-svhn-bn-bs128")
    assert init_args(given)["statistics_batch"] == 128
    assert init_args(given)["network"]["class_path"].endswith("CifarInception")
    assert init_args(given, "data")["name"] == "svhn_extra"
    shown, own = EVERY["table7/inception-kn-bs2"], EVERY["table8/inception-cifar10-kn-bs2"]
    assert (shown.config, shown.tiny, shown.notes, shown.run) == (own.config, own.tiny, own.notes, own.run)
    assert own.run == ("table8", "inception-cifar10-kn-bs2")


def test_merging_replaces_all_but_mappings_of_names_and_changes_neither():
    base, over = {"a": {"b": [1], "c": 2}, "d": 3}, {"a": {"b": [4, 5]}, "d": {"e": 6}}
    assert merge(base, over) == {"a": {"b": [4, 5], "c": 2}, "d": {"e": 6}}
    assert base == {"a": {"b": [1], "c": 2}, "d": 3}
    merge(base, over)["a"]["b"].append(7)
    assert over["a"]["b"] == [4, 5]
    assert merge({"milestones": {0.2: 0.1, 0.3: 0.01}}, {"milestones": {0.5: 0.1}}) == {"milestones": {0.5: 0.1}}


def test_a_scale_multiplies_lengths_and_nothing_else():
    arm = EVERY["table8/resnet32-kn-bs2"]
    shorter = arm.scaled(0.05)
    assert (shorter["trainer"]["max_steps"], shorter["trainer"]["val_check_interval"]) == (7812, 100)
    assert shorter["checkpoint_every"] == 100
    assert shorter["model"] == arm.config["model"]
    assert arm.scaled(1e-9)["trainer"]["max_steps"] == 1
    with pytest.raises(ValueError, match=r"above 0; got -1"):
        arm.scaled(-1)


def test_an_experiment_may_be_another_one_at_another_size(written, tmp_path):
    whole = read(written())
    small = {"title": "Smaller", "of": "ours", "seeds": 1, "config": {"trainer": {"max_steps": 2}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    found = read(tmp_path / "small.yaml")
    assert (found.name, found.title, found.question, found.seeds) == ("small", "Smaller", whole.question, 1)
    for arm, other in zip(found.arms, whole.arms, strict=True):
        assert (arm.label, arm.search) == (other.label, other.search)
        assert arm.config == merge(other.config, {"trainer": {"max_steps": 2}})
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(small | {"of": "small", "only": ["kn-2", "mine"],
                                                               "arms": {"mine": of("gn")}}))  # fmt: skip
    few = read(tmp_path / "few.yaml").arms
    assert [arm.name for arm in few] == ["kn-2", "mine"]
    assert few[0].config == found.arms[1].config


def test_an_arm_has_the_settings_of_its_column_and_of_the_file_below_its_own(written, tmp_path):
    columns = {
        2: {"model": {"rate": 0.2, "statistics_batch": 4}, "search": {}, "tiny": {"trainer": {"max_steps": 2}}},
        8: {"model": {"statistics_batch": 8}},
    }
    own = {"config": {"model": {"init_args": {"rate": 0.4}}}, "model": {"normalization": "kn"}}
    path = written(model={"rate": 0.1, "momentum": 0.5}, columns=columns, column=2,
                   arms={"bn-2": {"column": 8}, "kn-2": own})  # fmt: skip

    def settings(path):
        names = ("normalization", "rate", "statistics_batch", "momentum")
        return [tuple(init_args(arm.config)[name] for name in names) for arm in read(path).arms]

    assert settings(path) == [("bn", 0.1, 8, 0.5), ("kn", 0.4, 4, 0.5)]
    assert [bool(arm.search) for arm in read(path).arms] == [True, False]
    assert [arm.scaled("tiny")["trainer"]["max_steps"] for arm in read(path).arms] == [6, 2]
    other = {"title": "Other", "of": "ours", "columns": {8: {"config": {"model": {"init_args": {"rate": 0.3}}}}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert settings(tmp_path / "other.yaml") == [("bn", 0.3, 8, 0.5), ("kn", 0.4, 4, 0.5)]


def test_an_arms_search_stands_in_place_of_its_columns(written):
    rates, own = {"model.init_args.rate": [0.1, 0.2]}, {"model.init_args.momentum": [0.5, 0.9]}
    arms = {"bn-2": {}, "none": {"label": "none", "search": {}}, "own": {"label": "own", "search": own}}
    found = read(written(columns={2: {"search": rates}}, column=2, arms=arms)).arms
    assert {arm.name: arm.search for arm in found if arm.name in arms} == {"bn-2": rates, "none": {}, "own": own}
    # Without a search, its seed may be that of a final run.
    assert read(written(search="absent", search_seed=1)).search_seed == 1


def test_kalman_normalization_gets_the_statistics_of_the_input(written):
    other, stats = [[1.0], [2.0]], [[0.0], [1.0]]

    def saying(stats):
        return {"model": {"normalization": "kn", "normalization_options": {"input_stats": stats}}}

    arms = {"kn-paper": of("kn-paper"), "own": saying(other), "none": saying(None), "gn": of("gn")}
    found = {arm.name: init_args(arm.config) for arm in read(written(input_stats=stats, arms=arms)).arms}
    given = {name: options["normalization_options"]["input_stats"] for name, options in found.items()
             if "normalization_options" in options}  # fmt: skip
    assert given == {"kn-2": stats, "kn-paper": stats, "own": other, "none": None}


def test_a_file_of_settings_is_trained_as_it_is(tmp_path):
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 5}\nmodel: {a: 1}\nnote: {a: b}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrainer: {max_steps: 7}\ntiny: {model: {a: 2}}\n")
    assert config_of(tmp_path / "mine.yaml") == {"trainer": {"max_steps": 7}, "model": {"a": 1}}


@pytest.mark.parametrize(
    ("name", "words"),
    [("table8/resnet32", ["'table8/resnet32'", "resnet32-kn-bs2"]), ("table99/x", ["'table99/x'", "table8"])],
)
def test_an_unknown_arm_lists_the_known_ones(name, words):
    with pytest.raises(ValueError, match="no arm") as raised:
        config_of(name)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "nothing"}, "nothing.yaml that it could be of"),
        ({"only": ["bn-2", "bn-3"]}, "only must be a list of arms, of bn-2, kn-2; got ['bn-2', 'bn-3']"),
        ({"only": "bn-2"}, "only must be a list of arms"),
        ({"sarch": {}}, "unknown key 'sarch'; known are title, arms"),
        ({"arms": {"bn-2": {"lable": "x"}}}, "arms.bn-2: unknown key 'lable'; known are label"),
        ({"title": "absent"}, "got no title"),
        ({"arms": "absent"}, "got no arms"),
        ({"columns": {2: {"lable": "x"}}}, "columns.2: unknown key 'lable'; known are label"),
        ({"columns": {3: {}}}, "columns has 3, which is the column of no arm"),
        ({"columns": 2}, "columns must hold keys and values; got 2"),
        ({"model": 2}, "model must hold keys and values; got 2"),
        ({"arms": {"bn-2": 3}}, "arms.bn-2 must hold keys and values; got 3"),
        ({"arms": {"a/b": of("bn")}}, "an arm's name must be of letters, digits and '_.+-'; got 'a/b'"),
        ({"arms": {"bn-2": {"label": "KN"}}}, "arms.kn-2 has the place of arms.bn-2 in the table"),
        ({"scored": "train"}, "scored must be 'test' or 'validation'; got 'train'"),
        ({"seeds": 0}, "seeds must be a whole number from 1 on; got 0"),
        ({"seeds": True}, "seeds must be a whole number from 1 on; got True"),
        ({"search_seed": 1}, "search_seed must not be one of the 2 seeds of the final runs, 0 to 1; got 1"),
        ({"search_scale": 0}, "search_scale must be a number above 0, up to 1; got 0"),
        ({"search_scale": True}, "search_scale must be a number above 0, up to 1; got True"),
        ({"search_seed": "x"}, "search_seed must be a whole number from 0 on; got 'x'"),
        ({"search": {RATE: 0.1}}, "search.model.init_args.rate must be a list of values to try; got 0.1"),
        ({"search": {RATE: [0.1, 0.1]}}, "must be of different values; got [0.1, 0.1]"),
        ({"search": {RATE: [[0.1]]}}, "must be of plain, finite values; got [[0.1]]"),
        ({"search": {"seed_everything": [1]}}, "settings such as model.init_args.rate; got 'seed_everything'"),
        ({"base": "none.yaml"}, "none.yaml to base it on"),
        ({"base": "absent"}, "arms.bn-2 must say model.class_path, itself, in config or in a base; got none"),
        ({"config": {"data": {"init_args": {"validation": "test"}}}}, "must be a number above 0; got 'test'"),
        ({"tiny": {"data": {"init_args": {"validation": 0}}}}, "must be a number above 0; got 0"),
        ({"metric": ""}, "metric must be the name of a score; got ''"),
        ({"arms": {"bn-2": {"start": "nothing/bn"}}}, "start must be NAME/ARM, of a file beside this one"),
        ({"arms": {"bn-2": {"analysis": "size"}}}, "analysis must be one of parameters, speed, variance_gap; got"),
        ({"arms": {"bn-2": {"run": 5}}}, "is no experiment's file: AttributeError"),
        ({"base": 3}, "is no experiment's file: TypeError"),
        ({"rows": 5}, "rows must be a list of labels; got 5"),
        ({"verdict": {"guessing": 0.1}}, "verdict must be guessing and images, two numbers; got {'guessing': 0.1}"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(written, changes, message, tmp_path, refused):
    assert refused(["run", written(**changes), "--output", tmp_path / "out"], message, str(tmp_path)) == ""
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_of_itself_is_refused(written, refused):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)  # a file is read as often
    try:
        refused(["run", written(of="ours")], "is no experiment's file: RecursionError")
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a", "keys and values; got list"),
        ("a: [", "not YAML"),
        ("title: Twice\narms: {1: {}, '1': {}}", "one name twice, as a number and as a text; got [1, '1']"),
    ],
    ids=["list", "broken", "twice"],
)
def test_a_file_that_is_none_is_named_in_one_line(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        read(tmp_path / "mine.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("start", ["before/gn", "before/kn"])
def test_a_start_that_is_none_is_refused(written, tmp_path, start):
    before = {**STUDY, "search": {}, "arms": {"bn": of("bn"), "kn": of("kn", search={RATE: [0.1]})}}
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(before))
    message = f"must be an arm of before that has no search and no start itself; got '{start}'"
    with pytest.raises(ValueError, match=message):
        read(written(start=start))


def parts_of(config):
    """What a run is made of, each part as the names of its settings: their values are of the same types everywhere."""
    model = dict(init_args(config))
    network, options = model.pop("network"), model.pop("normalization_options", None) or {}
    yield "model", config["model"]["class_path"], *sorted(model)
    yield "network", network.get("class_path"), *sorted(flat(network))
    yield "normalization", model.get("normalization"), *sorted(options)
    yield "data", config["data"]["class_path"], *sorted(init_args(config, "data"))
    yield "trainer", str(config["trainer"].get("callbacks")), *sorted(config["trainer"])


def test_every_kind_of_arm_is_a_whole_configuration():
    """As few arms as have every part of one of them."""
    arms = [arm for name in names() for arm in read(name).arms]
    configs = [arm.scaled(scale, (arm.points() or [{}])[0], 7) for arm in arms for scale in (1.0, "tiny")]
    by_parts = {frozenset(parts_of(config)): config for config in configs}
    left = frozenset().union(*by_parts)
    assert len(left) > 80
    while left:
        parts = max(by_parts, key=lambda parts: len(parts & left))
        assert Run(by_parts[parts]).config.seed_everything == 7
        left -= parts
