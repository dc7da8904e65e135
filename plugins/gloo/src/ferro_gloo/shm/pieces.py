"""Pieces: how arrays go through slots chunk by chunk, and how results land."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ferro.types import Array
from ferro_gloo.shm.native import NATIVE

_LINE_BYTES = 64
_COPY_BYTES = 256 << 10
_CACHED_BYTES = 16 << 20

Get: TypeAlias = Callable[[Array, Array], None]


def rounds_of(size: int, length: int) -> int:
    """Return how many chunks something is cut into; at least one, be it empty."""
    return max(1, -(-size // length))


def chunk(array: Array, k: int, length: int) -> Array:
    """Return chunk k; the last is shorter, those beyond are empty."""
    return array[k * length : (k + 1) * length]


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


def get(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, through the caches."""
    target[...] = source[: target.size]


def get_in_blocks(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, block by block.

    Copied all at once, much would be written past the caches, from where it is to be used next.
    """
    for start in range(0, target.size, _COPY_BYTES):
        block = target[start : start + _COPY_BYTES]
        block[...] = source[start : start + block.size]


def get_past(target: Array, source: Array) -> None:
    """Fill `target` from the beginning of `source`, past the caches."""
    assert NATIVE is not None, "only the native helper can"
    NATIVE.copy(target, source[: target.size])


def landing(nbytes: int) -> tuple[Get, Get]:
    """Return how results land that have so many bytes on all ranks: from slots, from arrays.

    What caches hardly hold is better written past them: then lines need not be read before they
    are written over. Measured with 2 ranks: a broadcast of 16 MiB takes 1.0 ms through the caches,
    0.56 past them, an all_gather 1.25 and 0.99.
    """
    if NATIVE is not None and nbytes >= _CACHED_BYTES:
        return get_past, get_past
    return get, get_in_blocks
