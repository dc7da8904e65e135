"""broadcast, all_gather, gather, scatter and all_to_all of arrays that do not fit a slot, or of uneven blocks.

Each function takes the arguments of the method of `Backend`, describes what this rank does with each chunk as a
`ChunkedOperation`, and runs it. `in_place` replaces the chunks where the ranks' arrays lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.kernels import apart, copy_large, slot_block_start


def broadcast(runner: ChunkedRunner, source: Array, buffer: Array, root: int, deadline: float) -> None:
    """See `Backend.broadcast`; the root sends `source`, which may be `buffer`."""
    data, target = source.view(np.uint8), buffer.view(np.uint8)
    at_root = runner.rank == root

    def in_place(arrays: Mapping[int, Array]) -> None:
        if not at_root:
            copy_large(target, arrays[root])

    own = apart(target, data) if at_root else ()
    sent = data if own else target
    operation = ChunkedOperation(
        length=runner.chunk_bytes(),
        largest=target.size,
        stage=[(sent, 0)] if at_root else (),
        own=own,
        take=() if at_root else [(target, root, 0)],
        source=sent if at_root else None,
        writers=(root,),
        in_place=in_place,
    )
    runner.run(operation, deadline)


def all_gather(runner: ChunkedRunner, block: Array, buffer: Array, counts: Sequence[int], deadline: float) -> None:
    """See `Backend.all_gather`; this rank sends `block`, which may be its block in `buffer`."""
    me, data, mine = runner.rank, buffer.view(np.uint8), block.view(np.uint8)
    sizes = _bytes(counts, buffer)
    parts = blocks(data, sizes)

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            array = arrays[rank]  # the rank's block, or all blocks with its own in place
            copy_large(parts[rank], array if array.size == sizes[rank] else blocks(array, sizes)[rank])

    own = apart(parts[me], mine)
    operation = ChunkedOperation(
        length=runner.chunk_bytes(),
        largest=max(sizes),
        stage=[(mine if own else parts[me], 0)],
        own=own,
        take=[(parts[rank], rank, 0) for rank in runner.others],
        source=mine if own else data,
        in_place=in_place,
    )
    runner.run(operation, deadline)


def gather(
    runner: ChunkedRunner, block: Array, out: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    """See `Backend.gather`."""
    data = block.view(np.uint8)
    sizes = _bytes(counts, block)
    parts = [] if out is None else blocks(out.view(np.uint8), sizes)
    others = [] if out is None else runner.others

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in others:
            copy_large(parts[rank], arrays[rank])

    operation = ChunkedOperation(
        length=runner.chunk_bytes(),
        largest=max(sizes),
        stage=[(data, 0)] if out is None else (),
        own=() if out is None else apart(parts[root], data),
        take=[(parts[rank], rank, 0) for rank in others],
        source=data if out is None else None,
        writers=[rank for rank in range(len(counts)) if rank != root],
        in_place=in_place,
    )
    runner.run(operation, deadline)


def scatter(
    runner: ChunkedRunner, block: Array, source: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    """See `Backend.scatter`."""
    me, data, n = runner.rank, block.view(np.uint8), runner.ranks
    sizes = _bytes(counts, block)
    length = runner.chunk_bytes(n - 1)
    whole = None if source is None else source.view(np.uint8)
    parts = [] if whole is None else blocks(whole, sizes)
    others = [] if whole is None else runner.others

    def in_place(arrays: Mapping[int, Array]) -> None:
        if whole is None:
            copy_large(data, blocks(arrays[root], sizes)[me])

    operation = ChunkedOperation(
        length=length,
        largest=max(sizes),
        stage=[(parts[rank], slot_block_start(root, rank, length)) for rank in others],
        own=() if whole is None else apart(data, parts[me]),
        take=[(data, root, slot_block_start(root, me, length))] if whole is None else (),
        source=whole,
        writers=(root,),
        in_place=in_place,
    )
    runner.run(operation, deadline)


def all_to_all(
    runner: ChunkedRunner,
    source: Array,
    out: Array,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    deadline: float,
    *,
    synchronized: bool,
) -> None:
    """See `Backend.all_to_all`; `synchronized` is True if this rank has tried it in a single round before."""
    me, data, n = runner.rank, source.view(np.uint8), runner.ranks
    length = runner.chunk_bytes(n - 1)
    sizes = _bytes(send_counts, source)
    parts = blocks(data, sizes)
    targets = blocks(out.view(np.uint8), _bytes(recv_counts, out))

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            copy_large(targets[rank], blocks(arrays[rank], sizes)[me])

    # A rank can find its block in another rank's array only if all blocks have one size. If a single round was tried
    # and failed, another rank has uneven blocks.
    even = not synchronized and len({*send_counts, *recv_counts}) == 1
    operation = ChunkedOperation(
        length=length,
        largest=max(sizes),
        stage=[(parts[rank], slot_block_start(me, rank, length)) for rank in runner.others],
        own=apart(targets[me], parts[me]),
        take=[(targets[rank], rank, slot_block_start(rank, me, length)) for rank in runner.others],
        source=data if even else None,
        in_place=in_place,
        uneven=True,
    )
    runner.run(operation, deadline)


def _bytes(counts: Sequence[int], like: Array) -> list[int]:
    return [count * like.itemsize for count in counts]
