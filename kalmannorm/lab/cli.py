"""The command ``kalmannorm``."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pkgutil import resolve_name
from typing import Any

# Import names of the packages in the extra `lab`.
NEEDED = (
    "datasets", "filelock", "jinja2", "jsonargparse", "lightning", "matplotlib", "pandas", "pycocotools", "rich",
    "sklearn", "timm", "torchmetrics", "torchvision", "yaml",
)  # fmt: skip

# Each subcommand's function and help. The function's keyword arguments are the options; their help is in its docstring.
# A bool that is False by default is a flag. An argument `settings`, if there is one, gets all unknown options.
# Functions are imported when they are called, since their modules take seconds.
COMMANDS = {
    "run": ("kalmannorm.lab.run:run", "Run an experiment: a table of the paper, or a comparison with a search."),
    "list": ("kalmannorm.lab.commands:show", "List experiments, normalizations and data sets."),
    "compare": ("kalmannorm.lab.compare:compare", "Find out which normalization to use on your images."),
    "fit": ("kalmannorm.lab.commands:fit", "Train one network and score it."),
    "validate": ("kalmannorm.lab.commands:score", "Score a run's last checkpoint on validation images."),
    "test": ("kalmannorm.lab.commands:score", "Score a run's last checkpoint on test images."),
    "export": ("kalmannorm.lab.commands:export", "Write the weights of a run, and print the code that loads them."),
    "layers": ("kalmannorm.lab.layers:layers", "Show how accurate priors and posteriors are in a trained network."),
}
# Arguments that follow from the subcommand, and are no options.
FIXED = {"validate": {"split": "validation"}, "test": {"split": "test"}}
# Other names of a subcommand, with the words that replace them on the command line.
ALIASES = {"study": ["run"], "reproduce": ["run"], "demo": ["run", "demo"]}
USAGE = "usage: kalmannorm COMMAND ...; kalmannorm COMMAND --help for details"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The command line without the program's name; by default that of the process.

    Returns:
        The exit code: 0; 1 if a package is missing or a run failed; 2 if the command line is wrong or data are missing;
        130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--help"], ["-h"]):
        print(_usage())
        return 0
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'kalmannorm: {", ".join(missing)} not found: pip install "kalmannorm[lab]"', file=sys.stderr)
        return 1
    if not given or given[0] not in (*COMMANDS, *ALIASES):
        wrong = f"unknown command {given[0]!r}" if given else "expected a command"
        print(f"kalmannorm: {wrong}; there are {', '.join((*COMMANDS, *ALIASES))}", file=sys.stderr)
        return 2
    name, *given = [*ALIASES.get(given[0], given[:1]), *given[1:]]
    from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415

    function = resolve_name(COMMANDS[name][0])
    fixed: dict[str, Any] = FIXED.get(name, {})
    options = {key: each for key, each in inspect.signature(function).parameters.items() if key not in fixed}
    parser = ArgumentParser(f"kalmannorm {name}", exit_on_error=False, epilog=_help(function, "settings"))
    flags = {option for option, parameter in options.items() if parameter.default is False}
    positional = any(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in options.values())
    parser.add_function_arguments(function, as_group=False, as_positional=positional, skip={*flags, *fixed, "settings"})
    for flag in sorted(flags):  # by default jsonargparse wants "--validation true"
        parser.add_argument(f"--{flag}", action="store_true", help=_help(function, flag))
    try:
        known, settings = _split_settings(options, given)
        return function(**parser.parse_args(known).as_dict(), **fixed, **settings) or 0
    except (OSError, ArgumentError, ValueError, FloatingPointError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"kalmannorm: {_one_line(text)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2  # training diverged
    except KeyboardInterrupt:
        print("kalmannorm: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    aliases = [f"{name} ({' '.join(['kalmannorm', *words])})" for name, words in ALIASES.items()]
    also = f"Also: {', '.join(aliases)}."
    return "\n".join([USAGE, "", "Experiments with Kalman Normalization.", "", *lines, "", also])


def _help(function: Callable[..., int | None], option: str) -> str:
    """An argument's description in the docstring."""
    found = re.search(rf"^( +){option}: (.*(?:\n\1 +\S.*)*)$", function.__doc__ or "", re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


def _split_settings(names: Collection[str], given: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split a command line into the options of these names and, if ``settings`` is one of the names, all others."""
    if "settings" not in names:
        return list(given), {}
    known = {f"--{name}" for name in names if name != "settings"} | {"--help", "-h"}
    parts: tuple[list[str], list[str]] = ([], [])
    current = parts[0]  # an option's values go where it goes
    for word in given:
        if word.startswith("--") or word == "-h":
            current = parts[word.partition("=")[0] not in known]
        current.append(word)
    return parts[0], {"settings": parts[1]}


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    # jsonargparse lists every type it tried; shorten that to the option, one type and the value.
    option = r"Parser key \"([\w.]+)\""
    kind = r"(?:<class '(\w+)'>|typing\.Literal\[(.*?)\])"
    wrong = re.match(rf"{option}.*?Expected an? {kind}.* value: (.*)$", line)
    if wrong is None:
        return line
    name, of_type, among, value = wrong.groups()
    return f"--{name}: expected {of_type or f'one of {among}'}; got {value}"


if __name__ == "__main__":
    sys.exit(main())
