"""What a release holds, and that it works where nothing but torch is installed."""

import contextlib
import doctest
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import kalmannorm
from kalmannorm.lab.cli import NEEDED

ROOT = Path(__file__).parent.parent
pytest.importorskip("build")
pytest.importorskip("hatchling")


def run(*command, cwd):
    # Nothing from outside may help: neither a PYTHONPATH nor the folder that pytest was started in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def build(*options, output):
    # Without isolation: the build backend is what the dev extra installed, and nothing is downloaded.
    done = run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", output, ROOT, cwd=output.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def files(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("release") / "dist"
    build(output=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def contents(release):
    """The files of the source distribution."""
    with tarfile.open(release[0]) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def git(*command):
    return set(run("git", *command, cwd=ROOT).stdout.splitlines())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_sdist_is_what_git_tracks_but_for_history(contents):
    tracked = {name for name in git("ls-files") if (ROOT / name).exists() and not name.startswith("history/")}
    assert not tracked - contents
    # What is being worked on and not committed yet gets in; nothing that git ignores does.
    assert not contents - tracked - git("ls-files", "--others", "--exclude-standard") - {"PKG-INFO"}


def test_the_wheel_is_the_package_alone(release, contents):
    name = f"kalmannorm-{kalmannorm.__version__}.dist-info"
    about = {f"{name}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    package = {file for file in contents if file.startswith("kalmannorm/")}
    assert files(release[1]) == package | about
    assert {"kalmannorm/py.typed", "kalmannorm/kernels/native.c"} <= package
    for folder in ("configs/bases", "configs", "studies"):
        there = {str(path.relative_to(ROOT)) for path in (ROOT / "kalmannorm" / "lab" / folder).glob("*.yaml")}
        assert there
        assert there <= package


def test_the_wheel_of_the_tree_is_the_wheel_of_the_sdist(release, tmp_path):
    build("--wheel", output=tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == release[1].name
    assert files(wheel) == files(release[1])


def test_the_metadata(release):
    wheel = zipfile.ZipFile(release[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == kalmannorm.__version__
    assert metadata["License-Expression"] == "MIT"
    # The core needs torch alone.
    assert [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line] == ["torch>=2.11"]


def test_the_command_asks_for_all_that_the_extra_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^\w-]", line)[0] for line in project["optional-dependencies"]["lab"]]
    imported = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    assert sorted(imported.get(name, name) for name in names) == sorted(NEEDED)


def test_what_to_cite():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == kalmannorm.__version__
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:1802.03133"


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == kalmannorm.__version__


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name, found):
    """The distributions that one needs, itself among them, by their normal names."""
    if normal(name) not in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # for another platform
            lines = importlib.metadata.requires(name) or []
            found.add(normal(name))
            for line in lines:
                if "extra ==" not in line:
                    needed(re.split(r"[^\w.-]", line)[0], found)
    return found


# Lends an environment a few packages of this one, and no others. No links: pip would write through them.
LENDING = """
import sys
from importlib.machinery import PathFinder


class Lent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{place!r}]) if name in {names!r} else None


sys.meta_path.append(Lent)
"""


@pytest.fixture(scope="module")
def environment(release, tmp_path_factory):
    """An environment with the wheel, which finds torch, torchvision and what they need in this one."""
    torchvision = pytest.importorskip("torchvision")
    folder = tmp_path_factory.mktemp("environment")
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    install = ("install", "--no-deps", "--no-index", release[1])
    done = run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    distributions = needed("torchvision", needed("torch", set()))
    tops = importlib.metadata.packages_distributions().items()
    names = {top for top, owners in tops if distributions & {normal(owner) for owner in owners}}
    (packages,) = folder.glob("lib/python*/site-packages")
    place = str(Path(torchvision.__file__).parent.parent)
    (packages / "lending.py").write_text(LENDING.format(place=place, names=names))
    (packages / "lending.pth").write_text("import lending\n")
    return folder


def test_an_empty_environment_imports_the_wheel(environment):
    code = "import importlib.metadata as m, kalmannorm as k; print(k.__file__, k.__version__, m.version('kalmannorm'))"
    done = run(environment / "bin" / "python", "-c", code, cwd=environment)
    assert done.returncode == 0, done.stderr
    place, *versions = done.stdout.split()
    assert Path(place).is_relative_to(environment)
    assert set(versions) == {kalmannorm.__version__}


def test_the_first_lines_of_the_readme_run_there(environment):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "kn.convert" in block[1]
    assert len(doctest.DocTestParser().get_examples(block[1])) > 4
    page = environment / "readme.txt"
    page.write_text(block[1])
    options = ("-o", "NORMALIZE_WHITESPACE", "-o", "ELLIPSIS")
    done = run(environment / "bin" / "python", "-m", "doctest", *options, page, cwd=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_says_what_to_install(environment):
    done = run(environment / "bin" / "kalmannorm", "list", cwd=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith('pip install "kalmannorm[lab]"\n')
