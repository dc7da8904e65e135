"""Random arrays, and random ways for ranks to hold them: for tests of saves and loads between any numbers of ranks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from ferro_checkpoint import ArrayPiece

DTYPES = (
    np.float32,
    np.float64,
    np.float16,
    np.bool_,
    np.int8,
    np.uint16,
    np.int64,
    np.complex64,
    np.complex128,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)
ENDINGS = ("", "weight", "ü☃😀", 'a "quoted\\ name', "of two\nlines", "..", "0")
Place = tuple[tuple[int, ...], tuple[int, ...], "tuple[int, int] | None"]
"""The start, the extent and the flat range of a piece."""


class Holder:
    """An object with arrays, such as a module."""

    def __init__(self, arrays: Mapping[str, list[ArrayPiece]]) -> None:
        self.arrays = arrays

    def checkpoint_arrays(self) -> Mapping[str, list[ArrayPiece]]:
        return self.arrays


def random_arrays(seed: int) -> dict[str, np.ndarray]:
    """Make some arrays of all dtypes and up to three dimensions, of random bits."""
    rng, bits = random.Random(f"arrays {seed}"), np.random.default_rng(seed)
    arrays = {}
    for number in range(rng.randint(1, 10)):
        shape = tuple(rng.choice((0, 1, 2, 3, 5, 8, 13, 40)) for _ in range(rng.randint(0, 3)))
        dtype = np.dtype(rng.choice(DTYPES))
        content = bits.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        if dtype == np.bool_:
            content &= 1
        arrays[f"{number}.{rng.choice(ENDINGS)}"] = content.view(dtype).reshape(shape)
    return arrays


def held(seed: int, arrays: Mapping[str, np.ndarray], world_size: int, *, fill: bool) -> list[dict]:
    """Choose how ranks hold arrays; return each rank's pieces by name.

    Args:
        seed: chooses; the same one gives the same placements, so that what was loaded can be compared.
        arrays: the whole arrays.
        world_size: number of ranks.
        fill: whether the pieces have the arrays' elements; zeros otherwise.
    """
    rng = random.Random(f"placements {seed} {world_size}")
    ranks: list[dict[str, list[ArrayPiece]]] = [{} for _ in range(world_size)]
    for name, array in arrays.items():
        places = _places(rng, array.shape, world_size)
        may_differ, on_all_ranks = rng.random() < 0.2, rng.random() < 0.6
        for rank, of_rank in enumerate(ranks):
            pieces = []
            for place, owners in places:
                if rank not in owners:
                    continue
                values = _values(array, place)
                if not fill or (may_differ and rank != min(owners)):
                    values = np.zeros_like(values)
                pieces.append(_piece(array.shape, place, _in_memory(rng, values, place), may_differ, on_all_ranks))
            if on_all_ranks and not pieces:
                nothing: Place = ((0,) * array.ndim, array.shape, (0, 0))
                pieces.append(_piece(array.shape, nothing, np.zeros(0, array.dtype), may_differ, on_all_ranks))
            if pieces:
                of_rank[name] = pieces
    return ranks


def expected(seed: int, arrays: Mapping[str, np.ndarray], world_size: int) -> list[dict]:
    """Return what ranks hold after a load: the elements of the whole arrays, also where a save takes one rank's."""
    ranks = held(seed, arrays, world_size, fill=True)
    for of_rank in ranks:
        for name, pieces in of_rank.items():
            for piece in pieces:
                values = _values(arrays[name], (piece.start, piece.extent, piece.flat))
                piece.data[...] = values.reshape(piece.data.shape)
    return ranks


def bits(array: np.ndarray) -> bytes:
    """Return the bytes of an array's elements in C order, by which arrays with NaN can be compared."""
    return np.ascontiguousarray(array).tobytes()


def _piece(shape: tuple[int, ...], place: Place, data: np.ndarray, may_differ: bool, on_all_ranks: bool) -> ArrayPiece:
    start, extent, flat = place
    return ArrayPiece(shape, data, start, extent, flat, may_differ, on_all_ranks)


def _values(array: np.ndarray, place: Place) -> np.ndarray:
    start, extent, flat = place
    box = np.asarray(array[tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))])
    return box if flat is None else np.ascontiguousarray(box).reshape(-1)[flat[0] : sum(flat)]


def _in_memory(rng: random.Random, values: np.ndarray, place: Place) -> np.ndarray:
    """Copy values into memory of some order: C or Fortran, with holes, or as one dimension."""
    how = rng.choice(("C", "C", "F", "holes", "one dimension"))
    if how == "holes" and values.ndim:
        memory = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)[..., ::2]
        memory[...] = values
        return memory
    if how == "one dimension":
        return np.ascontiguousarray(values).reshape(-1).copy()
    return values.copy(order="F" if how == "F" else "C")


def _places(rng: random.Random, shape: tuple[int, ...], world_size: int) -> list[tuple[Place, set[int]]]:
    """Cut an array into pieces, and choose the ranks that hold each."""
    zeros, everyone = (0,) * len(shape), set(range(world_size))
    kind = rng.choice(("whole", "flat", "rows", "boxes", "boxes"))
    if kind == "whole" or not math.prod(shape):
        return [((zeros, shape, None), everyone)]
    if kind == "flat":  # as FSDP has it, or HSDP where there are more ranks than pieces
        pieces = rng.choice((world_size, max(1, world_size // 2)))
        size = math.prod(shape)
        ranges = _ranges(rng, size, pieces)
        if rng.random() < 0.3:  # as FSDP over tensor parallelism may have it: pieces that overlap
            ranges = [
                (max(0, at - 3), min(size, at + count + rng.randint(0, 9)) - max(0, at - 3)) for at, count in ranges
            ]
        return [
            ((zeros, shape, each), {rank for rank in everyone if rank % pieces == number})
            for number, each in enumerate(ranges)
        ]
    if kind == "rows" and shape:
        return [
            (((first, *zeros[1:]), (count, *shape[1:]), None), {rank})
            for rank, (first, count) in enumerate(_ranges(rng, shape[0], world_size))
        ]
    places: list[Place] = []
    for start, extent in _boxes(rng, zeros, shape, rng.randint(0, 3)):
        if rng.random() < 0.3:
            places += [(start, extent, each) for each in _ranges(rng, math.prod(extent), rng.randint(1, 3))]
        else:
            places.append((start, extent, None))
    return [
        (place, set(rng.sample(sorted(everyone), rng.choice((1, 1, rng.randint(1, world_size)))))) for place in places
    ]


def _ranges(rng: random.Random, size: int, number: int) -> list[tuple[int, int]]:
    """Cut so many elements into ranges, some of which may be empty: first element and count."""
    cuts = [0, *sorted(rng.randint(0, size) for _ in range(number - 1)), size]
    return [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]


def _boxes(
    rng: random.Random, start: tuple[int, ...], extent: tuple[int, ...], cuts: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into boxes, each again and again."""
    if not cuts or not extent:
        yield start, extent
        return
    dim = rng.randrange(len(extent))
    at = rng.randint(0, extent[dim])
    moved = (*start[:dim], start[dim] + at, *start[dim + 1 :])
    yield from _boxes(rng, start, (*extent[:dim], at, *extent[dim + 1 :]), cuts - 1)
    yield from _boxes(rng, moved, (*extent[:dim], extent[dim] - at, *extent[dim + 1 :]), rng.randint(0, cuts - 1))
