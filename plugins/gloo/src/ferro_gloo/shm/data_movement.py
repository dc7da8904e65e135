"""broadcast, all_gather, gather, scatter and all_to_all of arrays that do not fit a slot, or of uneven blocks.

Each function takes the arguments of the method of `Backend`, and describes what this rank does with each chunk as a
`ChunkedOperation`. `in_place` replaces the chunks where the ranks' arrays lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedLayout, ChunkedOperation, Move
from ferro_gloo.shm.kernels import apart_from, as_bytes, copy_large, is_same, slot_block_start


def broadcast(runner: ChunkedRunner, source: Array | None, out: Array | None, root: int) -> ChunkedOperation:
    """See `Backend.broadcast`; only the root has a `source`, and may have no `out`."""
    sent = as_bytes(source)
    target = None if sent is not None and out is not None and is_same(sent, out) else as_bytes(out)
    if sent is not None and target is not None:
        sent = apart_from(target, sent)
    nbytes = _size(sent) or _size(target)

    def in_place(arrays: Mapping[int, Array]) -> None:
        if target is not None:
            copy_large(target, arrays[root])

    layout = ChunkedLayout(
        source_bytes=_size(sent),
        target_bytes=_size(target),
        length=runner.chunk_bytes(),
        largest=nbytes,
        stage=(Move(0, 0, nbytes),) if sent is not None else (),
        own=(Move(0, 0, nbytes),) if sent is not None and target is not None else (),
        take=(Move(0, 0, nbytes, root),) if sent is None else (),
    )
    return ChunkedOperation(layout=layout, source=sent, target=target, shared=sent, writers=(root,), in_place=in_place)


def all_gather(runner: ChunkedRunner, block: Array, buffer: Array, counts: Sequence[int]) -> ChunkedOperation:
    """See `Backend.all_gather`; this rank sends `block`, which may be its block in `buffer`."""
    me, target = runner.rank, buffer.view(np.uint8)
    sent: Array = block.view(np.uint8)
    sizes, starts = _sizes(counts, buffer)
    is_in_place = is_same(sent, target[starts[me] :])
    if not is_in_place:
        sent = apart_from(target, sent)

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            copy_large(target[starts[rank] :][: sizes[rank]], arrays[rank])
        if not is_in_place:
            copy_large(target[starts[me] :][: sizes[me]], sent)

    layout = ChunkedLayout(
        source_bytes=sent.size,
        target_bytes=target.size,
        in_place=starts[me] if is_in_place else -1,
        length=runner.chunk_bytes(),
        largest=max(sizes),
        stage=(Move(0, 0, sizes[me]),),
        own=() if is_in_place else (Move(starts[me], 0, sizes[me]),),
        take=tuple(Move(starts[rank], 0, sizes[rank], rank) for rank in runner.others),
    )
    return ChunkedOperation(layout=layout, source=sent, target=target, shared=sent, in_place=in_place)


def gather(
    runner: ChunkedRunner, block: Array, out: Array | None, counts: Sequence[int], root: int
) -> ChunkedOperation:
    """See `Backend.gather`."""
    sent, target = as_bytes(block), as_bytes(out)
    sizes, starts = _sizes(counts, block)
    if target is not None and sent is not None:
        sent = None if is_same(sent, target[starts[root] :]) else apart_from(target, sent)

    def in_place(arrays: Mapping[int, Array]) -> None:
        if target is None:
            return
        for rank, array in arrays.items():
            copy_large(target[starts[rank] :][: sizes[rank]], array)
        if sent is not None:
            copy_large(target[starts[root] :][: sizes[root]], sent)

    layout = ChunkedLayout(
        source_bytes=_size(sent),
        target_bytes=_size(target),
        length=runner.chunk_bytes(),
        largest=max(sizes),
        stage=(Move(0, 0, _size(sent)),) if target is None else (),
        own=(Move(starts[root], 0, sizes[root]),) if target is not None and sent is not None else (),
        take=() if target is None else tuple(Move(starts[rank], 0, sizes[rank], rank) for rank in runner.others),
    )
    return ChunkedOperation(
        layout=layout,
        source=sent,
        target=target,
        shared=sent if target is None else None,
        writers=[rank for rank in range(len(counts)) if rank != root],
        in_place=in_place,
    )


def scatter(
    runner: ChunkedRunner, block: Array, source: Array | None, counts: Sequence[int], root: int
) -> ChunkedOperation:
    """See `Backend.scatter`."""
    me, target, sent = runner.rank, as_bytes(block), as_bytes(source)
    sizes, starts = _sizes(counts, block)
    length = runner.chunk_bytes(runner.ranks - 1)
    if target is not None and sent is not None:
        if is_same(sent[starts[me] :], target):
            target = None
        else:
            sent = apart_from(target, sent)

    def in_place(arrays: Mapping[int, Array]) -> None:
        if target is not None:
            copy_large(target, arrays[root][starts[me] :])

    staged = [] if sent is None else runner.others
    layout = ChunkedLayout(
        source_bytes=_size(sent),
        target_bytes=_size(target),
        length=length,
        largest=max(sizes),
        stage=tuple(Move(slot_block_start(root, rank, length), starts[rank], sizes[rank]) for rank in staged),
        own=(Move(0, starts[me], sizes[me]),) if sent is not None and target is not None else (),
        take=(Move(0, slot_block_start(root, me, length), sizes[me], root),) if sent is None else (),
    )
    return ChunkedOperation(layout=layout, source=sent, target=target, shared=sent, writers=(root,), in_place=in_place)


def all_to_all(
    runner: ChunkedRunner,
    source: Array,
    out: Array,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    synchronized: bool,
) -> ChunkedOperation:
    """See `Backend.all_to_all`; `synchronized` is True if this rank has tried it in a single round before."""
    me, target = runner.rank, out.view(np.uint8)
    sent = apart_from(target, source.view(np.uint8))
    length = runner.chunk_bytes(runner.ranks - 1)
    sizes, starts = _sizes(send_counts, source)
    target_sizes, target_starts = _sizes(recv_counts, out)

    def in_place(arrays: Mapping[int, Array]) -> None:
        for rank in runner.others:
            copy_large(target[target_starts[rank] :][: sizes[rank]], arrays[rank][starts[me] :])
        copy_large(target[target_starts[me] :][: sizes[me]], sent[starts[me] :])

    layout = ChunkedLayout(
        source_bytes=sent.size,
        target_bytes=target.size,
        length=length,
        largest=max(sizes),
        stage=tuple(Move(slot_block_start(me, rank, length), starts[rank], sizes[rank]) for rank in runner.others),
        own=(Move(target_starts[me], starts[me], sizes[me]),),
        take=tuple(
            Move(target_starts[rank], slot_block_start(rank, me, length), target_sizes[rank], rank)
            for rank in runner.others
        ),
    )
    # A rank can find its block in another rank's array only if all blocks have one size. If a single round was tried
    # and failed, another rank has uneven blocks.
    even = not synchronized and len({*send_counts, *recv_counts}) == 1
    return ChunkedOperation(
        layout=layout, source=sent, target=target, shared=sent if even else None, in_place=in_place, uneven=True
    )


def _size(array: Array | None) -> int:
    return 0 if array is None else array.size


def _sizes(counts: Sequence[int], like: Array) -> tuple[list[int], list[int]]:
    """Compute where blocks begin, and their sizes, in bytes."""
    sizes = [count * like.itemsize for count in counts]
    return sizes, [0, *accumulate(sizes)][:-1]
