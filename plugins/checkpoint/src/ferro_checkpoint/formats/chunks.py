"""A tensor that is stored as boxes, in one file or many: the boxes must cover it, each element once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ferro_checkpoint.errors import CheckpointDamaged

Where = TypeVar("Where")
_MOST_COMPARED = 200_000_000  # pairs of chunks: some seconds


class Chunk(Generic[Where]):
    """A box of a tensor, and where its elements are.

    Attributes:
        start: the indices of its first element.
        extent: its shape.
        where: the place, as the format describes it.
    """

    __slots__ = ("extent", "start", "where")

    def __init__(self, start: Sequence[int], extent: Sequence[int], where: Where) -> None:
        self.start = tuple(start)
        self.extent = tuple(extent)
        self.where = where

    def box_of(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the view of this box in the whole array."""
        slices = [slice(start, start + extent) for start, extent in zip(self.start, self.extent, strict=True)]
        index: tuple[Any, ...] = (*slices, ...)  # the ellipsis makes a view of an array without dimensions, too
        box: NDArray[Any] = array[index]
        return box


def checked_chunks(
    chunks: Sequence[Chunk[Where]], shape: tuple[int, ...], path: str, tensor: str
) -> list[Chunk[Where]]:
    """Return the chunks of a tensor, copies of the same box once and empty ones not.

    Raises:
        CheckpointDamaged: one reaches beyond the tensor, or all of them together have more or less elements than it.
    """
    distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], Chunk[Where]] = {}
    for chunk in chunks:
        fits = len(chunk.start) == len(chunk.extent) == len(shape) and all(
            0 <= start <= start + extent <= size
            for start, extent, size in zip(chunk.start, chunk.extent, shape, strict=True)
        )
        if not fits:
            text = f"a chunk of shape {chunk.extent} at {chunk.start} is not within its shape {shape}"
            raise CheckpointDamaged(f"{path}: tensor {tensor!r}: {text}", path=path, tensor=tensor)
        if math.prod(chunk.extent):
            distinct.setdefault((chunk.start, chunk.extent), chunk)
    stored = sum(math.prod(chunk.extent) for chunk in distinct.values())
    if stored != math.prod(shape):
        text = f"its chunks have {stored} elements together, and its shape {shape} has {math.prod(shape)}"
        raise CheckpointDamaged(f"{path}: tensor {tensor!r}: {text}", path=path, tensor=tensor)
    return list(distinct.values())


def check_disjoint(chunks: Sequence[Chunk[Where]], path: str, tensor: str) -> None:
    """Check that no two boxes of a tensor share an element.

    With sizes that `checked_chunks` has added up, this means that they cover it.

    Raises:
        CheckpointDamaged: two do.
    """
    if len(chunks) < 2:
        return
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    ends = starts + np.array([chunk.extent for chunk in chunks], np.int64)
    dim = int(np.argmax([len(np.unique(column)) for column in starts.T]))  # so that few share a range of it
    order = np.argsort(starts[:, dim], kind="stable")
    starts, ends = starts[order], ends[order]
    first_beyond = np.searchsorted(starts[:, dim], ends[:, dim], "left")
    if int((first_beyond - np.arange(len(chunks))).sum()) > _MOST_COMPARED:
        text = f"its {len(chunks)} chunks lie so that comparing them takes too long"
        raise CheckpointDamaged(f"{path}: tensor {tensor!r}: {text}", path=path, tensor=tensor)
    for index, beyond in enumerate(first_beyond):
        if beyond <= index + 1:
            continue
        others = slice(index + 1, beyond)
        shared = np.all((starts[others] < ends[index]) & (starts[index] < ends[others]), axis=1)
        if shared.any():
            one, other = chunks[order[index]], chunks[order[index + 1 + int(np.argmax(shared))]]
            text = f"its chunks at {one.start} and {other.start} overlap"
            raise CheckpointDamaged(f"{path}: tensor {tensor!r}: {text}", path=path, tensor=tensor)
