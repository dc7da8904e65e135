"""A check of an argument of `save`."""

from __future__ import annotations

import operator

from ferro_checkpoint.errors import StateError


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
