"""Lists in error messages: as much of them as a reader takes in."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 4


def first_few(items: Sequence[str]) -> list[str]:
    """Return the first four, and in a last entry how many more there are."""
    rest = len(items) - _SHOWN
    return [*items[:_SHOWN], f"and {rest} more"] if rest > 0 else list(items)
