"""The NumPy functions that DTensors support, with their implementations on PlacedArrays.

An argument that the implementation does not take (out=, where=, …) is not supported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ...nn.arrays import Array, namespace_of
from ..placed_array import PlacedArray, replicated
from ..placement import Partial, Placements, Replicate
from . import manipulation, matmul
from .elementwise import Input, Scalar, apply, apply_ufunc
from .reductions import Axis, Name, checked_dims, reduce
from .sharding_propagation import jointly_linear, keeps_sum, not_linear


def cast_to(x: PlacedArray, dtype: npt.DTypeLike) -> PlacedArray:
    """Return a copy of another dtype; a sum stays Partial if the conversion is exact."""
    target = np.dtype(dtype)
    # Conversion to a wider dtype commutes with a sum, truncation does not.
    linear = jointly_linear if keeps_sum(x.dtype, target) else not_linear
    return apply("astype", lambda local: local.astype(target), [x], linear)


def clip(x: PlacedArray, a_min: Input | None = None, a_max: Input | None = None) -> PlacedArray:
    """Limit values from below and above; None sets no limit."""
    if a_min is not None:
        (x,) = apply_ufunc(np.maximum, [x, a_min])
    if a_max is not None:
        (x,) = apply_ufunc(np.minimum, [x, a_max])
    return x if a_min is not None or a_max is not None else copy(x)


def where(condition: PlacedArray | Array, x: Input, y: Input) -> PlacedArray:
    """Take elements of x where the condition holds, and of y elsewhere."""
    inputs = [condition, x, y]
    like = next(one for one in inputs if isinstance(one, PlacedArray))
    return apply("where", namespace_of(like.local).where, inputs)


def copy(x: PlacedArray) -> PlacedArray:
    """Return a copy with the same placements."""
    return x.with_view(x.local.copy())


def full_like(x: PlacedArray, fill_value: Scalar, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    """Return an array of one value with the placements of `x`, except that Partial becomes Replicate."""
    placements: Placements = tuple(Replicate() if isinstance(one, Partial) else one for one in x.placements)
    local = namespace_of(x.local).full(x.local.shape, fill_value, dtype=x.dtype if dtype is None else dtype)
    return x.with_local(local, placements=placements)


def _zeros_like(x: PlacedArray, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    return full_like(x, 0, dtype)


def _ones_like(x: PlacedArray, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    return full_like(x, 1, dtype)


def _concatenate(arrays: Sequence[PlacedArray | Array], axis: int = 0) -> PlacedArray:
    return manipulation.concatenate(_as_placed_arrays(arrays), axis)


def _stack(arrays: Sequence[PlacedArray | Array], axis: int = 0) -> PlacedArray:
    return manipulation.stack(_as_placed_arrays(arrays), axis)


def _as_placed_arrays(arrays: Sequence[PlacedArray | Array]) -> list[PlacedArray]:
    like = next(one for one in arrays if isinstance(one, PlacedArray))
    xp = namespace_of(like.local)
    return [one if isinstance(one, PlacedArray) else replicated(xp.asarray(one), like.mesh) for one in arrays]


def multiply_matrices(left: PlacedArray | Array, right: PlacedArray | Array) -> PlacedArray:
    """Return left @ right; one of them may be an array that all ranks have."""
    return matmul.matmul(*_as_placed_arrays([left, right]))


def swapaxes(x: PlacedArray, axis1: int, axis2: int) -> PlacedArray:
    """Return a view with two dims exchanged."""
    order = list(range(len(x.shape)))
    (one,), (other,) = (checked_dims(axis, len(order), "swapaxes") for axis in (axis1, axis2))
    order[one], order[other] = other, one
    return manipulation.transpose(x, order)


def _reduction_with_dtype(name: Name) -> Callable[..., PlacedArray]:
    def reduction(
        a: PlacedArray, axis: Axis = None, dtype: npt.DTypeLike | None = None, *, keepdims: bool = False
    ) -> PlacedArray:
        return reduce(a, name, axis, dtype, keepdims=keepdims)

    return reduction


def _reduction_without_dtype(name: Name) -> Callable[..., PlacedArray]:
    def reduction(a: PlacedArray, axis: Axis = None, *, keepdims: bool = False) -> PlacedArray:
        return reduce(a, name, axis, keepdims=keepdims)

    return reduction


FUNCTIONS: dict[Callable[..., object], Callable[..., object]] = {
    np.sum: _reduction_with_dtype("sum"),
    np.mean: _reduction_with_dtype("mean"),
    np.prod: _reduction_with_dtype("prod"),
    np.max: _reduction_without_dtype("max"),
    np.min: _reduction_without_dtype("min"),
    np.amax: _reduction_without_dtype("max"),
    np.amin: _reduction_without_dtype("min"),
    np.any: _reduction_without_dtype("any"),
    np.all: _reduction_without_dtype("all"),
    np.transpose: manipulation.transpose,
    np.swapaxes: swapaxes,
    np.reshape: manipulation.reshape,
    np.expand_dims: manipulation.expand_dims,
    np.squeeze: manipulation.squeeze,
    np.concatenate: _concatenate,
    np.stack: _stack,
    np.clip: clip,
    np.where: where,
    np.copy: copy,
    np.full_like: full_like,
    np.zeros_like: _zeros_like,
    np.ones_like: _ones_like,
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: len(a.shape),
}
REDUCING_UFUNCS: dict[np.ufunc, Name] = {
    np.add: "sum",
    np.multiply: "prod",
    np.maximum: "max",
    np.minimum: "min",
    np.logical_or: "any",
    np.logical_and: "all",
}
