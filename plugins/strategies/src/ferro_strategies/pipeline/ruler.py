"""The ruler: at which times a picture of a timeline has its marks."""

from __future__ import annotations

import math


def marks(until: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten from 0 to `until`, at most `most` + 1."""
    if until <= 0 or most < 1:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(until / most))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * most >= until)
    return [step * index for index in range(math.floor(until / step) + 1)]
