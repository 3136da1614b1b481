"""The command ``kalmannorm``."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence

NEEDED = ("jsonargparse", "lightning", "matplotlib", "rich", "sklearn", "torchmetrics")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: The command line without the program's name; that of the process if not given.

    Returns:
        The exit code: 0, 1 where a package is missing, 2 where the command line is wrong, 130 after Ctrl-C.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"kalmannorm: {', '.join(missing)} not found: pip install kalmannorm[lab]", file=sys.stderr)
        return 1
    # Only now: all of these need the extra.
    from jsonargparse import ArgumentError, ArgumentParser  # noqa: PLC0415

    from kalmannorm.lab.coverage import coverage  # noqa: PLC0415
    from kalmannorm.lab.demo import demo  # noqa: PLC0415

    commands: dict[str, Callable[..., None]] = {"demo": demo, "coverage": coverage}
    parser = ArgumentParser("kalmannorm", description="The laboratory of Kalman Normalization.", exit_on_error=False)
    subcommands = parser.add_subcommands(dest="command")
    for name, function in commands.items():
        subparser = ArgumentParser(exit_on_error=False)
        # As a flag: left to itself, jsonargparse wants "--validation true".
        subparser.add_function_arguments(function, as_group=False, skip={"validation"})
        if function is demo:
            subparser.add_argument(
                "--validation", action="store_true", help="Score on validation images, not on test images."
            )
        subcommands.add_subcommand(name, subparser, help=(function.__doc__ or "").partition("\n")[0])
    try:
        parsed = parser.parse_args(arguments)
        commands[parsed.command](**parsed[parsed.command].as_dict())
    except (ArgumentError, ValueError) as error:
        print(f"kalmannorm: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kalmannorm: interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    # jsonargparse recounts every type it has tried; the option, one type and the value are what one needs.
    wrong = re.match(r"Parser key \"(?:.*\.)?(\w+)\".*?Expected an? <class '(\w+)'>.* value: (.*)$", line)
    return "--{}: expected {}; got {}".format(*wrong.groups()) if wrong else line


if __name__ == "__main__":
    sys.exit(main())
