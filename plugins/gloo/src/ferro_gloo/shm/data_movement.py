"""broadcast, all_gather, gather, scatter and all_to_all of arrays that do not fit a slot, or of uneven blocks.

Each function takes the arguments of the method of `Backend`, describes what this rank does with each chunk as a
`ChunkedOperation`, and runs it. `write` fills this rank's slot, `read` uses all ranks' slots, and `in_place` replaces
both where the ranks' arrays lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedOperation, ChunkedRunner
from ferro_gloo.shm.kernels import choose_copies, chunk, chunk_count, slot_block, write_slot


def broadcast(runner: ChunkedRunner, buffer: Array, root: int, deadline: float) -> None:
    """See `Backend.broadcast`."""
    data, length = buffer.view(np.uint8), runner.slot_bytes
    at_root = runner.rank == root
    copy_slot, copy = choose_copies(data.size * runner.ranks)

    def write(k: int, slot: Array) -> None:
        write_slot(slot, chunk(data, k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        copy_slot(chunk(data, k, length), slots[root])

    def in_place(arrays: Mapping[int, Array]) -> None:
        if not at_root:
            copy(data, arrays[root])

    operation = ChunkedOperation(
        chunks=chunk_count(data.size, length),
        write=write if at_root else None,
        read=None if at_root else read,
        source=data if at_root else None,
        writers=(root,),
        in_place=in_place,
    )
    runner.run(operation, deadline)


def all_gather(runner: ChunkedRunner, buffer: Array, counts: Sequence[int], deadline: float) -> None:
    """See `Backend.all_gather`."""
    data, length = buffer.view(np.uint8), runner.slot_bytes
    sizes = _bytes(counts, buffer)
    parts = blocks(data, sizes)
    copy_slot, copy = choose_copies(data.size * runner.ranks)

    def write(k: int, slot: Array) -> None:
        write_slot(slot, chunk(parts[runner.rank], k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        for rank in runner.others:
            copy_slot(chunk(parts[rank], k, length), slots[rank])

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            copy(parts[rank], blocks(arrays[rank], sizes)[rank])

    operation = ChunkedOperation(
        chunks=chunk_count(max(sizes), length), write=write, read=read, source=data, in_place=in_place
    )
    runner.run(operation, deadline)


def gather(
    runner: ChunkedRunner, block: Array, out: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    """See `Backend.gather`."""
    data, length = block.view(np.uint8), runner.slot_bytes
    sizes = _bytes(counts, block)
    copy_slot, copy = choose_copies(sum(sizes))
    others: dict[int, Array] = {}  # blocks of the result, at the root
    if out is not None:
        others = dict(enumerate(blocks(out.view(np.uint8), sizes)))
        others.pop(root)[...] = data

    def write(k: int, slot: Array) -> None:
        write_slot(slot, chunk(data, k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        for rank, target in others.items():
            copy_slot(chunk(target, k, length), slots[rank])

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank, target in others.items():
            copy(target, arrays[rank])

    operation = ChunkedOperation(
        chunks=chunk_count(max(sizes), length),
        write=write if out is None else None,
        read=read,
        source=data if out is None else None,
        writers=[rank for rank in range(len(counts)) if rank != root],
        in_place=in_place,
    )
    runner.run(operation, deadline)


def scatter(
    runner: ChunkedRunner, block: Array, source: Array | None, counts: Sequence[int], root: int, deadline: float
) -> None:
    """See `Backend.scatter`."""
    me, data, length = runner.rank, block.view(np.uint8), runner.slot_block_bytes
    sizes = _bytes(counts, block)
    copy_slot, copy = choose_copies(sum(sizes))
    others: dict[int, Array] = {}  # blocks of the source, at the root
    whole = None if source is None else source.view(np.uint8)
    if whole is not None:
        others = dict(enumerate(blocks(whole, sizes)))
        data[...] = others.pop(root)

    def write(k: int, slot: Array) -> None:
        for rank, part in others.items():
            write_slot(slot_block(slot, root, rank, length), chunk(part, k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        copy_slot(chunk(data, k, length), slot_block(slots[root], root, me, length))

    def in_place(arrays: Mapping[int, Array]) -> None:
        if whole is None:
            copy(data, blocks(arrays[root], sizes)[me])

    operation = ChunkedOperation(
        chunks=chunk_count(max(sizes), length),
        write=None if whole is None else write,
        read=read if whole is None else None,
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
    me, length, data = runner.rank, runner.slot_block_bytes, source.view(np.uint8)
    sizes = _bytes(send_counts, source)
    parts = blocks(data, sizes)
    targets = blocks(out.view(np.uint8), _bytes(recv_counts, out))
    copy_slot, copy = choose_copies(out.nbytes * runner.ranks)
    copy(targets[me], parts[me])

    def write(k: int, slot: Array) -> None:
        for rank in runner.others:
            write_slot(slot_block(slot, me, rank, length), chunk(parts[rank], k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        for rank in runner.others:
            copy_slot(chunk(targets[rank], k, length), slot_block(slots[rank], rank, me, length))

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            copy(targets[rank], blocks(arrays[rank], sizes)[me])

    # A rank can find its block in another rank's array only if all blocks have one size. If a single round was tried
    # and failed, another rank has uneven blocks.
    even = not synchronized and len({*send_counts, *recv_counts}) == 1
    operation = ChunkedOperation(
        chunks=chunk_count(max(sizes), length),
        write=write,
        read=read,
        source=data if even else None,
        in_place=in_place,
        uneven=True,
    )
    runner.run(operation, deadline)


def _bytes(counts: Sequence[int], like: Array) -> list[int]:
    return [count * like.itemsize for count in counts]
