"""The hook implementation of ferro-testing: it offers the commands `ferro conformance` and `ferro show collective`.

The module lies beside the package because importing the package imports the code that starts processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro.hookspecs import CommandInfo, hookimpl


def _load_conformance() -> Callable[[Sequence[str]], int]:
    from ferro_testing import command

    return lambda arguments: command.run(command.parse_options(arguments))


def _load_show_collective() -> Callable[[Sequence[str]], int]:
    from ferro_testing.schedules.show import show

    return show


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer `ferro conformance` and `ferro show collective`."""
    conformance = "try an installed backend: what it does, refuses and gets wrong"
    show_collective = "draw the algorithms of a collective: which rank sends what to whom, round by round"
    return (
        CommandInfo(name="conformance", summary=conformance, load=_load_conformance),
        CommandInfo(name="show-collective", summary=show_collective, load=_load_show_collective),
    )
