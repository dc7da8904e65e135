"""Copies at a neighbour: each rank sends what it holds of a checkpoint to the next rank of a ring.

The ring goes from host to host where there are several, so that the loss of a host, too, leaves one copy of most:

    host A: ranks 0, 1     host B: ranks 2, 3        0 -> 2 -> 1 -> 3 -> 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ferro_checkpoint.checkpointer.memory.held import HeldCheckpoint
from ferro_checkpoint.errors import CheckpointDamaged
from ferro_checkpoint.layout.bundle import SUFFIX
from ferro_checkpoint.layout.header import LENGTH_BYTES, MOST_HEADER_BYTES

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


def replicate(held: HeldCheckpoint, group: ProcessGroup | None, order: Sequence[int], timeout_s: float) -> None:
    """Give every rank the small files, and each one's own ranges to the next in the ring; all ranks call it together.

    When it returns, every rank has all that it is to hold.

    Args:
        held: what this rank has written.
        group: the group for saves; None for a single rank.
        order: the ring.
        timeout_s: how long each message may take.
    """
    _keep_heads(held)
    if group is None:
        return
    told: list[dict[str, Any]] = group.all_gather_object(_describe(held), timeout_s=timeout_s)
    for other in told:
        held.small |= {name: bytes(content) for name, content in other["small"].items()}
        for name, nbytes in other["sizes"].items():
            held.set_size(name, nbytes)
    place = order.index(group.rank)
    after, before = order[(place + 1) % len(order)], order[place - 1]
    ranges = [(str(file), int(first), int(last)) for file, first, last in told[before]["ranges"]]
    copy = held.copy.allocate(sum(last - first for _, first, last in ranges))
    sends = [(after, piece) for block in held.own.filled() for piece in _pieces(block)]
    cuts = np.cumsum(told[before]["blocks"])[:-1]
    recvs = [(before, piece) for block in np.split(copy, cuts) for piece in _pieces(block)]
    group.exchange(sends, recvs, timeout_s=timeout_s)
    held.hold_copy(ranges, copy)
    group.barrier(timeout_s=timeout_s)


def _describe(held: HeldCheckpoint) -> dict[str, Any]:
    return {
        "small": held.small,
        "sizes": held.sizes,
        "ranges": [list(one) for one in held.written()],
        "blocks": [block.nbytes for block in held.own.filled()],
    }


def _pieces(block: np.ndarray) -> list[np.ndarray]:
    return [block[begin : begin + _PIECE_BYTES] for begin in range(0, block.nbytes, _PIECE_BYTES)]


def _keep_heads(held: HeldCheckpoint) -> None:
    """Keep the headers of this rank's files among the small files, for every rank reads them."""
    for file in {file for file, first, _ in held.written() if first == 0 and file.endswith(SUFFIX)}:
        length = bytearray(LENGTH_BYTES)
        try:
            held.read_into(file, [memoryview(length)], 0, held.name)
            nbytes = int.from_bytes(length, "little")
            if nbytes > MOST_HEADER_BYTES:
                continue
            head = bytearray(LENGTH_BYTES + nbytes)
            held.read_into(file, [memoryview(head)], 0, held.name)
        except CheckpointDamaged:
            continue  # another rank has written a part of it
        held.small[file] = bytes(head)
