"""The hook implementation of ferro-testing: it offers the command `ferro conformance`.

The module lies beside the package because importing the package imports the code that starts processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro.hookspecs import CommandInfo, hookimpl


def _load() -> Callable[[Sequence[str]], int]:
    from ferro_testing import command

    return lambda arguments: command.run(command.parse_options(arguments))


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer `ferro conformance`."""
    return (
        CommandInfo(
            name="conformance", summary="try an installed backend: what it does, refuses and gets wrong", load=_load
        ),
    )
