"""The hook implementation of ferro-checkpoint: it offers the command `ferro checkpoint`.

The module lies beside the package because importing the package imports all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro.hookspecs import CommandInfo, hookimpl


def _load() -> Callable[[Sequence[str]], int]:
    from ferro_checkpoint.command.main import main

    return main


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer `ferro checkpoint`."""
    return (CommandInfo(name="checkpoint", summary="look into, check, compare and convert checkpoints", load=_load),)
