"""The numbers to send: exact under every reduction, and different at every place, rank, turn and call.

Rank r sends `tile[(start + place) % TILE]` of a tile of its own, whole numbers from 1 to m:

    tile_r[p] = (p * (r + 1) + r) % m + 1

m is a prime so small that the sum over all ranks is exact in the dtype, in any order. The start
moves with every call, so that an earlier call's result is never right for a later one. The tile
repeats after a prime number of elements, so a block that lands in another's place is noticed.
For products the numbers are 1 and 2.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = "npt.NDArray[np.generic]"

TILE = 65_521
_STRIDE = 7_919  # from one call's start to the next
_PRIMES = (4093, 1021, 251, 127, 61, 31, 13, 7, 5, 3, 2)
_REDUCTIONS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


def dtype_of(name: str) -> np.dtype[Any]:
    """Return a dtype by name; bfloat16 needs the package ml_dtypes.

    Raises:
        TypeError: there is no such dtype.
    """
    kind: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    return kind


def start_of(call: int) -> int:
    """Compute the place in the tile at which a call begins; calls are numbered through all turns."""
    return call * _STRIDE % TILE


@functools.lru_cache(maxsize=256)
def tile(rank: int, world_size: int, dtype: str, op: str) -> Numbers:
    """Compute the numbers that one rank sends, `TILE` elements."""
    places = np.arange(TILE, dtype=np.int64)
    if op == "prod":
        numbers = 1 + ((places * (rank + 1) + rank) % 3 == 0)
    else:
        numbers = 1 + (places * (rank + 1) + rank) % _largest(world_size, dtype)
    filled: Numbers = numbers.astype(dtype_of(dtype))
    return filled


@functools.lru_cache(maxsize=16)
def reduced(world_size: int, dtype: str, op: str) -> Numbers:
    """Reduce the tiles of all ranks."""
    tiles = (tile(rank, world_size, dtype, op) for rank in range(world_size))
    total: Numbers = functools.reduce(_REDUCTIONS[op], tiles)
    return total


def write(buffer: Numbers, numbers: Numbers, start: int) -> None:
    """Fill a buffer with the tile `numbers`, from its place `start` on."""
    for part, place in _parts(buffer, start):
        part[...] = numbers[place : place + part.size]


def mismatches(buffer: Numbers, numbers: Numbers, start: int) -> int:
    """Count the elements that differ from those that `write` would have written."""
    return sum(
        int(np.count_nonzero(part != numbers[place : place + part.size])) for part, place in _parts(buffer, start)
    )


def _parts(buffer: Numbers, start: int) -> Iterator[tuple[Numbers, int]]:
    """Cut a buffer where the tile ends; yield each part with its place in the tile."""
    done, place = 0, start % TILE
    while done < buffer.size:
        part = buffer[done : done + TILE - place]
        yield part, place
        done, place = done + part.size, 0


def _largest(world_size: int, dtype: str) -> int:
    """Return the largest prime that keeps sums over all ranks exact."""
    kind = dtype_of(dtype)
    if kind.kind in "iu":
        exact = int(np.iinfo(kind).max)
    else:  # all whole numbers up to 1 / eps of the dtype; eps of bfloat16 is not in np.finfo
        exact = 256 if dtype == "bfloat16" else int(1 / np.finfo(kind).eps)
    return next((prime for prime in _PRIMES if prime * world_size <= exact), _PRIMES[-1])
