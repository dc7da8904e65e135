"""Parts: how many rows each rank gets of so many."""

from __future__ import annotations


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """Cut `total` as numpy.array_split does: the first parts have one more.

    even_sizes(7, 3) == (3, 2, 2)
    """
    least, longer = divmod(total, parts)
    return (least + 1,) * longer + (least,) * (parts - longer)
