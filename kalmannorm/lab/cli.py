"""The command ``kalmannorm``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence

# What the extra brings, by the names that are imported.
NEEDED = (
    "datasets", "jsonargparse", "lightning", "matplotlib", "pycocotools", "rich", "sklearn", "tensorboard",
    "torchmetrics", "torchvision", "yaml",
)  # fmt: skip

# A function each, whose keyword arguments are the options; its docstring is the help. A bool that is False by default
# is a flag, and what is not an option of its own goes to an argument `settings`, if there is one.
COMMANDS = {
    "demo": "kalmannorm.lab.demo:demo",
    "fit": "kalmannorm.lab.commands:fit",
    "validate": "kalmannorm.lab.commands:on_validation",
    "test": "kalmannorm.lab.commands:on_test",
    "compare": "kalmannorm.lab.compare:compare",
    "reproduce": "kalmannorm.lab.reproduce:reproduce",
    "study": "kalmannorm.lab.study:study",
    "layers": "kalmannorm.lab.layers:layers",
    "coverage": "kalmannorm.lab.coverage:coverage",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The command line without the program's name; that of the process if not given.

    Returns:
        The exit code: 0, 1 where a package is missing or a run failed, 2 where the command line is wrong or data are
        missing, 130 after Ctrl-C.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f'kalmannorm: {", ".join(missing)} not found: pip install "kalmannorm[lab]"', file=sys.stderr)
        return 1
    # Only now: all of these need the extra.
    from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415

    given = list(sys.argv[1:] if arguments is None else arguments)
    # The others are loaded for the list of all subcommands alone.
    wanted = given[:1] if given and given[0] in COMMANDS else list(COMMANDS)
    functions = {name: _load(COMMANDS[name]) for name in wanted}
    parser = ArgumentParser("kalmannorm", description="The laboratory of Kalman Normalization.", exit_on_error=False)
    subcommands = parser.add_subcommands(dest="command")
    for name, function in functions.items():
        subparser = ArgumentParser(exit_on_error=False, epilog=_help(function, "settings"))
        flags = {option for option, default in _options(function) if default is False}
        subparser.add_function_arguments(
            function, as_group=False, as_positional=_has_positional(function), skip={*flags, "settings"}
        )
        for flag in sorted(flags):  # left to itself, jsonargparse wants "--validation true"
            subparser.add_argument(f"--{flag}", action="store_true", help=_help(function, flag))
        subcommands.add_subcommand(name, subparser, help=(function.__doc__ or "").partition("\n")[0])
    try:
        own, settings = _own_and_settings(functions.get(given[0]) if given else None, given)
        parsed = parser.parse_args(own)
        code = functions[parsed.command](**parsed[parsed.command].as_dict(), **settings)
    except (ArgumentError, ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"kalmannorm: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # a training that diverged
        print(f"kalmannorm: {_one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kalmannorm: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _load(place: str) -> Callable[..., int | None]:
    module, _, name = place.partition(":")
    function: Callable[..., int | None] = getattr(importlib.import_module(module), name)
    return function


def _options(function: Callable[..., int | None]) -> Iterator[tuple[str, object]]:
    for name, parameter in inspect.signature(function).parameters.items():
        yield name, parameter.default


def _has_positional(function: Callable[..., int | None]) -> bool:
    """Whether what it cannot do without is given by its place, and not as an option."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters)


def _help(function: Callable[..., int | None], option: str) -> str:
    """What the docstring says of it, to the end of the lines that are indented deeper."""
    found = re.search(rf"^( +){option}: (.*(?:\n\1 +\S.*)*)$", function.__doc__ or "", re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


def _own_and_settings(
    function: Callable[..., int | None] | None, given: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """What of a command line is for the function itself, and the rest as its argument ``settings``, if it has one."""
    names = dict(_options(function)) if function else {}
    if "settings" not in names:
        return list(given), {}
    known = {f"--{name}" for name in names if name != "settings"} | {"--help", "-h"}
    parts: tuple[list[str], list[str]] = ([], [])
    current = parts[0]  # what follows an option is its value
    for word in given:
        if word.startswith("--") or word == "-h":
            current = parts[word.partition("=")[0] not in known]
        current.append(word)
    return parts[0], {"settings": parts[1]}


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    # jsonargparse recounts every type it has tried; the option, one type and the value are what one needs.
    option = rf"Parser key \"(?:(?:{'|'.join(COMMANDS)})\.)?([\w.]+)\""
    wrong = re.match(rf"{option}.*?Expected an? <class '(\w+)'>.* value: (.*)$", line)
    return "--{}: expected {}; got {}".format(*wrong.groups()) if wrong else line


if __name__ == "__main__":
    sys.exit(main())
