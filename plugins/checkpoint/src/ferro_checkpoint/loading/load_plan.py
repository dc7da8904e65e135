"""LoadPlan: which segments of a checkpoint each rank reads, and which of them it shares with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.plan.needs import Needs, ReadSegments
from ferro_checkpoint.plan.parts import LocalArrays

Indices = NDArray[np.int64]
Readers = Mapping[str, Indices]
"""For each file, an array (segments, k) of the ranks that can read each segment, filled up with -1."""

MOST_EXTRA = 1.02  # bytes that a rank may read, for each byte that it needs, before ranks read for each other


@dataclass(slots=True)
class LoadPlan:
    """The plan of a load.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        segments: of the checkpoint.
        needs: of all ranks.
        local: this rank's arrays.
        own: numbers of the segments that this rank reads for itself.
        shared: for each rank, the numbers of those that it reads for others.
    """

    rank: int
    world_size: int
    segments: ReadSegments
    needs: Needs
    local: LocalArrays
    own: list[int]
    shared: list[list[int]]

    @property
    def read_bytes(self) -> int:
        """Bytes that this rank reads."""
        sizes = self.segments.end - self.segments.begin
        return int(sizes[self.own].sum() + sizes[self.shared[self.rank]].sum())


def plan_reads(
    segments: ReadSegments,
    needs: Needs,
    local: LocalArrays,
    rank: int,
    world_size: int,
    readers: Readers | None,
    path: str,
) -> LoadPlan:
    """Choose who reads what.

    Every rank reads what it needs, unless segments are so long that it would read far more: then each segment is read
    by one of the ranks that need it, which sends the others their parts.

    Args:
        segments, needs, local: see `LoadPlan`.
        rank: this rank.
        world_size: number of ranks.
        readers: who can read what; None if every rank can read everything.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointDamaged: no rank can read a segment that is needed.
    """
    touched = np.stack([needs.touched(each) for each in range(world_size)])
    sizes = segments.end - segments.begin
    if readers is None and all(
        int(sizes[touched[each]].sum()) <= MOST_EXTRA * needs.nbytes(each) for each in range(world_size)
    ):
        return LoadPlan(
            rank,
            world_size,
            segments,
            needs,
            local,
            np.flatnonzero(touched[rank]).tolist(),
            [[] for _ in range(world_size)],
        )
    if world_size == 1 and readers is None:
        return LoadPlan(rank, 1, segments, needs, local, np.flatnonzero(touched[0]).tolist(), [[]])
    return _share(segments, needs, local, rank, touched, readers, path)


def _share(
    segments: ReadSegments,
    needs: Needs,
    local: LocalArrays,
    rank: int,
    touched: NDArray[np.bool_],
    readers: Readers | None,
    path: str,
) -> LoadPlan:
    world_size = len(touched)
    load = [0] * world_size
    own: list[int] = []
    shared: list[list[int]] = [[] for _ in range(world_size)]
    sizes = (segments.end - segments.begin).tolist()
    counts = touched.sum(axis=0)
    columns = touched.T
    later = []
    for number in np.flatnonzero(counts).tolist():
        takers = np.flatnonzero(columns[number]).tolist()
        able = takers if readers is None else _able(segments, readers, number)
        if not able:
            name = segments.names[int(segments.file[number])]
            raise CheckpointDamaged(f"{path}: no rank is left that has segment {number} of {name}", path=path)
        later.append((number, takers, able))
    # Segments that one rank can read come first, so that the others even out the load.
    for number, takers, able in sorted(later, key=lambda item: len(item[2])):
        preferred = [each for each in able if each in takers] or able
        reader = min(preferred, key=load.__getitem__)
        load[reader] += sizes[number]
        if takers != [reader]:
            shared[reader].append(number)
        elif reader == rank:
            own.append(number)
    return LoadPlan(rank, world_size, segments, needs, local, sorted(own), [sorted(numbers) for numbers in shared])


def _able(segments: ReadSegments, readers: Readers, number: int) -> list[int]:
    ranks = readers[segments.names[int(segments.file[number])]][int(segments.within[number])]
    return [int(rank) for rank in ranks if rank >= 0]
