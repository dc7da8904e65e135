"""The `ferro` command: `run`, `bench`, `conformance`, `show`, `backends`, `--version`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata

from ferro.errors import FerroError, UsageError
from ferro.parser import Parser
from ferro.types import Availability

_CELL_CHARACTERS = 44
_USAGE_STATUS = 2
_INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    A mistake in the command line or the environment is one line on stderr and status 2, any
    other failure of ferro's own one line and status 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except FerroError as exc:
        print(f"ferro: {exc}", file=sys.stderr)  # noqa: T201 - a command talks
        return _USAGE_STATUS if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS
    except BrokenPipeError:
        # Whoever read our output has left; the interpreter must not trip over it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    # What follows `run` is not for argparse's sub-commands: a program's arguments pass untouched.
    if arguments[:1] == ["run"]:
        from ferro.launch import parse_options, run  # as late as possible: --help is quick

        return run(parse_options(arguments[1:]))
    if arguments[:1] == ["bench"]:  # in its own room, with its own options
        from ferro import bench

        return bench.run(bench.parse_options(arguments[1:]))
    if arguments[:1] == ["conformance"]:
        from ferro import conformance

        return conformance.run(conformance.parse_options(arguments[1:]))
    if arguments[:1] == ["show"]:
        from ferro import show

        return show.run(arguments[1:])
    given = _parser().parse_args(arguments)
    if given.command == "backends":
        return _show_backends(as_json=given.json)
    _parser().print_help()
    return _USAGE_STATUS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ferro", description="Distributed training for NumPy and CuPy.")
    parser.add_argument("--version", action="version", version=f"ferro {metadata.version('ferro')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands.add_parser("run", help="run a program as several ranks; see `ferro run --help`")
    commands.add_parser("bench", help="measure collectives; see `ferro bench --help`")
    commands.add_parser("conformance", help="try a backend; see `ferro conformance --help`")
    commands.add_parser("show", help="draw what a strategy would do, such as a pipeline's schedule")
    backends = commands.add_parser("backends", help="what is installed, and whether it can be used")
    backends.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _show_backends(*, as_json: bool) -> int:
    from ferro.backends import available  # as late as possible: --help is quick

    found = available()
    text = json.dumps({name: asdict(value) for name, value in found.items()}, indent=2)
    print(text if as_json else _table(found))  # noqa: T201 - a command talks
    return 0


def _table(found: Mapping[str, Availability]) -> str:
    """Aligned columns: name, usable, version, why, what to do; long texts go on below."""
    rows = [("backend", "usable", "version", "why", "what to do")]
    rows += [
        (name, "yes" if it.ok else "no", it.version or "-", it.reason or "-", it.hint or "-")
        for name, it in found.items()
    ]
    wrapped = [[textwrap.wrap(cell, _CELL_CHARACTERS) for cell in row] for row in rows]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(map(str.ljust, parts, widths)).rstrip()
        for row in wrapped
        for parts in itertools.zip_longest(*row, fillvalue="")
    )
