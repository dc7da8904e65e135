"""Copies at a neighbour: each rank sends what it holds of a checkpoint to the next rank of a ring.

The ring goes from host to host where there are several, so that the loss of a host, too, leaves one copy of most:

    host A: ranks 0, 1     host B: ranks 2, 3        0 -> 2 -> 1 -> 3 -> 0
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.checkpointer.memory.held import HeldCheckpoint
from ferro_checkpoint.saving.save_plan import SavePlan

if TYPE_CHECKING:
    from ferro import ProcessGroup

_PIECE_BYTES = 16 << 20  # of one message


def ring(hosts: Sequence[str]) -> list[int]:
    """Order the ranks, given their hosts' names, so that neighbours are on different hosts as far as that can be."""
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    seen: Counter[str] = Counter()
    places = []
    for rank, host in enumerate(hosts):
        places.append((seen[host], numbers[host], rank))
        seen[host] += 1
    return [rank for _, _, rank in sorted(places)]


def replicate(
    held: HeldCheckpoint, plan: SavePlan, group: ProcessGroup | None, order: Sequence[int], timeout_s: float
) -> None:
    """Give every rank the small files, and each one's own ranges to the next in the ring; all ranks call it together.

    When it returns, every rank has all that it is to hold.

    Args:
        held: what this rank has written.
        plan: by which it was written.
        group: the group for saves; None for a single rank.
        order: the ring.
        timeout_s: how long each message may take.
    """
    described = _describe(held, plan)
    told: list[dict[str, Any]] = (
        [described] if group is None else group.all_gather_object(described, timeout_s=timeout_s)
    )
    heads: dict[str, list[tuple[int, bytes]]] = {}
    for other in told:
        held.small |= {name: bytes(content) for name, content in other["small"].items()}
        for name, nbytes in other["sizes"].items():
            held.set_size(name, nbytes)
        for file, begin, content in other["heads"]:
            heads.setdefault(file, []).append((begin, bytes(content)))
    for file, parts in heads.items():
        held.small[file] = b"".join(content for _, content in sorted(parts))
    if group is None:
        return
    place = order.index(group.rank)
    after, before = order[(place + 1) % len(order)], order[place - 1]
    ranges = [(str(file), int(first), int(last)) for file, first, last in told[before]["ranges"]]
    copy = held.copy.allocate(sum(last - first for _, first, last in ranges))
    sends = [(after, piece) for block in held.own.filled() for piece in _pieces(block)]
    cuts = np.cumsum(told[before]["blocks"])[:-1].tolist()
    recvs = [(before, piece) for block in np.split(copy, cuts) for piece in _pieces(block)]
    group.exchange(sends, recvs, timeout_s=timeout_s)
    held.hold_copy(ranges, copy)
    group.barrier(timeout_s=timeout_s)


def _describe(held: HeldCheckpoint, plan: SavePlan) -> dict[str, Any]:
    return {
        "small": held.small,
        "sizes": held.sizes,
        "heads": list(_own_heads(held, plan)),
        "ranges": [list(one) for one in held.written()],
        "blocks": [block.nbytes for block in held.own.filled()],
    }


def _own_heads(held: HeldCheckpoint, plan: SavePlan) -> Iterator[list[Any]]:
    """Read those segments of this rank in which headers lie: the file, the first byte, the bytes."""
    segments = plan.segments
    for base, file in zip(plan.layout.bases[:-1], plan.layout.files, strict=True):
        number = bisect_left(segments.begin, base)
        while number < len(segments.begin) and segments.begin[number] < base + len(file.header):
            begin, end = segments.begin[number] - base, segments.end[number] - base
            if segments.writer[number] == plan.rank:
                content = bytearray(end - begin)
                held.read_into(file.name, [memoryview(content)], begin, held.name)
                yield [file.name, begin, bytes(content)]
            number += 1


def _pieces(block: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [block[begin : begin + _PIECE_BYTES] for begin in range(0, block.nbytes, _PIECE_BYTES)]
