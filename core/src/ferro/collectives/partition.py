"""Divide a number of elements, or a buffer, among ranks; pieces of a buffer are views, never copies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ferro.types import Array


def even_sizes(total: int, parts: int) -> tuple[int, ...]:
    """Divide `total` as numpy.array_split does: the first parts get one more than the others.

    even_sizes(7, 3) == (3, 2, 2)
    """
    least, longer = divmod(total, parts)
    return (least + 1,) * longer + (least,) * (parts - longer)


def near_equal(buffer: Array, parts: int) -> list[Array]:
    """Cut a buffer into `parts` views whose sizes differ by at most one; the longer ones are spread evenly."""
    bounds = [buffer.size * i // parts for i in range(parts + 1)]
    return [buffer[bounds[i] : bounds[i + 1]] for i in range(parts)]


def blocks(buffer: Array, counts: Sequence[int]) -> list[Array]:
    """Cut a buffer into views of `counts` elements."""
    ends = list(accumulate(counts))
    return [buffer[end - count : end] for end, count in zip(ends, counts, strict=True)]
