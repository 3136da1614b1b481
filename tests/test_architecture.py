"""The tree, the page about it and the imports tell one story."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kalmannorm"

# Each may import what stands before it.
ORDER = """
    gaussian kernels rules steps composed propagation paper checkpoints priors recording shards watch functional
    correction modules freezing traversal passes standardization annealing stand_ins connect convert describe inference
    calibration diagnosis graphs integrations lab
""".split()  # noqa: SIM905 - as the page has it


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The rooms that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kalmannorm"):
            whole = node.module == "kalmannorm"
            names = [f"kalmannorm.{alias.name}" for alias in node.names] if whole else [node.module]
        for name in names:
            first = name.split(".")[1]
            if (PACKAGE / first).exists() or (PACKAGE / f"{first}.py").exists():
                yield first


def test_imports_run_one_way():
    for path in PACKAGE.rglob("*.py"):
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        here = room(path)
        later = [other for other in imported(path) if ORDER.index(other) > ORDER.index(here)]
        assert not later, f"{path.relative_to(ROOT)} imports {later}"


def test_the_core_needs_torch_alone():
    for path in PACKAGE.rglob("*.py"):
        if room(path) in ("integrations", "lab") or path.name in ("triton_layer.py", "triton_link.py"):
            continue  # the latter are imported where there is a GPU
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                first = str(name).split(".")[0]
                assert first in ("kalmannorm", "torch") or first in sys.stdlib_module_names, (path, first)


def names_in(folder):
    """The modules and packages of a folder, as the page has them."""
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir())
    return [name for name in names if name.endswith((".py", "/")) and not name.startswith("__")]


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"\w+(?:\.py|/)", page[: page.index("Imports run one way")])
    for name in names_in(PACKAGE):
        assert name in named
        assert name.removesuffix("/").removesuffix(".py") in ORDER
    # And what is in these two, but for the packages of the laboratory, whose modules are many and alike.
    for folder in ("kernels", "lab"):
        assert [name for name in names_in(PACKAGE / folder) if name not in named] == [], folder


def test_the_page_gives_the_order():
    page = (ROOT / "docs" / "architecture.md").read_text()
    sentence = page[page.index("Imports run one way") :].split(".\n")[0].replace("\n", " ")
    assert [name.strip() for name in sentence.split(":")[1].split("<-")] == ORDER


def test_the_pages_name_tests_that_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`((?:lab/)?test_\w+\.py)`", page.read_text()):
            assert (ROOT / "tests" / name).exists(), (page.name, name)


def test_an_import_leaves_the_compiler_alone():
    """It takes a second to import."""
    code = "import sys, kalmannorm; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
