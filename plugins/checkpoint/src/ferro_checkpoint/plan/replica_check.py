"""The check that ranks which hold the same elements have the same values, so that a checkpoint is of one state."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xxhash

from ferro import ProcessGroup
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.plan.agreement import Holdings
from ferro_checkpoint.plan.deadline import Deadline
from ferro_checkpoint.plan.file_layout import FileLayout
from ferro_checkpoint.plan.parts import LocalArrays, Part, as_bytes
from ferro_checkpoint.plan.rows import HEADER, Rows

Check = Literal["sampled", "all", "none"]
CHECKS = ("sampled", "all", "none")
_SAMPLE_BYTES = 4096
_BLOCK_BYTES = 4 << 20


def compare_replicas(
    rows: Rows,
    holdings: Holdings,
    layout: FileLayout,
    local: LocalArrays,
    group: ProcessGroup,
    how: Check,
    deadline: Deadline,
) -> None:
    """Compare the elements that several ranks hold; all ranks call it.

    Args:
        rows, holdings, layout: the plan.
        local: this rank's arrays.
        group: the ranks.
        how: "sampled" compares the beginning, the middle and the end of every piece; "all" every byte; "none" nothing.
        deadline: of the collectives.

    Raises:
        StateError: ranks have different values, on all ranks alike; the message names an array and the ranks.
    """
    shared = np.flatnonzero((rows.count > 1) & (rows.tensor != HEADER))
    if how == "none" or not len(shared):
        return
    by_key: dict[int, list[int]] = {}
    for row, key in zip(shared.tolist(), rows.key[shared].tolist(), strict=True):
        by_key.setdefault(key, []).append(row)
    own: dict[int, np.ndarray] = {}
    for key, numbers in by_key.items():
        if group.rank in rows.of(numbers[0]):
            own[key] = np.array([_digest(rows, holdings, layout, local, row, how) for row in numbers], np.uint64)
    digests = group.all_gather_object(
        {str(key): xxhash.xxh3_64_intdigest(each.tobytes()) for key, each in own.items()}, timeout_s=deadline.left_s()
    )
    different = [key for key in by_key if len({each[str(key)] for each in digests if str(key) in each}) > 1]
    if not different:
        return
    key = different[0]
    all_digests = group.all_gather_object(own.get(key), timeout_s=deadline.left_s())
    holders = rows.of(by_key[key][0])
    for place, row in enumerate(by_key[key]):
        values = {rank: int(all_digests[rank][place]) for rank in holders}
        other = next((rank for rank in holders if values[rank] != values[holders[0]]), None)
        if other is not None:
            name = holdings.names[int(rows.tensor[row])]
            raise StateError(
                f"{name!r} is on ranks {holders[0]} and {other}, and its values differ: replicas have gone apart. "
                f"Look for what changes them on some ranks alone; check_replicas='none' saves one rank's"
            )


def _digest(rows: Rows, holdings: Holdings, layout: FileLayout, local: LocalArrays, row: int, how: Check) -> int:
    tensor = int(rows.tensor[row])
    itemsize, address = int(holdings.itemsizes[tensor]), int(layout.addresses[tensor])
    lo, hi = (int(rows.begin[row]) - address) // itemsize, (int(rows.end[row]) - address) // itemsize
    digest = xxhash.xxh3_64()
    step = max((_SAMPLE_BYTES if how == "sampled" else _BLOCK_BYTES) // itemsize, 1)
    places = range(lo, hi, step)
    if how == "sampled" and len(places) > 3:
        places = range(lo, hi - step + 1, max((hi - step - lo) // 2, 1))
    for at in places:
        until = min(at + step, hi)
        part = Part(0, tensor, 0, (until - at) * itemsize, at, until)
        view = local.view(part)
        if view is None:
            copied = np.empty(part.nbytes, np.uint8)
            local.read(part, copied)
            view = as_bytes(copied)
        digest.update(view)
    return digest.intdigest()
