"""The description of a collective of large arrays, chunk by chunk.

A layout is a list of moves. Each treats chunk k of its bytes, for every k in turn:

    stage     source                -> this rank's slot
    own       source                -> target
    reduce    all ranks' slots      -> target, and, in two phases, this rank's next slot
    take      another rank's slot   -> target
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.kernels import chunk_count

InPlace: TypeAlias = Callable[[Mapping[int, Array]], object]


class Move(NamedTuple):
    """Bytes that are copied: where they go to, where they come from, how many they are.

    Positions are in the source, the target or, of chunk k, in a slot; `rank` says whose slot is read.
    """

    to: int
    start: int
    nbytes: int
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceStep:
    """The reduction of all ranks' contributions, in order of rank.

    Attributes:
        own: where in the source this rank's contribution begins.
        out: where in the target the result goes; -1 if only the other ranks get it, in two phases.
        nbytes: the size of both.
        offsets: where each rank's contribution begins in its slot.
        reduction: the arithmetic.
    """

    own: int
    out: int
    nbytes: int
    offsets: tuple[int, ...]
    reduction: Reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedLayout:
    """What one rank does in a collective, wherever its arrays are.

    Attributes:
        source_bytes: the size of this rank's data; 0 where it sends none.
        target_bytes: the size of the result; 0 where it gets none.
        length: the bytes of a chunk of each move; the last one may be shorter, and a short move has no later ones.
        largest: the bytes of the longest move on any rank.
        in_place: where in the target the source is; -1 where it is apart from it.
        stage, own, take: the moves.
        reduce: done before `take`.
        two_phase: the ranks publish what they have reduced, at the beginning of their next slots, and `take` reads it.
    """

    source_bytes: int
    target_bytes: int
    length: int
    largest: int
    in_place: int = -1
    stage: tuple[Move, ...] = ()
    own: tuple[Move, ...] = ()
    take: tuple[Move, ...] = ()
    reduce: ReduceStep | None = None
    two_phase: bool = False

    @property
    def chunks(self) -> int:
        """The number of chunks, at least one."""
        return chunk_count(self.largest, self.length)

    @property
    def received_bytes(self) -> int:
        """The bytes that `own` and `take` write."""
        return sum(move.nbytes for move in (*self.own, *self.take))


@dataclass(slots=True, kw_only=True)
class ChunkedOperation:
    """One rank's part in a collective.

    Attributes:
        layout: what it does.
        source: this rank's data, as bytes; None where it sends none.
        target: the result, as bytes; None where it gets none.
        shared: the bytes that others may use in place; None if none.
        writers: the ranks that send data; None for all.
        in_place: runs instead of the chunks when all writers' arrays can be used in place. Its argument maps ranks to
            arrays, in order of rank; no rank changes its array until it has returned on all ranks.
        uneven: ranks may have different `largest`, and the largest is used; a rank may have tried a single round.
    """

    layout: ChunkedLayout
    source: Array | None
    target: Array | None
    shared: Array | None = None
    writers: Sequence[int] | None = None
    in_place: InPlace | None = None
    uneven: bool = False
