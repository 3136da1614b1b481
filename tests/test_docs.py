"""The documentation: its code runs, its commands exist, its links lead somewhere, its lists are complete."""

import ast
import doctest
import functools
import inspect
import re
import shlex
import socket
from fnmatch import fnmatch
from pkgutil import resolve_name

import pytest
from pages import DOCS, FENCE, MADE, ROOT

import kalmannorm as kn
from kalmannorm import functional, rules

PACKAGE = ROOT / "kalmannorm"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
ALL = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def named(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """Each fenced block of a page: language, text and the line of the page that it begins on."""
    page = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(page):
        yield found["language"].strip(), found["text"], page[: found.start()].count("\n") + 1


def is_notebook(path):
    """Run by the build of the site."""
    return path.read_text(encoding="utf-8").startswith("---") or path.parent.name == "notebooks"


WITH_CODE = [p for p in PAGES if not is_notebook(p) and any(language == "python" for language, *_ in blocks(p))]


@pytest.fixture
def _alone(monkeypatch, tmp_path):
    """As torchrun with one process would start a script, in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    kept = dict(rules.RULES)
    yield
    rules.RULES.clear()
    rules.RULES.update(kept)


class Runner(doctest.DocTestRunner):
    """Blocks with prompts are doctests, which share their names with the blocks before and behind."""

    def __init__(self):
        flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        super().__init__(optionflags=flags, verbose=False)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("path", WITH_CODE, ids=named)
def test_the_code_of_a_page_runs_from_top_to_bottom(path, tmp_path, capsys):
    names = {"__name__": "__main__", "tmp": tmp_path}
    if path.name == "index.md":  # which shows what a user's script has
        import torchvision

        names["model"] = torchvision.models.resnet18(num_classes=2)
    parser, runner = doctest.DocTestParser(), Runner()
    for language, text, line in blocks(path):
        if language != "python":
            continue
        if text.lstrip().startswith(">>>"):
            test = parser.get_doctest(text, names, path.name, str(path), line)
            failed = runner.run(test, clear_globs=False, out=lambda text: None).failed
            if failed:
                runner.run(test, clear_globs=False)
                pytest.fail(f"{named(path)}, block at line {line}:\n{capsys.readouterr().out}")
            names.update(test.globs)
        else:
            exec(compile("\n" * line + text, str(path), "exec"), names)


NOTEBOOKS = [path for path in PAGES if path.parent.name == "notebooks"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_takes_names_that_the_package_has(path):
    """The build of the site runs notebooks. This is the part of it that a change of the package breaks."""
    code = ast.parse("\n".join(text for language, text, _ in blocks(path) if language.startswith("{code-cell}")))
    known = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            place = [node.module] if isinstance(node, ast.ImportFrom) else []
            for alias in node.names:
                if (where := ".".join([*place, alias.name])).startswith("kalmannorm"):
                    known[alias.asname or alias.name] = resolve_name(where)
    assert known
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), ast.unparse(node)


def commands(path):
    """The lines of a page that call a program: in its blocks without a language of their own, and in backticks."""
    page = path.read_text(encoding="utf-8")
    found = []
    for language, text, _ in blocks(path):
        if language in ("", "sh", "bash", "console"):
            found += re.sub(r"\\\n", " ", text).splitlines()
    found += re.findall(r"`((?:kalmannorm|make) [^`]+)`", FENCE.sub("", page).replace("\n", " "))
    for line in found:
        words = shlex.split(line.removeprefix("$ ").strip(), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words and words[0] in ("kalmannorm", "make"):
            yield words


def of_a_page(words):
    """Whether a command is whole: not a pattern of one, such as `kalmannorm fit ...`."""
    return words[-1] != "--methods" and "..." not in words and not any(word.isupper() for word in words[1:])


COMMANDS = sorted({tuple(words) for path in ALL for words in commands(path) if of_a_page(words)})


def test_commands_are_found():
    assert ("make", "demo") in COMMANDS
    assert ("kalmannorm", "run", "table8", "--scale", "tiny") in COMMANDS
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "make"], ids=" ".join)
def test_make_has_the_target(words):
    makefile = (ROOT / "Makefile").read_text()
    for target in words[1:]:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "kalmannorm"], ids=" ".join)
def test_the_command_line_takes_the_command(words, monkeypatch, capsys):
    from kalmannorm.lab import cli

    called = {}
    load = cli.resolve_name

    def stub(place):
        real = load(place)

        @functools.wraps(real)
        def instead(*args, **kwargs):
            called.update(inspect.signature(real).bind(*args, **kwargs).arguments)
            return 0

        return instead

    monkeypatch.setattr(cli, "resolve_name", stub)
    monkeypatch.setattr(cli, "NEEDED", ())
    if len(words) == 2 and words[1] in (*cli.COMMANDS, *cli.ALIASES):
        return
    assert cli.main(words[1:]) == 0, capsys.readouterr().err
    check(words[1], called)


def check(command, called):
    """What a command names is there: experiments and arms."""
    from kalmannorm.lab import experiments

    if command in ("run", "reproduce", "study"):
        arms = experiments.read(called["name"]).arms
        patterns = called.get("only", "*").split(",")
        assert all(any(fnmatch(arm.name, pattern) for arm in arms) for pattern in patterns), called
    elif command == "fit":
        experiments.config_of(called["config"])


def slug(heading):
    """The anchor that a code host, and MyST, give to a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#{1,6} +(.*)$", text, re.M)}


LINK = re.compile(r"(?<!\\)!?\[(?:[^][]|\[[^]]*\])*\]\(<?([^)\s>]+)>?\)")


@pytest.mark.parametrize("path", ALL, ids=named)
def test_links_within_the_repository_lead_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text(encoding="utf-8")))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


PLACES = ("*.md", "guide/*.md", "notebooks/*.md", "results/README.md")
SITE_PAGES = [ROOT / "README.md", *(page for place in PLACES for page in DOCS.glob(place))]


@pytest.mark.parametrize("path", sorted(SITE_PAGES), ids=named)
def test_prose_lines_have_at_most_100_characters(path):
    """Not tables, pictures, code, or what a program writes between marks."""
    text = MADE.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))
    prose = (line for line in text.splitlines() if not line.startswith(("|", "![", "#", "    ")))
    assert [line for line in prose if len(line) > 100] == []


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_words_are_few():
    assert 6 < len(re.findall(r"^\| \*\*", (DOCS / "glossary.md").read_text(), re.M)) <= 13


def test_what_waits_for_a_machine_is_for_maintainers_alone():
    linking = [named(path) for path in SITE_PAGES if "pending.md" in path.read_text(encoding="utf-8")]
    assert linking == ["docs/maintaining.md"]


def test_each_mean_and_deviation_of_the_pages_is_in_a_table_of_results():
    made = [path for path in DOCS.glob("results/**/*.md") if path.stem != "README"]
    tables = "".join(path.read_text(encoding="utf-8") for path in [*made, ROOT / "history" / "tables.md"])
    there = {(float(mean), float(spread)) for mean, spread in re.findall(r"(-?\d+\.\d+) ± (\d+\.\d+)", tables)}
    assert len(there) > 200
    told = [
        (named(path), float(mean), float(spread))
        for path in SITE_PAGES
        for mean, spread in re.findall(r"(-?\d+\.\d+) ± (\d+\.\d+)", path.read_text(encoding="utf-8"))
    ]
    assert len(told) > 100
    # The tables have two digits, the pages one of them.
    away = lambda one, other: max(abs(one[0] - other[0]), abs(one[1] - other[1])) > 0.0501  # noqa: E731
    assert [each for each in told if all(away(each[1:], other) for other in there)] == []


def test_every_page_is_in_the_site():
    """In a table of contents; studies are by a pattern."""
    listed = set()
    for path in PAGES:
        for language, text, _ in blocks(path):
            if language == "{toctree}":
                for line in text.splitlines():
                    name = re.sub(r"^.*<(.*)>$", r"\1", line.strip())
                    if name and not name.startswith(":"):
                        listed |= {p.resolve() for p in path.parent.glob(name + ".md")}
                        listed |= {p.resolve() for p in [(path.parent / (name + ".md"))] if p.exists()}
    assert {p.resolve() for p in PAGES} - listed == {DOCS / "index.md"}


def test_the_page_of_the_api_has_every_public_name():
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", page, re.M))
    members = {
        module: set(re.findall(r"\w+", found[1])) if (found := re.search(
            rf"automodule:: {re.escape(module.__name__)}\n   :members:(.*)$", page, re.M)) else None
        for module in (functional, rules.pointwise, rules.attention, rules.pooling, rules.shape)
    }  # fmt: skip
    for name in set(kn.__all__) - {"functional", "rules"}:
        assert name in documented, name
    for name in re.findall(r"^\.\. py:data:: (\S+)$", page, re.M):
        resolve_name(name)
    for module, shown in members.items():
        assert shown is not None, module
        assert not shown or shown == set(module.__all__), module
    for name in rules.__all__:
        assert documented & {name, f"kalmannorm.rules.{name}", f"kalmannorm.rules.table.{name}"} or (
            f"automodule:: kalmannorm.rules.{name}\n" in page
        ), name


# What a call in the library says, with … for each part that is filled in.
SAYS = {"ValueError", "TypeError", "RuntimeError", "NotImplementedError", "warn", "_warn_once", "Unknown"}


def template(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def messages():
    """Every message of the core: of errors, warnings, and of beliefs that end."""
    for path in PACKAGE.rglob("*.py"):
        if "lab" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                text = template(node.args[0]) if name in SAYS else None
                if text is not None:
                    yield text


def test_the_page_of_errors_has_every_message_and_no_other():
    page = (DOCS / "guide" / "troubleshooting.md").read_text()
    page = re.sub(r"\n +", " ", FENCE.sub("", page))
    # An entry begins with what is on the screen, or with several of a kind.
    entries = re.findall(r"^- (`[^`]+`(?:, `[^`]+`)*)", page, re.M)
    shown = {text for entry in entries for text in re.findall(r"`([^`]+)`", entry)}
    patterns = {text: re.compile(".*".join(map(re.escape, text.split("…")))) for text in shown}
    said = set(messages())
    assert len(said) > 60
    assert not {message for message in said if not any(pattern.match(message) for pattern in patterns.values())}
    rows = (PACKAGE / "describe.py").read_text()
    stale = {text for text, pattern in patterns.items() if not any(map(pattern.match, said))}
    assert stale == {text for text in stale if f'reason = "{text}"' in rows} | CALLED & stale | TORCHS


# A row of `describe` that is made where no step is; and what torch says.
CALLED = {"the layer was not called"}
TORCHS = {"CheckpointError"}


SITE = DOCS / "_build" / "html"


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs")
@pytest.mark.parametrize("page", [
    "index", "start", "which-normalization", "how-it-works", "evidence", "compared", "glossary", "api",
    "guide/index", "guide/compile", "guide/troubleshooting", "maintaining", "speed", "notebooks/what-you-see",
    "reproduce", "running", "pending", "results/README", "results/studies/batch-sizes-cpu/table",
])  # fmt: skip
def test_pages_fit_on_a_phone_and_on_a_desk(page, reader):
    import browser

    for width, height in (browser.PHONE, browser.DESKTOP):
        reader.set_viewport_size({"width": width, "height": height})
        reader.goto((SITE / f"{page}.html").as_uri())
        facts = reader.evaluate("""() => ({
            over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
            broken: [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
        })""")
        assert facts == {"over": 0, "broken": []}, width


@pytest.fixture(scope="module")
def reader():
    """A page of a browser, which asks nothing of the network."""
    import browser

    with browser.started() as started:
        page = started.new_page()
        asked = []
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else asked.append(r.url))
        yield page
        assert not asked
