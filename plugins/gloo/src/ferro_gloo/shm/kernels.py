"""Memory operations of one rank: cutting arrays into chunks, copying and reducing them.

Copies, and sums of half precision, use the native helper where it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ferro.collectives.reduction import Reduction
from ferro.types import Array, ReduceOp
from ferro_gloo.shm.native import NATIVE

_CACHE_LINE_BYTES = 64
_COPY_BLOCK_BYTES = 256 << 10
_CACHED_BYTES = 16 << 20
_SUMS = (ReduceOp.SUM, ReduceOp.MEAN)

Copy: TypeAlias = Callable[[Array, Array], None]


def chunk_count(size: int, length: int) -> int:
    """Count the chunks of an array; an empty one has one, too."""
    return max(1, -(-size // length))


def chunk(array: Array, k: int, length: int) -> Array:
    """Slice chunk k; the last chunk may be shorter, and chunks beyond it are empty."""
    return array[k * length : (k + 1) * length]


def slot_block_bytes(slot_bytes: int, ranks: int) -> int:
    """Compute the size of a slot's block for each other rank, in whole cache lines."""
    return slot_bytes // max(1, ranks - 1) // _CACHE_LINE_BYTES * _CACHE_LINE_BYTES


def slot_block(slot: Array, writer: int, reader: int, length: int) -> Array:
    """Slice the block of the writer's slot that is for the reader; a slot has no block for its own rank."""
    start = (reader - (reader > writer)) * length
    return slot[start : start + length]


def write_slot(slot: Array, data: Array) -> None:
    """Copy `data` to the beginning of a slot."""
    slot[: data.size] = data


def copy_cached(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, through the caches."""
    target[...] = source[: target.size]


def copy_in_blocks(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, block by block.

    NumPy copies a large array past the caches, although the data is read again soon.
    """
    for start in range(0, target.size, _COPY_BLOCK_BYTES):
        block = target[start : start + _COPY_BLOCK_BYTES]
        block[...] = source[start : start + block.size]


def copy_nontemporal(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, past the caches."""
    assert NATIVE is not None, "only the native helper can"
    NATIVE.copy(target, source[: target.size])


def choose_copies(nbytes: int) -> tuple[Copy, Copy]:
    """Return two copy functions, from slots and from arrays, for results of `nbytes` on all ranks together.

    Results larger than the caches are written past them, so that the processor need not read lines before it overwrites
    them. Measured with 2 ranks: a broadcast of 16 MiB takes 1.0 ms through the caches, 0.56 past them, an all_gather
    1.25 and 0.99.
    """
    if NATIVE is not None and nbytes >= _CACHED_BYTES:
        return copy_nontemporal, copy_nontemporal
    return copy_cached, copy_in_blocks


def reduce_into(reduction: Reduction, out: Array, operands: Sequence[Array]) -> None:
    """Reduce all contributions, in order of rank, into `out`; see `Reduction.into`.

    The native helper gives the same bits. Sums of four arrays of a million float16, or bfloat16,
    take it 0.2 and 0.3 ms, and NumPy 3.7 and 0.9.
    """
    is_half_sum = reduction.needs_all and reduction.op in _SUMS
    if NATIVE is not None and is_half_sum and all(a.flags.aligned for a in (out, *operands)):
        divisor = reduction.ranks if reduction.op is ReduceOp.MEAN else 0
        NATIVE.sum_half(out, operands, reduction.dtype.name == "bfloat16", divisor)
    else:
        reduction.into(out, operands, at_once=True)
