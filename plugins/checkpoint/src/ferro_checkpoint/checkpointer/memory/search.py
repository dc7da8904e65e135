"""What the ranks of a group hold together in their memories, and who can read which segment of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.checkpointer.catalog import step_of
from ferro_checkpoint.checkpointer.memory.held import HeldCheckpoint
from ferro_checkpoint.layout.record import RECORD_NAME, FileRecord, Record

if TYPE_CHECKING:
    from ferro_checkpoint.checkpointer.memory.memory_storage import MemoryStorage
    from ferro_checkpoint.checkpointer.own_groups import OwnGroups

Readers = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class HeldTogether:
    """A checkpoint of which the ranks hold every segment.

    Attributes:
        held: what this rank holds of it.
        step: its step.
        readers: by file, (segments, k): the ranks that hold each segment, filled up with -1.
    """

    held: HeldCheckpoint
    step: int
    readers: Readers


def held_together(memory: MemoryStorage, groups: OwnGroups) -> list[HeldTogether]:
    """List the checkpoints that are complete in the memories of the ranks, the newest first; all ranks call it."""
    everyones: list[Any] = groups.gather([[one.key, one.name] for one in memory.held()])
    names = {key: name for one in everyones for key, name in one}
    found: list[HeldTogether] = []
    for key in sorted(names, key=lambda key: (step_of(names[key]) or 0, key), reverse=True):
        held = next((one for one in memory.held() if one.key == key), None)
        has = [any(key == other for other, _ in one) for one in everyones]
        if not all(has):
            held = _share(held, names[key], memory, groups, has.index(True))
        assert held is not None, "a rank that lacks it was given its record"
        readers = _readers(held, groups)
        if readers is not None:
            found.append(HeldTogether(held, step_of(names[key]) or 0, readers))
    return found


def _share(
    held: HeldCheckpoint | None, name: str, memory: MemoryStorage, groups: OwnGroups, root: int
) -> HeldCheckpoint:
    """Give the record, the small files and the sizes to the ranks that have none of it."""
    given = {"small": held.small, "sizes": held.sizes} if held is not None and groups.rank == root else None
    assert groups.steps is not None, "a single rank has what it has"
    told = groups.steps.broadcast_object(given, root)
    if held is None:
        held = memory.other
        held.begin(name)
        held.small = {file: bytes(content) for file, content in told["small"].items()}
        for file, nbytes in told["sizes"].items():
            held.set_size(file, nbytes)
    return held


def _readers(held: HeldCheckpoint, groups: OwnGroups) -> Readers | None:
    """Find out which ranks hold each segment; None if a segment is held by none, or a file's head is not known."""
    record = Record.decode(held.small[RECORD_NAME], f"{held.name}/{RECORD_NAME}")
    everyones: list[Any] = groups.gather({file: held.ranges(file) for file in record.files})
    readers: Readers = {}
    for file, described in record.files.items():
        if len(held.small.get(file, b"")) == described.nbytes:
            readers[file] = np.tile(np.arange(groups.world_size), (len(described.ends), 1))
            continue
        by_segment = _holders(described, [one[file] for one in everyones])
        if by_segment is None or file not in held.small:
            return None
        readers[file] = by_segment
    return readers


def _holders(described: FileRecord, everyones: Sequence[NDArray[np.int64]]) -> NDArray[np.int64] | None:
    ends = np.array(described.ends, np.int64)
    begins = np.concatenate(([0], ends[:-1]))
    holds = np.stack([_covers(ranges, begins, ends) for ranges in everyones], axis=1)
    counts = holds.sum(axis=1)
    if len(ends) and counts.min() == 0:
        return None
    order = np.argsort(~holds, axis=1, kind="stable")[:, : int(counts.max(initial=1))]
    return np.where(np.arange(order.shape[1]) < counts[:, None], order, -1)


def _covers(ranges: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each segment whether it lies within ranges (sorted, each a first byte and one more than the last)."""
    if not len(ranges):
        return np.zeros(len(begins), bool)
    new = np.concatenate(([True], ranges[1:, 0] > np.maximum.accumulate(ranges[:, 1])[:-1]))
    firsts = ranges[new, 0]
    lasts = np.maximum.reduceat(ranges[:, 1], np.flatnonzero(new))
    at = np.searchsorted(firsts, begins, "right") - 1
    return (at >= 0) & (ends <= lasts[at])
