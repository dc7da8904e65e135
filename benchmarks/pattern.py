"""Numbers to send: never zero, exact under every sum, different at every place and on every rank.

Rank r sends (r+1) times a base pattern of whole numbers, so sums stay far below 2**24 and are
exact in float32 in any order. The base repeats after a prime number of elements, so that a chunk
that lands in another chunk's place is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_TILE = 65_521
_BASE = (np.arange(_TILE, dtype=np.float32) % 4093) + 1


def fill(buffer: Floats, scale: int) -> None:
    """Write `scale` times the base pattern, from its beginning on."""
    tile = _BASE * np.float32(scale)
    for part in _parts(buffer):
        part[...] = tile[: part.size]


def holds(buffer: Floats, scale: int) -> bool:
    """Say whether that is what the buffer contains."""
    tile = _BASE * np.float32(scale)
    return all(np.array_equal(part, tile[: part.size]) for part in _parts(buffer))


def fill_blocks(buffer: Floats, scales: list[int]) -> None:
    """Fill equal blocks of a buffer, each with its own scale."""
    for block, scale in zip(np.split(buffer, len(scales)), scales, strict=True):
        fill(block, scale)


def blocks_hold(buffer: Floats, scales: list[int]) -> bool:
    """Say whether each of the equal blocks has its own scale."""
    return all(
        holds(block, scale)
        for block, scale in zip(np.split(buffer, len(scales)), scales, strict=True)
    )


def _parts(buffer: Floats) -> Iterator[Floats]:
    for start in range(0, buffer.size, _TILE):
        yield buffer[start : start + _TILE]
