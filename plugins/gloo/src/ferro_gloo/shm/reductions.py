"""Reductions of arrays that do not fit a slot or are uneven, in order of rank.

Each function takes the arguments of the method of `Backend`, and runs a `ChunkedOperation` (see `data_movement`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ferro.collectives.partition import blocks
from ferro.collectives.reduction import Reduction
from ferro.types import Array
from ferro_gloo.shm.chunked import ChunkedRunner
from ferro_gloo.shm.chunked_operation import ChunkedOperation, ReduceStep
from ferro_gloo.shm.kernels import chunk, chunk_count, reduce_into, slot_block_start

_BLOCK_BYTES = 256 << 10  # reduced in place at once, so that it stays in a core's cache


def all_reduce(runner: ChunkedRunner, source: Array, out: Array, reduction: Reduction, deadline: float) -> None:
    """See `Backend.all_reduce`; `out` may be `source`."""

    def in_place(arrays: Mapping[int, Array]) -> None:
        _reduce_in_place(runner, list(arrays.values()), out, reduction)

    if runner.ranks == 2:  # each rank reduces everything, which takes one round per chunk
        operation = _one_phase(runner, source, out, reduction)
    else:
        operation = _two_phase(runner, source, out, reduction)
    # Every rank of an operation must look for spans, also one whose own array cannot be used in place.
    operation.source = out.view(np.uint8) if source is out else None
    operation.in_place = in_place
    runner.run(operation, deadline)


def reduce(
    runner: ChunkedRunner, source: Array, out: Array | None, reduction: Reduction, root: int, deadline: float
) -> None:
    """See `Backend.reduce`; `out` is None on other ranks than the root, and may be `source`."""
    if runner.ranks == 2:
        operation = _one_phase(runner, source, out, reduction)
    else:
        operation = _two_phase(runner, source, out, reduction)
    runner.run(operation, deadline)


def reduce_scatter(
    runner: ChunkedRunner, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, deadline: float
) -> None:
    """See `Backend.reduce_scatter`."""
    me, n = runner.rank, runner.ranks
    parts = blocks(source, counts)
    length = runner.chunk_bytes(n - 1, reduction)

    def in_place(arrays: Mapping[int, Array]) -> None:
        mine = [blocks(array.view(source.dtype), counts)[me] for array in arrays.values()]
        step = _BLOCK_BYTES // source.itemsize
        for k in range(chunk_count(out.size, step)):
            operands = [chunk(part, k, step) for part in mine]
            reduce_into(reduction, chunk(out, k, step), operands)

    operation = ChunkedOperation(
        length=length,
        largest=max(counts) * source.itemsize,
        stage=[(parts[rank].view(np.uint8), slot_block_start(me, rank, length)) for rank in runner.others],
        reduce=_step(runner, parts[me], out, length, reduction),
        source=source.view(np.uint8),
        in_place=in_place,
    )
    runner.run(operation, deadline)


def _step(runner: ChunkedRunner, own: Array, out: Array | None, length: int, reduction: Reduction) -> ReduceStep:
    """Reduce what the others have written into their slots' blocks for this rank."""
    me = runner.rank
    offsets = [0 if rank == me else slot_block_start(rank, me, length) for rank in range(runner.ranks)]
    return ReduceStep(own=own, out=out, offsets=offsets, reduction=reduction)


def _one_phase(runner: ChunkedRunner, source: Array, out: Array | None, reduction: Reduction) -> ChunkedOperation:
    """Build the operation in which every rank that has no `out` publishes its array, and the others reduce.

    In an all_reduce all ranks do both.
    """
    return ChunkedOperation(
        length=runner.chunk_bytes(1, reduction),
        largest=source.nbytes,
        stage=[(source.view(np.uint8), 0)],
        reduce=None
        if out is None
        else ReduceStep(own=source, out=out, offsets=[0] * runner.ranks, reduction=reduction),
    )


def _two_phase(runner: ChunkedRunner, source: Array, out: Array | None, reduction: Reduction) -> ChunkedOperation:
    """Build the operation in which each rank reduces its part of the array and publishes it.

    Source: the reduce-scatter and all-gather of Rabenseifner (see `ferro.collectives.direct.direct_all_reduce`), chunk
        by chunk, so that the slots stay in the caches.
    """
    me, n = runner.rank, runner.ranks
    size = -(-source.size // n)
    parts = [chunk(source, rank, size) for rank in range(n)]
    results = None if out is None else [chunk(out, rank, size) for rank in range(n)]
    length = runner.chunk_bytes(n - 1, reduction)
    return ChunkedOperation(
        length=length,
        largest=size * source.itemsize,
        stage=[(parts[rank].view(np.uint8), slot_block_start(me, rank, length)) for rank in runner.others],
        reduce=_step(runner, parts[me], None if results is None else results[me], length, reduction),
        take=() if results is None else [(results[rank].view(np.uint8), rank, 0) for rank in runner.others],
        two_phase=True,
    )


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
