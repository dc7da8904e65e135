"""The `ferro` program: it runs the command that is named first, core's own or a plugin's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ferro.cli.commands import available, extras_of_absent_commands, load
from ferro.errors import FerroError, UsageError
from ferro.plugins.registry import how_to_install

_USAGE_STATUS = 2
_INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    A mistake in the command line or the environment is one line on stderr and status 2; any other
    failure of ferro's own is one line and status 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except FerroError as exc:
        print(f"ferro: {exc}", file=sys.stderr)  # noqa: T201 - a command talks
        return _USAGE_STATUS if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS
    except BrokenPipeError:
        # The reader of the output has left; the interpreter must not trip over it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        from importlib_metadata import version

        print(f"ferro {version('ferro')}")  # noqa: T201 - a command talks
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())  # noqa: T201 - a command talks
        return 0 if arguments else _USAGE_STATUS
    if arguments[0].startswith("-"):
        raise UsageError(f"unrecognized argument {arguments[0]}; see `ferro --help`")
    command: Callable[[Sequence[str]], int] = load(arguments[0])
    return command(arguments[1:])


def _help() -> str:
    """Describe every installed command, and name the extras that bring the absent ones."""
    found, broken = available()
    absent = extras_of_absent_commands(found)
    width = max(map(len, (*found, *absent)))
    lines = ["usage: ferro COMMAND ...", "", "Distributed training for NumPy and CuPy.", "", "commands:"]
    lines += [f"  {name:<{width}}  {info.summary}" for name, info in sorted(found.items())]
    lines += [
        f"  {name:<{width}}  not installed; the extra {extra!r} brings it" for name, extra in sorted(absent.items())
    ]
    lines += ["", "`ferro COMMAND --help` tells the rest; `ferro --version` prints the version."]
    if absent:
        lines.append(f"Extras are installed {how_to_install('EXTRA')}.")
    lines += [f"ferro: {error}" for error in broken]
    return "\n".join(lines)
