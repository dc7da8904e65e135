"""Reduce over dims: each rank reduces its local array; over sharded dims the result is Partial.

    over a dim that an axis shards    sum, mean      prod      max, any      min, all
    the result on that axis is        Partial(sum)   (prod)    (max)         (min)

A mean divides by the global number of elements, so uneven parts have the right weight. A Partial operand stays Partial
if its reduction is the same operation (a sum for a mean); otherwise it is reduced over the ranks first. Half precision
is added up and multiplied in float32, and rounded once, after the reduction over the ranks.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ferro import UnsupportedError, UsageError

from ...nn.arrays import Array, namespace_of, wide_dtype
from ..local_shapes import Shape
from ..placed_array import PlacedArray, is_half
from ..placement import Partial, Placement, Replicate, Shard
from ..redistribute import redistribute
from .sharding_propagation import keeps_sum

Axis: TypeAlias = int | Sequence[int] | None
Name: TypeAlias = Literal["sum", "mean", "prod", "max", "min", "any", "all"]

_COMBINED_BY = {
    "sum": "sum", "mean": "sum", "prod": "prod", "max": "max", "min": "min", "any": "max",
    "all": "min",
}  # fmt: skip


def reduce(
    x: PlacedArray, name: Name, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
) -> PlacedArray:
    """Reduce dims as NumPy's function `name` does.

    Args:
        x: the operand.
        name: the reduction.
        axis: one or several dims; None for all.
        dtype: dtype of the result and of the arithmetic, for sum, mean and prod.
        keepdims: keep reduced dims, with size 1.

    Raises:
        UsageError: there is no such dim, the dims of a max or min have no elements, or the dtype of a mean is an
            integer dtype, which would truncate each rank's part.
        UnsupportedError: a max or min of complex numbers over a sharded dim.
    """
    dims = checked_dims(axis, len(x.shape), name)
    if name in ("max", "min"):
        _check_ordered(x, dims, name)
    if name == "mean" and dtype is not None and np.dtype(dtype).kind in "iub":
        raise UsageError(f"mean: dtype {np.dtype(dtype)} has no fractions", op="mean")
    combined_by = Partial(_COMBINED_BY[name])
    result_dtype = _result_dtype(x, name, dtype)
    kept = combined_by if _stays_partial(name, x.dtype, result_dtype) else None
    operand_placements = tuple(Replicate() if isinstance(one, Partial) and one != kept else one for one in x.placements)
    x = redistribute(x, operand_placements, copy=False)
    placements = tuple(_reduced(one, dims, combined_by, keepdims) for one in x.placements)
    shape = _reduced_shape(x.shape, dims, keepdims)
    local = _reduce_local(x, name, dims, result_dtype, keepdims)
    return x.with_local(local, shape=shape, placements=placements, dtype=result_dtype)


def checked_dims(axis: Axis, ndim: int, name: str) -> tuple[int, ...]:
    """Check dims and return them counted from the front.

    Raises:
        UsageError: a dim does not exist, or is named twice.
    """
    if axis is None:
        return tuple(range(ndim))
    given = tuple(axis) if isinstance(axis, Sequence | np.ndarray) else (axis,)
    dims = tuple(operator.index(dim) for dim in given)
    if not all(-ndim <= dim < ndim for dim in dims):
        raise UsageError(f"{name}: axis {axis} of an array of {ndim} dims", op=name)
    found = tuple(dim % ndim for dim in dims)
    if len(set(found)) != len(found):
        raise UsageError(f"{name}: axis {axis} names a dim twice", op=name)
    return found


def _result_dtype(x: PlacedArray, name: Name, dtype: npt.DTypeLike | None) -> np.dtype:
    """Return the dtype of a reduction's result."""
    if name in ("any", "all"):
        return np.dtype(bool)
    if dtype is not None:
        return np.dtype(dtype)
    if name in ("max", "min") or x.dtype.kind not in "biu":
        return x.dtype
    if name == "mean":
        return np.dtype(float)
    empty = namespace_of(x.local).empty(0, x.dtype)
    return empty.sum().dtype  # type: ignore[no-any-return]


def _stays_partial(name: Name, dtype: np.dtype, result: np.dtype) -> bool:
    """Return True if each rank may reduce its part of a Partial over dims before the ranks add up the parts."""
    if name in ("any", "all"):
        return False  # the parts are numbers, not truth values
    return name in ("max", "min") or keeps_sum(dtype, result)


def _reduced(placement: Placement, dims: Sequence[int], combined_by: Partial, keepdims: bool) -> Placement:
    if not isinstance(placement, Shard):
        return placement
    if placement.dim in dims:
        return combined_by
    before = 0 if keepdims else sum(dim < placement.dim for dim in dims)
    return Shard(placement.dim - before)


def _reduced_shape(shape: Shape, dims: Sequence[int], keepdims: bool) -> Shape:
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape) if keepdims or dim not in dims)


def _reduce_local(x: PlacedArray, name: Name, dims: tuple[int, ...], dtype: np.dtype, keepdims: bool) -> Array:
    """Reduce this rank's part; the result is still in float32 where `dtype` is half precision."""
    xp = namespace_of(x.local)
    value: object
    if name == "mean":
        return _mean(x, dims, dtype, keepdims)
    if name in ("sum", "prod"):
        wide = wide_dtype(dtype) if is_half(dtype) else dtype
        value = getattr(xp, name)(x.local, axis=dims, dtype=wide, keepdims=keepdims)
    elif name in ("max", "min") and not all(x.local.shape[dim] for dim in dims):
        shape = _reduced_shape(x.local.shape, dims, keepdims)
        value = xp.full(shape, identity(name, x.local.dtype), dtype=x.local.dtype)
    else:
        value = getattr(xp, name)(x.local, axis=dims, keepdims=keepdims)
    result: Array = xp.asarray(value)
    return result


def _mean(x: PlacedArray, dims: tuple[int, ...], dtype: np.dtype, keepdims: bool) -> Array:
    """Return this rank's part of a mean: its sum, divided by the global number of elements."""
    wide = wide_dtype(dtype) if is_half(dtype) else dtype
    xp = namespace_of(x.local)
    total: Array = xp.asarray(xp.sum(x.local, axis=dims, dtype=wide, keepdims=keepdims))
    count = math.prod(x.shape[dim] for dim in dims)
    if count == 0:
        # NumPy would warn of a division by zero, on some ranks only.
        return xp.full(total.shape, np.nan, dtype=wide)  # type: ignore[no-any-return]
    total /= count
    return total


def identity(name: str, dtype: np.dtype) -> float | int | bool:
    """Return the number that changes no result of a reduction: for ranks, or places, without elements."""
    if name not in ("max", "min") or dtype.kind == "b":
        return name in ("prod", "all", "min")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return int(limits.min if name == "max" else limits.max)
    return -math.inf if name == "max" else math.inf


def _check_ordered(x: PlacedArray, dims: Sequence[int], name: str) -> None:
    if any(x.shape[dim] == 0 for dim in dims):
        raise UsageError(f"{name}: of no elements, for shape {x.shape} has a size of 0 along axis {dims}", op=name)
    sharded = any(isinstance(one, Shard) and one.dim in dims for one in x.placements)
    if sharded and x.dtype.kind == "c":
        raise UnsupportedError(
            f"{name}: complex numbers over a dim that is cut. Redistribute the dim to Replicate() first.", op=name
        )
