"""Lists in error messages: as much of them as a reader takes in."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(items: Sequence[str], most: int = 4) -> list[str]:
    """Return the first items, at most so many, and in a last entry how many more there are."""
    rest = len(items) - most
    return [*items[:most], f"and {rest} more"] if rest > 0 else list(items)
