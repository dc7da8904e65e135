"""`ferro checkpoint`: look into checkpoints, check, compare and convert them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ferro.errors import FerroError, UsageError
from ferro_checkpoint.command.options import parse_options
from ferro_checkpoint.command.text import printable

_USAGE_STATUS = 2


def main(arguments: Sequence[str]) -> int:
    """Run the command line after `ferro checkpoint`; return the exit status.

    It is 2 for a mistake in the command line, 1 for damage, a difference or any other failure, and otherwise 0. An
    error is one line on stderr.
    """
    try:
        given = parse_options(arguments)
        status: int = given.run(given)
        sys.stdout.flush()  # A reader that has gone is found here, and not when the interpreter ends.
    except FerroError as error:
        print(f"ferro checkpoint: {printable(str(error))}", file=sys.stderr)  # noqa: T201 - a command talks
        return _USAGE_STATUS if isinstance(error, UsageError) else 1
    return status
