"""The chunks of an operation in pure Python; see `chunked_operation`."""

from __future__ import annotations

from ferro.types import Array
from ferro_gloo.shm.chunked_operation import ChunkedOperation
from ferro_gloo.shm.kernels import chunk, copy_cached, reduce_into
from ferro_gloo.shm.region import SLOTS, ShmRegion
from ferro_gloo.shm.slot_ring import SlotRing


def stage_chunk(operation: ChunkedOperation, k: int, slot: Array) -> None:
    """Write chunk k into this rank's slot."""
    for array, offset in operation.stage:
        part = chunk(array, k, operation.length)
        slot[offset : offset + part.size] = part


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
    step = 2 if operation.two_phase else 1
    for k in range(chunks):
        current, following = number + step * k, number + step * (k + 1)
        if operation.two_phase:
            if k:
                ring.wait(current, deadline)
            _reduce_chunk(operation, k, current, region, rank)
            ring.publish(current + 1)
        if k + 1 < chunks:
            stage_chunk(operation, k + 1, region.byte_slots[following % SLOTS][rank])
            ring.publish(following)
        for target, source in operation.own:
            chunk(target, k, operation.length)[...] = chunk(source, k, operation.length)
        taken = current + step - 1
        if taken > number:
            ring.wait(taken, deadline)
        if not operation.two_phase and operation.reduce is not None:
            _reduce_chunk(operation, k, current, region, rank)
        for array, writer, offset in operation.take:
            copy_cached(chunk(array, k, operation.length), region.byte_slots[taken % SLOTS][writer][offset:])


def _reduce_chunk(operation: ChunkedOperation, k: int, number: int, region: ShmRegion, rank: int) -> None:
    """Reduce chunk k into the result; in two phases, also into this rank's next slot."""
    step = operation.reduce
    assert step is not None, "an operation of two phases reduces"
    dtype = step.own.dtype
    length = operation.length // dtype.itemsize
    own = chunk(step.own, k, length)
    slots = region.slots(dtype)[number % SLOTS]
    starts = [offset // dtype.itemsize for offset in step.offsets]
    parts = [slot[start : start + own.size] for slot, start in zip(slots, starts, strict=True)]
    parts[rank] = own
    if operation.two_phase:
        result = region.slots(dtype)[(number + 1) % SLOTS][rank][: own.size]
        reduce_into(step.reduction, result, parts)
        if step.out is not None:
            chunk(step.out, k, length)[...] = result
        return
    assert step.out is not None, "only an operation of two phases has results for others alone"
    # The result may be written over one of the first two operands only; see `Reduction.into`.
    if step.out is step.own and rank >= 2:
        parts[rank] = own.copy()
    reduce_into(step.reduction, chunk(step.out, k, length), parts)
