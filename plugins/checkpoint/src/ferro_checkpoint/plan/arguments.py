"""Arguments that all calls have, checked at their entrance."""

from __future__ import annotations

import math

import numpy as np

from ferro import ProcessGroup, UsageError


def is_positive(number: object) -> bool:
    """Say whether this is a finite number greater than 0."""
    return isinstance(number, int | float | np.integer | np.floating) and bool(0 < number < math.inf)


def check_common(call: str, group: object, **seconds: float | None) -> None:
    """Check a group, and times by their names, of which None is none.

    Raises:
        UsageError: it is no group, or one is no number of seconds; the message begins with `call`.
    """
    if group is not None and not isinstance(group, ProcessGroup):
        raise UsageError(f"{call}: group is a group of ranks, as ferro.init() returns, or None, not {group!r}")
    for name, value in seconds.items():
        if value is not None and not is_positive(value):
            raise UsageError(f"{call}: {name} is a positive number of seconds, not {value!r}")
