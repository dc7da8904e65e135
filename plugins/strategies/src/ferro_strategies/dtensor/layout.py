"""Where the pieces of a global array lie: arithmetic on shapes and coordinates.

A coordinate is a rank's place in the mesh, one number per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from .placement import Placements, Shard

Shape: TypeAlias = tuple[int, ...]


def part(size: int, parts: int, index: int) -> slice:
    """Return which of `size` rows are in part `index` of `parts`, as numpy.array_split cuts."""
    least, longer = divmod(size, parts)
    start = index * least + min(index, longer)
    return slice(start, start + least + (index < longer))


def local_slices(
    shape: Shape, mesh_shape: Shape, placements: Placements, coordinate: Sequence[int]
) -> tuple[slice, ...]:
    """Return what part of the global array the rank at `coordinate` holds, a slice per dim."""
    slices = [slice(0, size) for size in shape]
    for placement, ranks, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Shard):
            outer = slices[placement.dim]
            inner = part(outer.stop - outer.start, ranks, index)
            slices[placement.dim] = slice(outer.start + inner.start, outer.start + inner.stop)
    return tuple(slices)


def local_shape(
    shape: Shape, mesh_shape: Shape, placements: Placements, coordinate: Sequence[int]
) -> Shape:
    """Return the shape of what the rank at `coordinate` holds."""
    slices = local_slices(shape, mesh_shape, placements, coordinate)
    return tuple(cut.stop - cut.start for cut in slices)


def along(dim: int, rows: slice) -> tuple[slice, ...]:
    """Return the index that takes `rows` of `dim` and all of the dims before and after it."""
    return (*(slice(None),) * dim, rows)
