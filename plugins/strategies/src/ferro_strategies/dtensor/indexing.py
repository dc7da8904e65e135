"""Indexing: integers, slices and new dims. Nothing is sent, for dims that are cut stay whole.

x placed (Shard(0),)      x[:, 3]   x[..., 1:5]   x[:, None]     views of each rank's part
                          x[2]      x[1:]                        errors: rows would have to move
"""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import TypeAlias

from ferro import UnsupportedError, UsageError

from .layout import Shape
from .piece import Piece
from .placement import Shard, renamed

Index: TypeAlias = "int | slice | EllipsisType | None"


def index(x: Piece, key: object) -> Piece:
    """Return `x[key]`, a view.

    Args:
        x: the operand.
        key: an integer, a slice, an ellipsis or None for a new dim, or a tuple of them.

    Raises:
        UnsupportedError: something else is in the key, such as an array.
        UsageError: a dim that is cut would not stay whole.
        IndexError: there are too many, or an integer is outside its dim.
    """
    local_key: list[Index] = []
    shape: list[int] = []
    becomes: dict[int, int] = {}
    dims = iter(range(len(x.shape)))
    for one in _one_per_dim(key, x.shape):
        if one is None:
            local_key.append(None)
            shape.append(1)
            continue
        dim = next(dims)
        taken = _checked(one, dim, x)
        local_key.append(taken)
        if isinstance(taken, slice):
            becomes[dim] = len(shape)
            shape.append(len(range(*taken.indices(x.shape[dim]))))
    return x.with_local(
        x.local[(*local_key, ...)],  # the ellipsis keeps a single element an array
        shape=tuple(shape),
        placements=renamed(x.placements, becomes.__getitem__),
    )


def _one_per_dim(key: object, shape: Shape) -> list[int | slice | None]:
    """Return an index for each dim, in order, with None for new ones among them."""
    given = [_known(one) for one in (key if isinstance(key, tuple) else (key,))]
    dots = [at for at, one in enumerate(given) if one is ...]
    missing = len(shape) - sum(one is not None and one is not ... for one in given)
    if missing < 0 or len(dots) > 1:
        raise IndexError(f"too many indices, or more than one ellipsis, for shape {shape}: {key}")
    at = dots[0] if dots else len(given)
    spread = [*given[:at], *(slice(None),) * missing, *given[at + 1 :]]
    return [one for one in spread if not isinstance(one, EllipsisType)]


def _known(one: object) -> Index:
    if one is None or isinstance(one, slice | EllipsisType):
        return one
    try:
        if not isinstance(one, bool):  # which is a mask to numpy
            return operator.index(one)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise UnsupportedError(
        f"a DTensor takes integers, slices, ... and None as indices, not {type(one).__name__}. "
        "Work on .local where that is right for each part, or on full_tensor(), which gathers the "
        "whole on every rank.",
        op="index",
    )


def _checked(one: int | slice, dim: int, x: Piece) -> int | slice:
    """Return what a rank takes of a dim of its part."""
    size = x.shape[dim]
    if isinstance(one, int) and not -size <= one < size:
        raise IndexError(f"index {one} is outside dim {dim} of shape {x.shape}")
    if Shard(dim) not in x.placements:
        return one
    if isinstance(one, slice) and one.indices(size) == (0, size, 1):
        return slice(None)  # bounds that take the whole are not those of the parts
    raise UsageError(
        f"index {one!r} of dim {dim} of shape {x.shape}, placed {x.placements}: the dim is cut, "
        "and parts would have to move. Redistribute it to Replicate(), or another dim to Shard, "
        "first.",
        op="index",
    )
