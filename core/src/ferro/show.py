"""`ferro show`: what an installed strategy draws of itself, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from ferro import strategies
from ferro.errors import UsageError

_HELP = """\
usage: ferro show NAME ...

Draw what a strategy would do, before anything runs; `ferro show NAME --help` tells the rest."""


def run(arguments: Sequence[str]) -> int:
    """Let the strategy that is named first show itself, or help; return the exit status.

    Raises:
        UsageError: nothing is named, or it has nothing to show.
        PluginError: no such strategy is installed.
    """
    shown = [name for name in strategies.available() if strategies.info(name).show is not None]
    there_is = f"There is: {', '.join(shown) or 'nothing'}"
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{_HELP}\n{there_is}.")  # noqa: T201 - a command talks
        return 0
    what = f"what is to be shown? {there_is}"
    if not arguments or arguments[0].startswith("-"):
        raise UsageError(f"{what}; say `ferro show NAME --help`")
    show = strategies.info(arguments[0]).show
    if show is None:
        raise UsageError(f"{arguments[0]} draws nothing; {what}")
    return show(arguments[1:])
