"""Divide a number of rows among ranks as evenly as possible."""

from __future__ import annotations


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """Divide `total` as numpy.array_split does: the first parts get one more than the others.

    even_sizes(7, 3) == (3, 2, 2)
    """
    least, longer = divmod(total, parts)
    return (least + 1,) * longer + (least,) * (parts - longer)
