"""Runs: the elements of a piece, as consecutive elements of the whole array."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches of elements that are consecutive in the flattened whole array and in the flattened piece.

    Attributes:
        whole: (n,), the index of each one's first element in the whole array; it grows.
        local: (n,), its index in the piece.
        count: (n,), how many elements, none 0.
    """

    whole: Indices
    local: Indices
    count: Indices

    def __len__(self) -> int:
        return len(self.whole)

    def within(self, first: int, last: int) -> Runs:
        """Cut out what lies in elements `first` to `last - 1` of the whole array."""
        starts = np.maximum(self.whole, first)
        ends = np.minimum(self.whole + self.count, last)
        some = ends > starts
        starts, ends = starts[some], ends[some]
        return Runs(starts, self.local[some] + starts - self.whole[some], ends - starts)


def box_runs(
    shape: tuple[int, ...], start: tuple[int, ...], extent: tuple[int, ...], flat: tuple[int, int] | None
) -> Runs:
    """List the runs of a box of an array, or of some of its elements; see `ArrayPiece`.

    A box is cut into as few runs as possible: a row of a matrix's columns is one, a block of whole rows is one.
    """
    first, held = (0, math.prod(extent)) if flat is None else flat
    if held == 0:
        none = np.zeros(0, np.int64)
        return Runs(none, none, none)
    # Dimensions from `inner` on are whole, so the box's elements are consecutive from the dimension before it on.
    inner = len(shape)
    while inner > 0 and extent[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    length = math.prod(extent[outer:])
    numbers = np.arange(first // length, (first + held - 1) // length + 1, dtype=np.int64)
    whole, rest = np.zeros(len(numbers), np.int64), numbers
    for dim in range(outer - 1, -1, -1):
        rest, index = np.divmod(rest, extent[dim])
        whole += (start[dim] + index) * math.prod(shape[dim + 1 :])
    whole += sum(start[dim] * math.prod(shape[dim + 1 :]) for dim in range(outer, len(shape)))
    local = numbers * length - first
    count = np.full(len(numbers), length, np.int64)
    before = max(0, -int(local[0]))  # elements of the first run that come before the piece
    whole[0], local[0], count[0] = whole[0] + before, 0, count[0] - before
    count[-1] -= int(local[-1] + count[-1]) - held
    return Runs(whole, local, count)
