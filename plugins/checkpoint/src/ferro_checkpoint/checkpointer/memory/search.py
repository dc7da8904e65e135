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
class Remembered:
    """A checkpoint of which ranks hold something in their memories; the same on all ranks.

    Attributes:
        step: its step.
        name: its name.
        key: `HeldCheckpoint.key`.
        known_to: for each rank, whether it knows the record.
    """

    step: int
    name: str
    key: str
    known_to: list[bool]


def remembered(memory: MemoryStorage, groups: OwnGroups) -> list[Remembered]:
    """List the checkpoints of which a rank holds something; all ranks call it."""
    everyones: list[Any] = groups.gather([[one.key, one.name] for one in memory.held()])
    names = {key: name for one in everyones for key, name in one}
    return [
        Remembered(step_of(name) or 0, name, key, [any(key == other for other, _ in one) for one in everyones])
        for key, name in sorted(names.items())
    ]


def complete(one: Remembered, memory: MemoryStorage, groups: OwnGroups) -> tuple[HeldCheckpoint, Readers] | None:
    """Find out which ranks hold each segment; all ranks call it. A rank that has nothing of it is given the record.

    Returns:
        what this rank holds, and by file, (segments, k), the ranks that hold each segment, filled up with -1; None if
        the ranks do not hold all of it.
    """
    held = next((own for own in memory.held() if own.key == one.key), None)
    if not all(one.known_to):
        held = _share(held, one.name, memory, groups, one.known_to.index(True))
    assert held is not None, "a rank that lacked it was given its record"
    readers = _readers(held, groups)
    return None if readers is None else (held, readers)


def _share(
    held: HeldCheckpoint | None, name: str, memory: MemoryStorage, groups: OwnGroups, root: int
) -> HeldCheckpoint:
    """Give the record, the small files and the sizes to the ranks that have none of it."""
    given = {"small": held.small, "sizes": held.sizes} if held is not None and groups.rank == root else None
    assert groups.steps is not None, "a single rank has what it has"
    told = groups.steps.broadcast_object(given, root, timeout_s=groups.timeout_s)
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
