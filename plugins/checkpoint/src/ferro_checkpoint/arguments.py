"""Checks of arguments that `save`, `load` and others have in common."""

from __future__ import annotations

import operator

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError


def check_group(group: object) -> None:
    """Check that this is a group, or None for this process alone.

    Raises:
        StateError: it is not.
    """
    if group is not None and not isinstance(group, ProcessGroup):
        raise StateError(f"group is {group!r}: give the process group of the ranks that have the state, or None")


def check_timeout(timeout_s: object) -> None:
    """Check that this is a positive number of seconds.

    Raises:
        StateError: it is not.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise StateError(f"timeout_s is {timeout_s!r}: give a positive number of seconds")


def checked_step(step: object) -> int | None:
    """Return the number of a step, or None for none.

    Raises:
        StateError: it is neither None nor a whole number from 0.
    """
    if step is None:
        return None
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise StateError(f"step is {step!r}: give a whole number from 0, or None")
    return number
