"""The `ferro` program: it runs the command that is named first, core's own or a plugin's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from ferro.errors import BackendUnavailable, FerroError, PluginError, UsageError
from ferro.hookspecs import CommandInfo
from ferro.plugins.extras import how_to_install, known_commands
from ferro.plugins.registry import by_name, installed, load, sole

_USAGE_STATUS = 2
_INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    A mistake in the command line or the environment, such as a backend that is not there, is one line on stderr and
    status 2; any other failure of ferro's own is one line and status 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except FerroError as exc:
        print(f"ferro: {exc}", file=sys.stderr)  # noqa: T201 - a command talks
        return _USAGE_STATUS if isinstance(exc, UsageError | BackendUnavailable) else 1
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS
    except BrokenPipeError:
        # Nobody reads the output any more; without this the interpreter would fail again when it flushes at exit.
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
    words = (
        2 if "-".join(arguments[:2]) in _available()[0] else 1
    )  # `ferro show x` is the command show-x, if there is one
    return _load("-".join(arguments[:words]))(arguments[words:])


def _help() -> str:
    """Describe every installed command, and name the extras that bring the absent ones."""
    found, errors = _available()
    absent = {name: extra for name, extra in known_commands().items() if name not in found}
    lines = {name: info.summary for name, info in found.items()}
    lines |= {name: f"not installed: {how_to_install(extra)}" for name, extra in sorted(absent.items())}
    width = max(map(len, lines))
    return "\n".join(
        [
            "usage: ferro COMMAND ...\n\nDistributed training for NumPy and CuPy.\n\ncommands:",
            *(f"  {name:<{width}}  {text}" for name, text in lines.items()),
            "\n`ferro COMMAND --help` tells the rest; `ferro --version` prints the version.",
            *(f"ferro: {error}" for error in errors),
        ]
    )


def _available() -> tuple[dict[str, CommandInfo], list[PluginError]]:
    """List the installed commands by name, and the errors of broken plugins and of names claimed twice."""
    offers, broken = installed().survey("ferro_commands", CommandInfo)
    errors = [it.error for it in broken]
    found: dict[str, CommandInfo] = {}
    for name, claimants in by_name(offers).items():
        try:
            found[name] = sole(claimants, f"command name {name!r}").item
        except PluginError as error:
            errors.append(error)
    return found, errors


def _load(name: str) -> Callable[[Sequence[str]], int]:
    """Import one command.

    Raises:
        UsageError: no plugin offers the command; the message names the extra that brings it, or all commands.
        PluginError: two plugins claim the name, or the command's plugin could not be imported; the message names the
            distribution.
    """
    offers, _ = installed().survey("ferro_commands", CommandInfo)
    if claimants := by_name(offers).get(name):
        return load(sole(claimants, f"command name {name!r}"), f"command {name!r}")
    found, errors = _available()
    if errors:  # the command may well be one that a broken plugin would offer
        raise PluginError(f"no installed plugin offers the command {name!r}; {errors[0]}")
    extra = known_commands().get(name)
    if extra is not None:
        raise UsageError(
            f"the command {name!r} is not installed: the extra {extra!r} brings it: {how_to_install(extra)}"
        )
    raise UsageError(f"there is no command {name!r}; there are: {', '.join(found)}; see `ferro --help`")
