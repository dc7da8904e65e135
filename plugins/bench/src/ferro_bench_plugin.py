"""The hook implementation of ferro-bench: it offers the command `ferro bench`.

The module lies beside the package because importing the package imports all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferro.hookspecs import CommandInfo, hookimpl


def _load() -> Callable[[Sequence[str]], int]:
    import ferro_bench

    return lambda arguments: ferro_bench.run(ferro_bench.parse_options(arguments))


@hookimpl
def ferro_commands() -> Sequence[CommandInfo]:
    """Offer `ferro bench`."""
    return (
        CommandInfo(name="bench", summary="measure collectives by size, beside other libraries in one run", load=_load),
    )
