"""The chunks of an operation in pure Python; see `chunked_operation`."""

from __future__ import annotations

from typing import cast

from ferro.types import Array
from ferro_gloo.shm.chunked_operation import ChunkedOperation, Move
from ferro_gloo.shm.kernels import chunk, reduce_into
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import SlotRing


def stage_chunk(operation: ChunkedOperation, k: int, slot: Array) -> None:
    """Write chunk k into this rank's slot."""
    source, length = operation.source, operation.layout.length
    for move in operation.layout.stage:
        part = chunk(_bytes_of(source, move.start, move.nbytes), k, length)
        slot[move.to : move.to + part.size] = part


def run_in_python(
    operation: ChunkedOperation, region: ShmRegion, ring: SlotRing, rank: int, number: int, chunks: int, deadline: float
) -> None:
    """Run all chunks, the first of which all ranks have published.

    Args:
        operation: the operation.
        region: the memory of the group.
        ring: its slots.
        rank: this rank.
        number: the number of the first chunk.
        chunks: how many there are.
        deadline: absolute `time.monotonic()` second.
    """
    layout = operation.layout
    step = 2 if layout.two_phase else 1
    for k in range(chunks):
        current, following = number + step * k, number + step * (k + 1)
        if layout.two_phase:
            if k:
                ring.wait(current, deadline)
            _reduce_chunk(operation, k, current, region, rank)
            ring.publish(current + 1)
        if k + 1 < chunks:
            stage_chunk(operation, k + 1, region.byte_slots[following % SLOTS][rank])
            ring.publish(following)
        for move in layout.own:
            target = _part(operation.target, move, k, layout.length)
            target[...] = chunk(_bytes_of(operation.source, move.start, move.nbytes), k, layout.length)
        taken = current + step - 1
        if taken > number:
            ring.wait(taken, deadline)
        if not layout.two_phase and layout.reduce is not None:
            _reduce_chunk(operation, k, current, region, rank)
        for move in layout.take:
            target = _part(operation.target, move, k, layout.length)
            target[...] = region.byte_slots[taken % SLOTS][move.rank][move.start : move.start + target.size]


def _reduce_chunk(operation: ChunkedOperation, k: int, number: int, region: ShmRegion, rank: int) -> None:
    """Reduce chunk k into the target; in two phases, also into this rank's next slot."""
    step, layout = operation.layout.reduce, operation.layout
    assert step is not None, "an operation of two phases reduces"
    dtype = step.reduction.dtype
    length = layout.length // dtype.itemsize
    own = chunk(_bytes_of(operation.source, step.own, step.nbytes).view(dtype), k, length)
    out = None if step.out < 0 else _bytes_of(operation.target, step.out, step.nbytes).view(dtype)
    starts = [offset // dtype.itemsize for offset in step.offsets]
    slots = region.slots(dtype)[number % SLOTS]
    parts = [slot[start : start + own.size] for slot, start in zip(slots, starts, strict=True)]
    parts[rank] = own
    if not layout.two_phase:
        assert out is not None, "only an operation of two phases has results for others alone"
        # The result may be written over one of the first two operands only, and no operation does otherwise.
        reduce_into(step.reduction, chunk(out, k, length), parts)
        return
    result = region.slots(dtype)[(number + 1) % SLOTS][rank][: own.size]
    reduce_into(step.reduction, result, parts)
    if out is not None:
        chunk(out, k, length)[...] = result


def _bytes_of(array: Array | None, start: int, nbytes: int) -> Array:
    return cast("Array", array)[start : start + nbytes]


def _part(target: Array | None, move: Move, k: int, length: int) -> Array:
    return chunk(_bytes_of(target, move.to, move.nbytes), k, length)
