"""The arguments of a Checkpointer's steps, checked at its entrance, so that a wrong one is an error at once."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import numpy as np

from ferro import UsageError
from ferro_checkpoint.checkpointer.every import is_positive


def check_seconds(**seconds: float | None) -> None:
    """Check times by their names; None is none.

    Raises:
        UsageError: one is no number of seconds.
    """
    for name, value in seconds.items():
        if value is not None and not is_positive(value):
            raise UsageError(f"Checkpointer: {name} is a positive number of seconds, not {value!r}")


def checked_step(step: int) -> int:
    """Return a step as a Python number.

    Raises:
        UsageError: it is none.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"a step is a whole number from 0, not {step!r}")
    return number


def checked_metrics(metrics: Mapping[str, object], rank: int) -> dict[str, float]:
    """Return the metrics as Python numbers; those of other ranks than 0 do not count, whatever they are.

    Raises:
        UsageError: one is no number.
    """
    if rank != 0:
        return {}
    found: dict[str, float] = {}
    for name, value in metrics.items():
        is_number = isinstance(value, int | float | np.number | np.bool_)
        if not is_number and not (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0):
            raise UsageError(f"metric {name!r} is a number, not {type(value).__name__} {value!r:.100}")
        try:
            found[name] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"metric {name!r} is no number: {error}") from error
    return found
