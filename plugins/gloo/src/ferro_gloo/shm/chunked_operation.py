"""The description of a collective of large arrays, chunk by chunk.

An operation says what happens to chunk k of its arrays, for every k in turn:

    stage     array                 -> this rank's slot
    own       array                 -> another array of this rank
    reduce    all ranks' slots      -> array, and, in two phases, this rank's next slot
    take      another rank's slot   -> array
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.kernels import chunk_count

InPlace: TypeAlias = Callable[[Mapping[int, Array]], object]


@dataclass(slots=True, kw_only=True)
class ReduceStep:
    """The reduction of all ranks' contributions, in order of rank.

    Attributes:
        own: this rank's contribution.
        out: the result, of the same size and dtype, or `own` itself; None if only the other ranks get it.
        offsets: the byte offset of each rank's contribution in its slot.
        reduction: the arithmetic.
    """

    own: Array
    out: Array | None
    offsets: Sequence[int]
    reduction: Reduction


@dataclass(slots=True, kw_only=True)
class ChunkedOperation:
    """One rank's part in a collective.

    Arrays are one-dimensional; those of `stage`, `own` and `take` are bytes.

    Attributes:
        length: the bytes of a chunk of each array; the last one may be shorter, and a short array has no later ones.
        largest: the bytes of the longest array on any rank.
        stage: (array, byte offset in this rank's slot).
        own: (target, source).
        take: (array, rank, byte offset in its slot).
        reduce: done before `take`.
        two_phase: the ranks publish what they have reduced, at the beginning of their next slots, and `take` reads it.
        source: this rank's data (uint8) if others may use it in place; None otherwise.
        writers: the ranks that send data; None for all.
        in_place: runs instead of the chunks, after `own`, when all writers' arrays can be used in place. Its argument
            maps ranks to arrays, in order of rank; no rank changes its array until it has returned on all ranks.
        uneven: ranks may have different `largest`; that of the largest rank is used. See `tried`.
        tried: an uneven operation that this rank has tried in a single round before.
    """

    length: int
    largest: int
    stage: Sequence[tuple[Array, int]] = ()
    own: Sequence[tuple[Array, Array]] = ()
    take: Sequence[tuple[Array, int, int]] = ()
    reduce: ReduceStep | None = None
    two_phase: bool = False
    source: Array | None = None
    writers: Sequence[int] | None = None
    in_place: InPlace | None = None
    uneven: bool = False

    @property
    def chunks(self) -> int:
        """The number of chunks, at least one."""
        return chunk_count(self.largest, self.length)

    @property
    def received_bytes(self) -> int:
        """The bytes that `own` and `take` write."""
        return sum(target.nbytes for target, _ in self.own) + sum(target.nbytes for target, _, _ in self.take)
