"""The comparison: what it refuses, what it searches, what it says, and all of it once, small."""

import pytest
import torch
import yaml
from image_files import write_classes
from PIL import Image

from kalmannorm.lab import cli, compare
from kalmannorm.lab.compare import classifier
from kalmannorm.lab.data.generated import generate_folders
from kalmannorm.lab.methods import METHODS
from kalmannorm.lab.results import Result
from kalmannorm.lab.rows import read_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_folders(tmp_path_factory.mktemp("images"), "pets", classes=2, train=20, val=4, size=40)


LINE = ["--methods", "bn,kn", "--size", "32", "--steps", "2", "--rates", "0.01", "--seeds", "1", "--workers", "1",
        "--weights", "none"]  # fmt: skip


def rows_of(output):
    return read_table(output / "compare" / "runs.csv").to_dict("records")


@pytest.mark.usefixtures("here")
def test_a_comparison_from_beginning_to_end(folder, tmp_path, capsys, refused):
    """From weights of its own, with a setting of the trainer's."""
    output = tmp_path / "out"
    torch.save(classifier("timm/test_resnet", 7).state_dict(), tmp_path / "weights.pt")
    line = ["compare", str(folder), *LINE, "--methods", "kn,frozen", "--weights", str(tmp_path / "weights.pt")]
    line += ["--network", "timm/test_resnet"]
    line += ["--trainer.gradient_clip_val", "9.0", "--output", str(output)]
    assert cli.main(line) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"Report: {output / 'compare' / 'report.html'}"
    assert "from trained weights" in " ".join(out.split())
    rows = rows_of(output)
    assert [(row["arm"], row["seed"], row["split"], row["error"]) for row in rows] == [
        ("kn", "100", "validation", ""), ("frozen", "100", "validation", ""),
        ("kn", "0", "test", ""), ("frozen", "0", "test", ""),
    ]  # fmt: skip
    # Of 40 training images, a tenth is held out for validation; the 8 in val are the test.
    quarters = [4 * float(row["accuracy_running"]) for row in rows[:2]]
    assert quarters == [round(quarter) for quarter in quarters]
    found = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert len(found) == 4
    config = Result.read(next(iter(found)).parent).config
    assert config["trainer"]["gradient_clip_val"] == 9.0
    assert len(list(output.rglob("last.ckpt"))) == 2
    # Nothing is trained again; and another comparison does not go into the same folder.
    content = (output / "compare" / "runs.csv").read_text(encoding="utf-8")
    assert cli.main(line) == 0
    assert found == {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    assert (output / "compare" / "runs.csv").read_text(encoding="utf-8") == content
    refused([*line, "--steps", "3"], "holds a comparison with")


def test_the_folder_that_was_typed_is_read_and_not_a_data_set_of_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("KALMANNORM_DATA", str(tmp_path))
    (tmp_path / folder.name / "train" / "other").mkdir(parents=True)
    read = []
    monkeypatch.setattr(compare, "_checked_data", lambda folder, *rest: read.append(folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["compare", folder.name, *LINE])
    assert read == [str(folder.resolve())]


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path, mode):
    path = tmp_path / "deep.tiff"
    Image.new(mode, (4, 4)).save(path)
    assert f"{path} has more than 8 bits a channel (mode {mode})" in compare._broken(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bn,xy"], "--methods: unknown method 'xy'; expected some of bn, brn"),
        (["--methods", "bn,frozen"], "--methods: 'frozen' keeps the statistics of a trained network: give --weights"),
        (["--weights", "gone.pt"], "--weights: expected default, none or a file; got gone.pt"),
        (["--speed", "9"], "unknown option --speed"),
        (["--speed"], "unknown option --speed"),
        (["--trainer.max_steps", "9"], "--trainer.max_steps: give --steps instead"),
        (["--model.init_args.network.class_path=x"], "--model.init_args.network.class_path: give --network instead"),
        (["--data.init_args.folder", "x"], "--data.init_args.folder: give FOLDER instead"),
        (["--trainer.bogus", "9"], "bogus"),
        (["--data.init_args.bogus", "9"], "--data.init_args: FolderData.__init__() got an unexpected keyword argument"),
        (["--data.init_args.validation", "test"], "--data.init_args.validation: expected a share, as rates are chosen"),
        (["--trainer.gradient_clip_val", "--trainer.precision", "32"], "--trainer.gradient_clip_val: expected a value"),
        (["--methods", "gn", "--network", "resnet19"], "no classifier 'resnet19'; it has for example resnet18"),
        (["--network", "alexnet"], "alexnet has no BatchNorm"),
        (["--network", "inception_v3"], "--size: inception_v3 cannot take images of 32 pixels"),
        (["--gradient_batch", "3"], "--gradient_batch: expected a multiple of statistics_batch=2; got 3"),
        (["--gradient_batch", "0"], "--gradient_batch: expected a multiple of statistics_batch=2; got 0"),
        (["--gradient_batch", "64"], "--gradient_batch: expected at most the 36 training images; got 64"),
        (["--rates", "0.1,x"], "--rates: expected numbers separated by commas; got '0.1,x'"),
        (["--rates", "0.1,-1"], "--rates: expected numbers above 0"),
        (["--seeds", "0"], "--seeds: expected at least 1; got 0"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(folder, tmp_path, refused, options, message):
    refused(["compare", folder, *LINE, "--output", tmp_path / "out", *options], message)
    assert not (tmp_path / "out").exists()


def test_a_network_that_a_method_does_not_suit_is_named_with_it(folder, tmp_path, refused, monkeypatch):
    def normalize(network, method, **options):
        if method == "kn":
            raise ValueError("it cannot be traced")

    monkeypatch.setattr(compare, "normalize", normalize)
    words = "--methods: kn does not suit resnet18: it cannot be traced"
    refused(["compare", folder, *LINE, "--output", tmp_path / "out"], words)


def test_missing_images_are_said_in_one_line(tmp_path, refused):
    line = ["compare", tmp_path / "none", "--output", tmp_path / "out"]
    refused(line, f"'{tmp_path / 'none'}' was not found", "expected one with images as CLASS/*.jpg, or as train/CLASS")


def test_classifiers_give_logits_alone():
    for name, size in (("resnet18", 32), ("googlenet", 32), ("timm/resnet10t", 32)):
        assert classifier(name, 5)(torch.zeros(2, 3, size, size)).shape == (2, 5), name
    with pytest.raises(ValueError, match="timm has no classifier 'resnet18x'"):
        classifier("timm/resnet18x", 5)


@pytest.fixture
def trained(here):
    """Trainings that take no time, and learn nothing."""
    scores = dict.fromkeys(("accuracy_running", "accuracy_online"), 0.9)
    here.train = lambda job, tell: Result(job.config, scores, 1.0, 0.1, [1.0, 1.0], [], {"torch": "2"})
    return here.jobs


def test_to_name_the_largest_class_is_to_guess(tmp_path, trained):
    """Of 20 test images 18 are of one class: 0.9 is what a network has that learned nothing."""
    for name, count in (("common", 180), ("rare", 20), ("single", 1)):
        write_classes(tmp_path / "images", count, [name])
    output = tmp_path / "out"
    assert cli.main(["compare", str(tmp_path / "images"), *LINE, "--output", str(output)]) == 0
    page = (output / "compare" / "report.html").read_text(encoding="utf-8")
    assert "No method learned anything" in page
    assert "guessing gives 90.0 %" in page
    # The file says it all: it can be changed, and run by itself.
    content = yaml.safe_load((output / "compare.yaml").read_text(encoding="utf-8"))
    assert content["verdict"] == {"guessing": 0.9, "images": 20}
    again = ["--data.init_args.validation", "0.2", "--output", str(tmp_path / "again")]
    assert cli.main(["compare", str(tmp_path / "images"), *LINE, *again]) == 0
    content = yaml.safe_load((tmp_path / "again" / "compare.yaml").read_text(encoding="utf-8"))
    assert content["verdict"] == {"guessing": 0.9, "images": 40}
    assert trained[-1].config["model"]["init_args"]["num_classes"] == 3


def test_a_comparison_grows_and_notices_other_pictures(tmp_path, refused, trained):
    images = generate_folders(tmp_path, "pets", classes=2, train=20, val=4, size=40)
    output = tmp_path / "out"
    line = ["compare", str(images), *LINE, "--output", str(output)]
    assert cli.main([*line, "--methods", "bn", "--trainer.gradient_clip_val", "9.0"]) == 0
    file = output / "compare.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content["question"].endswith("But with trainer.gradient_clip_val 9.0.")
    content["arms"]["bn"]["label"] = "Ours"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    grown = [*line, "--trainer.gradient_clip_val", "9.0", "--rates", "0.01,0.1", "--seeds", "2"]
    assert cli.main(grown) == 0
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {key: arm["label"] for key, arm in content["arms"].items()} == {"bn": "Ours", "kn": METHODS["kn"].label}
    assert (content["search"], content["seeds"]) == ({"model.init_args.rate": [0.01, 0.1]}, 2)
    assert len(rows_of(output)) == 8
    # The page's command is one that runs.
    page = (output / "compare" / "report.html").read_text(encoding="utf-8")
    assert f"kalmannorm run {file} --output {output}" in page
    (images / "train" / "class0" / "0.jpg").unlink()
    refused(grown, "holds a comparison with config.data.init_args.pictures=48 pictures, ")
    refused(["run", file, "--output", output], "the pictures have changed: expected 48 pictures, ")


def test_classes_of_two_pictures_have_none_to_hold_out(tmp_path, refused, trained):
    write_classes(tmp_path / "images", 2)
    words = "no class has images enough to hold one out for validation: expected 3"
    refused(["compare", tmp_path / "images", *LINE, "--output", tmp_path / "out"], words)


def test_a_broken_picture_is_named_before_anything_is_trained(tmp_path, refused, trained):
    images = generate_folders(tmp_path, "pets", classes=2, train=20, val=4, size=40)
    for name in ("class0/0.jpg", "class1/1.jpg"):
        path = images / "train" / name
        path.write_bytes(path.read_bytes()[:300])
    words = f"{images / 'train' / 'class0' / '0.jpg'} cannot be read as a picture", ", and 1 more: repair or remove it"
    refused(["compare", images, *LINE, "--output", tmp_path / "out"], *words)
    assert not trained


def test_the_librarys_weights_are_taken_where_they_can_be_had(folder, tmp_path, monkeypatch, trained):
    original = compare._classifier

    def here(name, num_classes, *, trained):
        return original(name, 1000 if trained else num_classes, trained=False)

    def out_of_reach(name, num_classes, *, trained):
        if trained:
            raise OSError("no network")
        return original(name, num_classes, trained=False)

    for number, (instead, file) in enumerate(((here, "resnet18.pt"), (out_of_reach, None))):
        monkeypatch.setattr(compare, "_classifier", instead)
        output = tmp_path / str(number)
        assert cli.main(["compare", str(folder), *LINE, "--weights", "default", "--output", str(output)]) == 0
        weights = trained[-1].config["model"]["init_args"].get("weights")
        assert weights == (str(output / file) if file else None)
        assert ("could not be had" in (output / "compare" / "table.md").read_text()) == (file is None)
