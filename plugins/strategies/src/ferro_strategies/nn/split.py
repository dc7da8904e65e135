"""Split: a division of a parameter over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ferro import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A division of a parameter over ranks, each of which holds a piece.

    Attributes:
        group: the ranks that hold the pieces, in the order of the pieces.
        dim: dimension of the whole array along which it is cut; None when it is cut as a flat row.
        shape: the shape before the cut.
        start: the index of this rank's first row along `dim`, or of its first element of the flat row.
    """

    group: ProcessGroup
    dim: int | None
    shape: tuple[int, ...] | None = None
    start: int | None = None
