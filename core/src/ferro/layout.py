"""Layout: an array cut along axis 0 into one block for every rank.

What depends on shapes and sizes only is remembered: programs repeat their calls.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from ferro.errors import UsageError

_REMEMBERED = 128  # few, for with sizes of many ranks they are long


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each rank's block lies in the whole, along axis 0, in order of rank.

    Attributes:
        shape: the whole's shape.
        rows: each block's size along axis 0.
        counts: each block's number of elements.
        places: where each block lies, in rows of the whole.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    counts: tuple[int, ...]
    places: tuple[slice, ...]

    @classmethod
    def of(cls, rows: Sequence[int], row_shape: tuple[int, ...]) -> Layout:
        """Return the layout of blocks of so many rows, each row of one shape."""
        row = math.prod(row_shape)
        ends = [0, *accumulate(rows)]
        return cls(
            shape=(sum(rows), *row_shape),
            rows=tuple(rows),
            counts=tuple(count * row for count in rows),
            places=tuple(slice(start, end) for start, end in pairwise(ends)),
        )

    def block_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's block."""
        return (self.rows[rank], *self.shape[1:])


@lru_cache(maxsize=_REMEMBERED)
def gathered(
    shape: tuple[int, ...], sizes: tuple[int, ...] | None, rank: int, world_size: int
) -> Layout:
    """Return the layout of all ranks' blocks together, where this rank's has `shape`.

    A 0-d array counts as one row.

    Raises:
        UsageError: `sizes` says something else of this rank.
    """
    own = shape[0] if shape else 1
    rows = (own,) * world_size if sizes is None else sizes
    if rows[rank] != own:
        raise UsageError(f"sizes[{rank}] is {rows[rank]}, but x has {own} rows on this rank")
    return Layout.of(rows, shape[1:])


@lru_cache(maxsize=_REMEMBERED)
def cut(
    shape: tuple[int, ...],
    sizes: tuple[int, ...] | None,
    world_size: int,
    op: str,
    name: str = "sizes",
) -> Layout:
    """Return the layout of an array of `shape` that is cut into one block for every rank.

    Raises:
        UsageError: it cannot be cut so.
    """
    if not shape:
        raise UsageError(f"{op} cuts its input along axis 0, and a 0-d array has none")
    total = shape[0]
    if sizes is None:
        if total % world_size:
            raise UsageError(
                f"{op} cuts axis 0 into {world_size} equal blocks, but it has {total} rows: "
                f"give {name}= for uneven ones, or pad it"
            )
        sizes = (total // world_size,) * world_size
    if sum(sizes) != total:
        raise UsageError(f"{name} sum up to {sum(sizes)}, but axis 0 has {total} rows")
    return Layout.of(sizes, shape[1:])


def checked_sizes(
    sizes: Sequence[int] | None, world_size: int, name: str = "sizes"
) -> tuple[int, ...] | None:
    """Return sizes as non-negative ints, one a rank; None where none are given.

    Raises:
        UsageError: they are something else.
    """
    if sizes is None:
        return None
    try:
        rows = tuple(int(operator.index(size)) for size in sizes)  # int: True is one row
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {world_size} whole numbers, not {sizes!r}") from None
    if len(rows) != world_size or min(rows) < 0:
        raise UsageError(f"{name} must be {world_size} non-negative whole numbers, not {[*rows]}")
    return rows
