"""Compute the slices of a global array that a rank holds, from its coordinates in the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from .placement import Placements, Shard

Shape: TypeAlias = tuple[int, ...]


def shard_slice(size: int, parts: int, index: int) -> slice:
    """Return the rows of part `index` when numpy.array_split cuts `size` rows into `parts`."""
    least, longer = divmod(size, parts)
    start = index * least + min(index, longer)
    return slice(start, start + least + (index < longer))


def local_slices(
    shape: Shape, mesh_shape: Shape, placements: Placements, coordinates: Sequence[int]
) -> tuple[slice, ...]:
    """Return the slice of every dim of the global array that the rank at `coordinates` holds."""
    slices = [slice(0, size) for size in shape]
    for placement, ranks, index in zip(placements, mesh_shape, coordinates, strict=True):
        if isinstance(placement, Shard):
            outer = slices[placement.dim]
            inner = shard_slice(outer.stop - outer.start, ranks, index)
            slices[placement.dim] = slice(outer.start + inner.start, outer.start + inner.stop)
    return tuple(slices)


def local_shape(shape: Shape, mesh_shape: Shape, placements: Placements, coordinates: Sequence[int]) -> Shape:
    """Return the shape of the local array of the rank at `coordinates`."""
    slices = local_slices(shape, mesh_shape, placements, coordinates)
    return tuple(rows.stop - rows.start for rows in slices)


def index_along(dim: int, rows: Any) -> tuple[Any, ...]:
    """Return the index that takes `rows` of `dim` (a slice or an array) and all of every other dim."""
    return (*(slice(None),) * dim, rows)
