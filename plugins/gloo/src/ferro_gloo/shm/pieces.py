"""How arrays are cut into chunks, blocks and pieces of slots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ferro.types import Array

_LINE_BYTES = 64
_COPY_BYTES = 256 << 10


def rounds_of(size: int, length: int) -> int:
    """Return how many chunks something is cut into; at least one, be it empty."""
    return max(1, -(-size // length))


def chunk(array: Array, k: int, length: int) -> Array:
    """Return chunk k; the last is shorter, those beyond are empty."""
    return array[k * length : (k + 1) * length]


def starts(counts: Sequence[int], size: int) -> list[int]:
    """Return where each rank's block begins, and where the last ends, for elements of `size`."""
    return [0, *(end * size for end in accumulate(counts))]


def cut(array: Array, counts: Sequence[int], size: int = 1) -> list[Array]:
    """Return each rank's block of an array, for elements of `size`."""
    bounds = starts(counts, size)
    return [array[start:end] for start, end in pairwise(bounds)]


def piece_bytes(slot_bytes: int, ranks: int) -> int:
    """Return how much a slot has for each other rank, from cache line to cache line."""
    return slot_bytes // max(1, ranks - 1) // _LINE_BYTES * _LINE_BYTES


def piece(slot: Array, shower: int, taker: int, length: int) -> Array:
    """Return where `shower` shows in its slot what is for `taker`; for itself it shows nothing."""
    start = (taker - (taker > shower)) * length
    return slot[start : start + length]


def put(slot: Array, part: Array) -> None:
    """Write to the beginning of a slot."""
    slot[: part.size] = part


def get(target: Array, slot: Array) -> None:
    """Fill `target` from the beginning of a slot."""
    target[...] = slot[: target.size]


def copy(target: Array, source: Array) -> None:
    """Fill `target` (uint8) from the beginning of `source`, block by block.

    Copied all at once, much would be written past the caches, from where it is to be used next.
    """
    for start in range(0, target.size, _COPY_BYTES):
        block = target[start : start + _COPY_BYTES]
        block[...] = source[start : start + block.size]
