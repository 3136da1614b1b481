"""The command line: bad input gives one clear line and exit code 2, and touches nothing."""

import importlib.util
import subprocess
import sys

import pytest
import yaml

from kalmannorm.lab import experiments
from kalmannorm.lab.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--seeds", "many"], ["--seeds", "got many"]),
        (["demo", "--workers", "0"], ["--workers", "got 0"]),
        (["demo", "--scale", "nan"], ["--scale", "got nan"]),
        (["demo", "--speed", "9"], ["speed"]),
        (["fit", "--config", "table8/resnet32-kn-bs2"], ["output"]),
        *(([command, "--output", "."], [". holds no run: expected a config.yaml"]) for command in ("validate", "test")),
        (["run", "nothing"], ["no experiment or file 'nothing'", *experiments.names()]),
        (["run", "table8", "--scale", "0"], ["--scale", "got 0"]),
        (["run", "table8", "--devices", "2", "--workers", "2"], ["--workers"]),
        (["run", "table8", "--data", "/nowhere"], ["--data", "/nowhere"]),
        (["run", "table8", "--scale", "tiny", "--data", "/"], ["--data", "tiny"]),
        (["run", "table8", "--kalman", "new"], ["--kalman", "paper", "'new'"]),
        (["run", "table6", "--weights", "/nowhere"], ["--weights", "/nowhere"]),
        (["run", "batch-sizes-cpu", "--only", "bn-2, xn-*"], ["--only", "'xn-*'", "kn-2"]),
        (["run", "batch-sizes-cpu", "--scale", "small"], ["--scale", "small"]),
        (["run", "batch-sizes-cpu", "--seeds", "0"], ["--seeds", "got 0"]),
        (["run", "batch-sizes-cpu", "--seeds", "101"], ["--seeds", "the 101 seeds of the final runs", "got 100"]),
        (["run", "batch-sizes-cpu", "--report", "--output", "/nowhere"], ["--output", "/nowhere"]),
        (["run"], ["name"]),
        (["dance"], ["dance"]),
        ([], ["command"]),
    ],
)
def test_bad_input(arguments, words, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(arguments, *words) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("images")
@pytest.mark.parametrize(("command", "folder"), [("demo", "out/demo"), ("fit", "out")])
def test_an_output_folder_that_cannot_be_made(tmp_path, refused, config, command, folder):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(tmp_path / "recipe.yaml")] if command == "fit" else []
    words = f"kalmannorm: {tmp_path / 'file' / folder}: Not a directory\n"
    refused([command, "--output", tmp_path / "file" / "out", *options], words)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lightning" else found(name))
    assert main(["demo"]) == 1
    err = capsys.readouterr().err
    assert "lightning" in err
    assert 'pip install "kalmannorm[lab]"' in err
    assert err.count("\n") == 1


def test_help_lists_the_commands_and_needs_nothing_of_the_extra():
    code = "import sys; from kalmannorm.lab import cli; cli.main(['--help'])"
    code += "; print([name for name in cli.NEEDED if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "demo (kalmannorm run demo)" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_what_trains_nothing_does_not_wait_for_what_trains():
    slow = ["datasets", "lightning", "matplotlib", "pandas", "timm", "torch._dynamo", "torchmetrics", "torchvision"]
    code = f"""
import contextlib, sys
from kalmannorm.lab import cli
for line in (*([name, "--help"] for name in cli.COMMANDS), ["list"], ["run", "nothing"]):
    with contextlib.suppress(SystemExit):
        cli.main(line)
    assert not set({slow}) & set(sys.modules), (line, [name for name in {slow} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no experiment or file 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("study", ["Trust the rows of the output folder's runs.csv whose run folders are gone",
                   "Their configuration cannot be checked. (default: False) --list Only list"]),
        ("fit", ["Override any setting of the configuration, such as --trainer.max_steps 10."]),
        ("test", ["such as --trainer.accelerator cpu"]),
    ],
)  # fmt: skip
def test_help_tells_all_of_an_option_and_of_the_settings(capsys, command, texts):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert [text for text in texts if text not in shown] == []
