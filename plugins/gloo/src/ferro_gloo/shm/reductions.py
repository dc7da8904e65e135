"""Reductions of arrays that do not fit a slot or are uneven, in order of rank.

Each function takes the arguments of the method of `Backend`, and describes a `ChunkedOperation` (see `data_movement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedLayout, ChunkedOperation, Move, ReduceStep
from ferro_gloo.shm.kernels import apart_from, chunk, chunk_count, is_same, slot_block_start

_BLOCK_BYTES = 256 << 10  # reduced in place at once, so that it stays in a core's cache


def all_reduce(runner: ChunkedRunner, source: Array, out: Array, reduction: Reduction) -> ChunkedOperation:
    """See `Backend.all_reduce`; `out` may be `source`."""

    def in_place(arrays: Mapping[int, Array]) -> None:
        _reduce_in_place(runner, list(arrays.values()), out, reduction)

    operation = _reduction(runner, source, out, reduction)
    # Every rank of an operation must look for spans, also one whose own array cannot be used in place.
    operation.in_place = in_place
    operation.shared = out.view(np.uint8) if operation.layout.in_place == 0 else None
    return operation


def reduce(runner: ChunkedRunner, source: Array, out: Array | None, reduction: Reduction) -> ChunkedOperation:
    """See `Backend.reduce`; `out` is None on other ranks than the root, and may be `source`."""
    return _reduction(runner, source, out, reduction)


def reduce_scatter(
    runner: ChunkedRunner, source: Array, out: Array, counts: Sequence[int], reduction: Reduction
) -> ChunkedOperation:
    """See `Backend.reduce_scatter`."""
    me, n, size = runner.rank, runner.ranks, source.itemsize
    starts = [sum(counts[:rank]) for rank in range(n)]
    length = runner.chunk_bytes(n - 1, reduction)

    def in_place(arrays: Mapping[int, Array]) -> None:
        mine = [blocks(array.view(source.dtype), counts)[me] for array in arrays.values()]
        step = _BLOCK_BYTES // size
        for k in range(chunk_count(out.size, step)):
            operands = [chunk(part, k, step) for part in mine]
            runner.reduce_into(reduction, chunk(out, k, step), operands)

    layout = ChunkedLayout(
        source_bytes=source.nbytes,
        target_bytes=out.nbytes,
        length=length,
        largest=max(counts) * size,
        stage=tuple(
            Move(slot_block_start(me, rank, length), starts[rank] * size, counts[rank] * size) for rank in runner.others
        ),
        reduce=_step(runner, (starts[me] * size, 0, out.nbytes), length, reduction),
    )
    sent = source.view(np.uint8)
    return ChunkedOperation(layout=layout, source=sent, target=out.view(np.uint8), shared=sent, in_place=in_place)


def _step(runner: ChunkedRunner, places: tuple[int, int, int], length: int, reduction: Reduction) -> ReduceStep:
    """Reduce what the others have written into their slots' blocks for this rank; `places` are own, out and nbytes."""
    me = runner.rank
    offsets = tuple(0 if rank == me else slot_block_start(rank, me, length) for rank in range(runner.ranks))
    return ReduceStep(own=places[0], out=places[1], nbytes=places[2], offsets=offsets, reduction=reduction)


def _reduction(runner: ChunkedRunner, source: Array, out: Array | None, reduction: Reduction) -> ChunkedOperation:
    """Build the operation in which the ranks that have an `out` get the reduction of whole arrays."""
    place = -1
    if out is not None and is_same(source, out):
        place = 0
    elif out is not None:
        source = apart_from(out, source)
    make = _one_phase if runner.ranks == 2 else _two_phase
    target = None if out is None else out.view(np.uint8)
    return ChunkedOperation(
        layout=make(runner, source, out is not None, place, reduction), source=source.view(np.uint8), target=target
    )


def _one_phase(
    runner: ChunkedRunner, source: Array, has_result: bool, place: int, reduction: Reduction
) -> ChunkedLayout:
    """Have two ranks publish their whole arrays, and reduce those, where they have a result: one round per chunk."""
    length = runner.chunk_bytes(1, reduction)
    step = ReduceStep(own=0, out=0, nbytes=source.nbytes, offsets=(0, 0), reduction=reduction)
    return ChunkedLayout(
        source_bytes=source.nbytes,
        target_bytes=source.nbytes if has_result else 0,
        in_place=place,
        length=length,
        largest=source.nbytes,
        stage=(Move(0, 0, source.nbytes),),
        reduce=step if has_result else None,
    )


def _two_phase(
    runner: ChunkedRunner, source: Array, has_result: bool, place: int, reduction: Reduction
) -> ChunkedLayout:
    """Have each rank reduce its part of the array and publish the result.

    Source: the reduce-scatter and all-gather of Rabenseifner (see `ferro.collectives.direct.direct_all_reduce`), chunk
        by chunk, so that the slots stay in the caches.
    """
    me, n, whole = runner.rank, runner.ranks, source.nbytes
    part = -(-source.size // n) * source.itemsize
    sizes = [max(0, min(part, whole - rank * part)) for rank in range(n)]
    starts = [min(rank * part, whole) for rank in range(n)]
    length = runner.chunk_bytes(n - 1, reduction)
    return ChunkedLayout(
        source_bytes=whole,
        target_bytes=whole if has_result else 0,
        in_place=place,
        length=length,
        largest=part,
        stage=tuple(Move(slot_block_start(me, rank, length), starts[rank], sizes[rank]) for rank in runner.others),
        reduce=_step(runner, (starts[me], starts[me] if has_result else -1, sizes[me]), length, reduction),
        take=tuple(Move(starts[rank], 0, sizes[rank], rank) for rank in runner.others) if has_result else (),
        two_phase=True,
    )


def _reduce_in_place(runner: ChunkedRunner, arrays: Sequence[Array], like: Array, reduction: Reduction) -> None:
    """Reduce this rank's part of all ranks' arrays, and write it to all of them."""
    size = -(-like.size // runner.ranks)
    parts = [chunk(array.view(like.dtype), runner.rank, size) for array in arrays]
    step = _BLOCK_BYTES // like.itemsize
    for k in range(chunk_count(parts[0].size, step)):
        first, *others = operands = [chunk(part, k, step) for part in parts]
        runner.reduce_into(reduction, first, operands)
        for other in others:
            other[...] = first
