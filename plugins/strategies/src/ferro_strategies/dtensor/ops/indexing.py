"""Index arrays; integers, slices and new dims give a view, an array of indices or a mask gives a copy.

A cut dim must be taken whole. With x placed (Shard(0),):

    x[:, 3]   x[..., 1:5]   x[:, None]     views of each rank's part
    x[:, [0, 2]]   x[:, mask]              copies of columns of each rank's part
    x[2]      x[1:]   x[x > 0]             errors: rows would have to move, or parts of any size would come out
    x[x > 0] = 1                           each rank writes into its part
"""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np

from ferro import UnsupportedError, UsageError

from ..local_shapes import Shape, index_along
from ..placed_array import PlacedArray
from ..placement import Shard, all_replicated, map_shard_dims
from .along_dims import along_dims
from .elementwise import Input, as_placed_arrays, assign
from .functions import write_where
from .manipulation import expand_dims

Index: TypeAlias = "int | slice | EllipsisType | None"


def index(x: PlacedArray, key: object) -> PlacedArray:
    """Return `x[key]`, a view unless the key holds an array.

    Args:
        x: the array.
        key: an integer, a slice, an ellipsis or None for a new dim, or a tuple of them; or one array of integers or
            booleans, by itself or with slices, which all ranks have.

    Raises:
        UnsupportedError: the key holds anything else.
        UsageError: a cut dim would not stay whole.
        IndexError: there are too many indices, or an integer is outside its dim.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if any(_is_array(one) for one in keys):
        return _index_by_array(x, keys)
    local_key: list[Index] = []
    shape: list[int] = []
    new_dim: dict[int, int] = {}
    dims = iter(range(len(x.shape)))
    for one in _expand_key(keys, x.shape):
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


def assign_at(x: PlacedArray, key: object, value: Input) -> None:
    """Write `value`, broadcast, into `x[key]`; a mask may be cut as `x` is.

    Raises:
        UnsupportedError: the key holds an array that is no mask, or a mask and something else.
        UsageError: shapes or placements do not fit; nothing was written.
        ValueError, OverflowError or TypeError: NumPy's, if `value` is a number that the dtype of `x` does not hold.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if isinstance(value, bool | int | float | complex | np.generic):
        # As an array the number would be cast, without an error: NaN into integers, 300 into uint8.
        np.empty(1, x.dtype)[...] = value
    if not any(_is_array(one) for one in keys):
        assign(index(x, keys), value)
        return
    mask, operand = as_placed_arrays([keys[0], value], x)
    if len(keys) > 1 or mask.dtype.kind != "b":
        raise _unsupported_key("an array of integers, or a mask with other indices, in an assignment")
    rest = len(x.shape) - len(mask.shape)
    if rest < 0 or mask.shape != x.shape[: len(mask.shape)]:
        raise IndexError(f"a mask of shape {mask.shape} does not fit shape {x.shape}")
    if len(operand.shape) > rest:
        raise UsageError(
            f"x[mask] = value: a value of shape {operand.shape} depends on how many elements each part selects. Give "
            f"one of {rest} dims, for all selected places, or use x[...] = numpy.where(mask, values, x).",
            op="assignment",
        )
    if rest:
        mask = expand_dims(mask, tuple(range(len(mask.shape), len(x.shape))))
    write_where(x, operand, mask)


def _is_array(one: object) -> bool:
    return isinstance(one, PlacedArray | np.ndarray | list) and not (isinstance(one, np.ndarray) and one.ndim == 0)


def _index_by_array(x: PlacedArray, keys: tuple[Any, ...]) -> PlacedArray:
    """Index by one array; the other indices are slices and new dims, which are taken first, as a view."""
    (at, *others) = [at for at, one in enumerate(keys) if _is_array(one)]
    rest = [*keys[:at], *keys[at + 1 :]]
    if others or not all(one is None or one is ... or isinstance(one, slice) for one in rest):
        raise _unsupported_key("an array with integers or with another array")
    array = _indices(keys[at], x)
    taken = array.ndim if array.dtype.kind == "b" else 1
    missing = len(x.shape) - taken - sum(isinstance(one, slice) for one in rest)
    if missing < 0:
        raise IndexError(f"too many indices for shape {x.shape}: {keys}")
    if ... not in rest:
        rest, keys = [*rest, ...], (*keys, ...)
    before = [slice(None)] * missing
    expanded: list[Any] = []
    for position, one in enumerate(keys):
        expanded += [slice(None)] * taken if position == at else before if one is ... else [one]
    first = sum(len(before) if one is ... else 1 for one in keys[:at])
    viewed = index(x, tuple(expanded))
    dims = range(first, first + taken)
    if array.dtype.kind == "b" and array.shape != tuple(viewed.shape[dim] for dim in dims):
        raise IndexError(f"a mask of shape {array.shape} does not fit the dims {list(dims)} of shape {viewed.shape}")
    new_dims = 1 if array.dtype.kind == "b" else array.ndim
    return along_dims(  # type: ignore[no-any-return]
        "indexing by an array (numpy.where and reductions with where= take masks that are cut)",
        lambda local: local[index_along(first, array)],
        viewed,
        dims,
        lambda dim, _: dim if dim < first else dim + new_dims - taken,
    )


def _indices(given: Any, x: PlacedArray) -> Any:
    """Return an array of indices, which all ranks have."""
    if isinstance(given, PlacedArray):
        if given.placements != all_replicated(given.mesh.ndim):
            raise UsageError(
                f"x[indices]: the indices are placed {given.placements}; what they select would have any size on each "
                "rank. Redistribute them (and the dims that they index) to Replicate(). To compute with the selected "
                "elements alone, use numpy.where(mask, x, 0), or where= of a reduction; x[mask] = number works.",
                op="index",
            )
        given = given.local
    array = np.asarray(given) if isinstance(given, list) else given
    if array.size == 0 and isinstance(given, list):
        array = array.astype(int)
    if array.dtype.kind not in "biu":
        raise IndexError(f"arrays of indices hold integers or booleans, not {array.dtype}")
    return array


def _expand_key(keys: tuple[object, ...], shape: Shape) -> list[int | slice | None]:
    """Replace the ellipsis: return an index for each dim, and None for each new dim."""
    given = [_checked_index(one) for one in keys]
    dots = [at for at, one in enumerate(given) if one is ...]
    missing = len(shape) - sum(one is not None and one is not ... for one in given)
    if missing < 0 or len(dots) > 1:
        raise IndexError(f"too many indices, or more than one ellipsis, for shape {shape}: {keys}")
    at = dots[0] if dots else len(given)
    expanded = [*given[:at], *(slice(None),) * missing, *given[at + 1 :]]
    return [one for one in expanded if not isinstance(one, EllipsisType)]


def _checked_index(one: object) -> Index:
    if one is None or isinstance(one, slice | EllipsisType):
        return one
    try:
        if not isinstance(one, bool | np.bool_):  # to NumPy a bool is a mask
            return operator.index(one)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise _unsupported_key(type(one).__name__)


def _unsupported_key(what: str) -> UnsupportedError:
    return UnsupportedError(
        "a DTensor takes integers, slices, ... and None as indices, and one array of integers or booleans with slices, "
        f"not {what}. Work on .local where that is right for each part, or on full_tensor(), which gathers the "
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
