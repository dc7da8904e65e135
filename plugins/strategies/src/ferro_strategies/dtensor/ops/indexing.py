"""Index arrays with integers, slices and new dims; the result is a view, and nothing is sent.

A sharded dim must be taken whole. With x placed (Shard(0),):

    x[:, 3]   x[..., 1:5]   x[:, None]     views of each rank's part
    x[2]      x[1:]                        errors: rows would have to move
"""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import TypeAlias

from ferro import UnsupportedError, UsageError

from ..local_shapes import Shape
from ..placed_array import PlacedArray
from ..placement import Shard, map_shard_dims

Index: TypeAlias = "int | slice | EllipsisType | None"


def index(x: PlacedArray, key: object) -> PlacedArray:
    """Return `x[key]`, a view.

    Args:
        x: the array.
        key: an integer, a slice, an ellipsis or None for a new dim, or a tuple of them.

    Raises:
        UnsupportedError: the key holds anything else, such as an array.
        UsageError: a sharded dim would not stay whole.
        IndexError: there are too many indices, or an integer is outside its dim.
    """
    local_key: list[Index] = []
    shape: list[int] = []
    new_dim: dict[int, int] = {}
    dims = iter(range(len(x.shape)))
    for one in _expand_key(key, x.shape):
        if one is None:
            local_key.append(None)
            shape.append(1)
            continue
        dim = next(dims)
        local_index = _local_index(one, dim, x)
        local_key.append(local_index)
        if isinstance(local_index, slice):
            new_dim[dim] = len(shape)
            shape.append(len(range(*local_index.indices(x.shape[dim]))))
    return x.with_view(
        x.local[(*local_key, ...)],  # the ellipsis keeps a single element an array
        shape=tuple(shape),
        placements=map_shard_dims(x.placements, new_dim.__getitem__),
    )


def _expand_key(key: object, shape: Shape) -> list[int | slice | None]:
    """Replace the ellipsis: return an index for each dim, and None for each new dim."""
    given = [_checked_index(one) for one in (key if isinstance(key, tuple) else (key,))]
    dots = [at for at, one in enumerate(given) if one is ...]
    missing = len(shape) - sum(one is not None and one is not ... for one in given)
    if missing < 0 or len(dots) > 1:
        raise IndexError(f"too many indices, or more than one ellipsis, for shape {shape}: {key}")
    at = dots[0] if dots else len(given)
    expanded = [*given[:at], *(slice(None),) * missing, *given[at + 1 :]]
    return [one for one in expanded if not isinstance(one, EllipsisType)]


def _checked_index(one: object) -> Index:
    if one is None or isinstance(one, slice | EllipsisType):
        return one
    try:
        if not isinstance(one, bool):  # to NumPy a bool is a mask
            return operator.index(one)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise UnsupportedError(
        f"a DTensor takes integers, slices, ... and None as indices, not {type(one).__name__}. "
        "Work on .local where that is right for each part, or on full_tensor(), which gathers the "
        "whole on every rank.",
        op="index",
    )


def _local_index(one: int | slice, dim: int, x: PlacedArray) -> int | slice:
    """Return the index of a dim of this rank's part."""
    size = x.shape[dim]
    if isinstance(one, int) and not -size <= one < size:
        raise IndexError(f"index {one} is outside dim {dim} of shape {x.shape}")
    if Shard(dim) not in x.placements:
        return one
    if isinstance(one, slice) and one.indices(size) == (0, size, 1):
        return slice(None)  # bounds of the whole dim do not fit the part
    raise UsageError(
        f"index {one!r} of dim {dim} of shape {x.shape}, placed {x.placements}: the dim is cut, "
        "and parts would have to move. Redistribute it to Replicate(), or another dim to Shard, "
        "first.",
        op="index",
    )
