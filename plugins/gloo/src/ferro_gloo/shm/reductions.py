"""Reductions of arrays that do not fit a slot or are uneven, in order of rank.

Each function takes the arguments of the method of `Backend`, and runs a `ChunkedOperation` (see `data_movement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedOperation, ChunkedRunner, Respond
from ferro_gloo.shm.kernels import chunk, chunk_count, copy_cached, reduce_into, slot_block, write_slot

_BLOCK_BYTES = 256 << 10  # reduced in place at once, so that it stays in a core's cache


def all_reduce(runner: ChunkedRunner, buffer: Array, reduction: Reduction, deadline: float) -> None:
    """See `Backend.all_reduce`."""

    def in_place(arrays: Mapping[int, Array]) -> None:
        _reduce_in_place(runner, list(arrays.values()), buffer, reduction)

    if runner.ranks == 2:  # each rank reduces everything, which takes one round per chunk
        operation = _one_phase(runner, buffer, reduction, reads=True)
        operation.source, operation.in_place = buffer.view(np.uint8), in_place
        runner.run(operation, deadline)
    else:
        operation, respond = _two_phase(runner, buffer, reduction, reads=True)
        operation.source, operation.in_place = buffer.view(np.uint8), in_place
        runner.run_two_phase(operation, respond, deadline)


def reduce(runner: ChunkedRunner, buffer: Array, reduction: Reduction, root: int, deadline: float) -> None:
    """See `Backend.reduce`."""
    at_root = runner.rank == root
    if runner.ranks == 2:
        runner.run(_one_phase(runner, buffer, reduction, reads=at_root), deadline)
    else:
        operation, respond = _two_phase(runner, buffer, reduction, reads=at_root)
        runner.run_two_phase(operation, respond, deadline)


def reduce_scatter(
    runner: ChunkedRunner, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
) -> None:
    """See `Backend.reduce_scatter`."""
    me, length = runner.rank, runner.slot_block_bytes // source.itemsize
    parts = blocks(source, counts)

    def write(k: int, slot: Array) -> None:
        for rank in runner.others:
            write_slot(slot_block(slot, me, rank, length), chunk(parts[rank], k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        target = chunk(out, k, length)
        parts_of_ranks = [slot_block(slot, r, me, length)[: target.size] for r, slot in enumerate(slots)]
        parts_of_ranks[me] = chunk(parts[me], k, length)
        reduce_into(reduction, target, parts_of_ranks)

    def in_place(arrays: Mapping[int, Array]) -> None:
        mine = [blocks(array.view(source.dtype), counts)[me] for array in arrays.values()]
        step = _BLOCK_BYTES // source.itemsize
        for k in range(chunk_count(out.size, step)):
            operands = [chunk(part, k, step) for part in mine]
            reduce_into(reduction, chunk(out, k, step), operands)

    operation = ChunkedOperation(
        chunks=chunk_count(max(counts), length),
        write=write,
        read=read,
        dtype=source.dtype,
        source=source.view(np.uint8),
        in_place=in_place,
    )
    runner.run(operation, deadline)


def _one_phase(runner: ChunkedRunner, buffer: Array, reduction: Reduction, *, reads: bool) -> ChunkedOperation:
    """Build the operation in which every rank publishes its whole array, and the ranks in `reads` reduce."""
    length = runner.slot_bytes // buffer.itemsize

    def write(k: int, slot: Array) -> None:
        write_slot(slot, chunk(buffer, k, length))

    def read(k: int, slots: Sequence[Array]) -> None:
        target = chunk(buffer, k, length)
        parts = [slot[: target.size] for slot in slots]
        parts[runner.rank] = target  # one of two, which are read before anything is written
        reduce_into(reduction, target, parts)

    return ChunkedOperation(
        chunks=chunk_count(buffer.size, length), write=write, read=read if reads else None, dtype=buffer.dtype
    )


def _two_phase(
    runner: ChunkedRunner, buffer: Array, reduction: Reduction, *, reads: bool
) -> tuple[ChunkedOperation, Respond]:
    """Build the operation in which each rank reduces its part of a block and publishes it.

    Source: the reduce-scatter and all-gather of Rabenseifner (see
        `ferro.collectives.direct.direct_all_reduce`), block by block, so that the slots stay
        in the caches.
    """
    me, n, length = runner.rank, runner.ranks, runner.slot_block_bytes // buffer.itemsize

    def part(k: int, rank: int) -> Array:
        block = chunk(buffer, k, n * length)
        return chunk(block, rank, -(-block.size // n))

    def write(k: int, slot: Array) -> None:
        for rank in runner.others:
            write_slot(slot_block(slot, me, rank, length), part(k, rank))

    def respond(k: int, slots: Sequence[Array], target: Array) -> None:
        own = part(k, me)
        parts = [slot_block(slot, r, me, length)[: own.size] for r, slot in enumerate(slots)]
        parts[me] = own
        result = target[: own.size]
        reduce_into(reduction, result, parts)
        own[...] = result

    def read(k: int, slots: Sequence[Array]) -> None:
        for rank in runner.others:
            copy_cached(part(k, rank), slots[rank])

    operation = ChunkedOperation(
        chunks=chunk_count(buffer.size, n * length), write=write, read=read if reads else None, dtype=buffer.dtype
    )
    return operation, respond


def _reduce_in_place(runner: ChunkedRunner, arrays: Sequence[Array], like: Array, reduction: Reduction) -> None:
    """Reduce this rank's part of all ranks' arrays, and write it to all of them."""
    size = -(-like.size // runner.ranks)
    parts = [chunk(array.view(like.dtype), runner.rank, size) for array in arrays]
    step = _BLOCK_BYTES // like.itemsize
    for k in range(chunk_count(parts[0].size, step)):
        first, *others = operands = [chunk(part, k, step) for part in parts]
        reduce_into(reduction, first, operands)
        for other in others:
            other[...] = first
