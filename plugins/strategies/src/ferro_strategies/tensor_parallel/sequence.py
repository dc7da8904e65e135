"""SequenceCut: batches of sequences, (B, T, D), of which each rank has some positions.

Matrix products take the rows in any order. With time first, a rank's rows lie together, so
that gathering and scattering sequences needs no copy beside the collective's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from ferro import ProcessGroup

from ..nn.arrays import Array
from ..parts import even_sizes
from .cuts import everyones_sizes


@dataclass(frozen=True, slots=True)
class SequenceCut:
    """How sequences are cut.

    Attributes:
        batch: number of sequences, B.
        lengths: positions of each rank; their sum is T.
    """

    batch: int
    lengths: tuple[int, ...]

    @classmethod
    def of_piece(cls, x: Array, group: ProcessGroup) -> SequenceCut:
        """Ask all ranks how long their pieces are; `x` is this rank's, (B, t, D)."""
        return cls(x.shape[0], everyones_sizes(x.shape[1], group, x))

    @classmethod
    def of_whole(cls, x: Array, group: ProcessGroup) -> SequenceCut:
        """Cut sequences (B, T, ...), which all ranks have, as numpy.array_split does."""
        return cls(x.shape[0], even_sizes(x.shape[1], group.world_size))

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each rank."""
        return tuple(length * self.batch for length in self.lengths)

    @property
    def whole(self) -> tuple[int, int]:
        """Return (B, T)."""
        return self.batch, sum(self.lengths)


def rows_of(x: Array, cut: SequenceCut | None) -> Array:
    """Return (..., D) as rows (N, D), time first where sequences are cut; a view if possible."""
    if cut is not None:
        x = x.swapaxes(0, 1)
    return x.reshape(x.size // x.shape[-1], x.shape[-1])


def from_rows(rows: Array, lead: tuple[int, ...], cut: SequenceCut | None) -> Array:
    """View rows (N, D) as (*lead, D), where `rows_of` made them of such an array."""
    if cut is None:
        return rows.reshape(*lead, rows.shape[1])
    batch, length = lead
    return rows.reshape(length, batch, rows.shape[1]).swapaxes(0, 1)
