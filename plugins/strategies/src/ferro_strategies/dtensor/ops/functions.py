"""The NumPy functions that DTensors support, with their implementations on PlacedArrays.

An argument that the implementation does not take (out=, where=, …) is not supported. Functions that work along dims
which must not be cut are listed in `along_dims`; functions that are not listed at all work on arrays that no axis cuts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...nn.arrays import Array, namespace_of
from ..placed_array import PlacedArray
from ..placement import Partial, Placements, Replicate
from . import along_dims, contractions, manipulation, matmul, statistics
from .elementwise import Input, Scalar, apply, apply_ufunc, as_placed_arrays, assign, write_result
from .reductions import Axis, Name, checked_dims
from .statistics import cast_to, reduce_where


def clip(
    x: Input,
    a_min: Input | None = None,
    a_max: Input | None = None,
    *,
    min: Any = None,  # noqa: A002 - NumPy's names
    max: Any = None,  # noqa: A002
) -> PlacedArray:
    """Limit values from below and above; None sets no limit."""
    low, high = (one if other is None else other for one, other in ((a_min, min), (a_max, max)))
    given = [one for one in (low, high) if one is not None]

    def limit(local: Array, *limits: Any) -> Array:
        rest = iter(limits)
        bounds = [None if one is None else next(rest) for one in (low, high)]
        return np.clip(local, *bounds)  # type: ignore[no-any-return]

    return apply("clip", limit, [x, *given])


def power(x: Input, exponent: Input) -> PlacedArray:
    """Return `x ** exponent`, whose dtype is not always that of numpy.power (for booleans)."""
    return apply("power", operator.pow, [x, exponent])


def choose_where(condition: Input, x: Input, y: Input) -> PlacedArray:
    """Take elements of x where the condition holds, and of y elsewhere."""
    inputs = [condition, x, y]
    like = next(one for one in inputs if isinstance(one, PlacedArray))
    return apply("where", namespace_of(like.local).where, inputs)


def copy(x: PlacedArray) -> PlacedArray:
    """Return a copy with the same placements."""
    return x.with_view(x.local.copy())


def copyto(dst: PlacedArray, src: Input, *, where: Input = True) -> None:
    """Write `src`, broadcast, into an array, where a condition holds.

    Raises:
        TypeError: the value is of another kind, as a float for an array of integers.
    """
    like = np.empty(0, src.dtype) if isinstance(src, PlacedArray) else src
    np.copyto(np.empty((0,) * np.ndim(like), dst.dtype), like if np.ndim(like) == 0 else np.asarray(like)[:0])
    write_where(dst, src, where)


def write_where(dst: PlacedArray, src: Input, where: Input) -> None:
    """Write `src`, broadcast and converted, into an array, where a condition holds."""
    if where is True:
        assign(dst, src)
        return
    (source,) = as_placed_arrays([src], dst)
    assign(dst, choose_where(where, cast_to(source, dst.dtype), dst))


def full_like(x: PlacedArray, fill_value: Scalar, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    """Return an array of one value with the placements of `x`, except that Partial becomes Replicate."""
    placements: Placements = tuple(Replicate() if isinstance(one, Partial) else one for one in x.placements)
    local = namespace_of(x.local).full(x.local.shape, fill_value, dtype=x.dtype if dtype is None else dtype)
    return x.with_local(local, placements=placements)


def _filled_like(value: int) -> Callable[..., PlacedArray]:
    return lambda a, dtype=None: full_like(a, value, dtype)


def concatenate(arrays: Sequence[Input], axis: int | None = 0, *, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    """Join arrays along a dim that is not cut."""
    return manipulation.concatenate(as_placed_arrays(arrays), axis, None if dtype is None else np.dtype(dtype))


def stack(arrays: Sequence[Input], axis: int = 0, *, dtype: npt.DTypeLike | None = None) -> PlacedArray:
    """Join arrays of one shape along a new dim."""
    return manipulation.stack(as_placed_arrays(arrays), axis, None if dtype is None else np.dtype(dtype))


def _joined(axis: int, ndim: int) -> Callable[..., PlacedArray]:
    """Return the implementation of hstack and the like: arrays get `ndim` dims at least, and are joined along one."""

    def join(tup: Sequence[Input]) -> PlacedArray:
        arrays = as_placed_arrays(tup)
        if ndim == 3:  # dstack adds the third dim at the end
            arrays = [manipulation.expand_dims(one, -1) if len(one.shape) == 2 else one for one in arrays]
        arrays = [manipulation.expand_dims(one, tuple(range(ndim - len(one.shape)))) if len(one.shape) < ndim else one
                  for one in arrays]  # fmt: skip
        return manipulation.concatenate(arrays, axis if len(arrays[0].shape) > axis else 0)

    return join


def multiply_matrices(left: Input, right: Input) -> PlacedArray:
    """Return left @ right; one of them may be an array that all ranks have."""
    return matmul.matmul(*as_placed_arrays([left, right]))


def ravel(a: PlacedArray, order: str = "C") -> PlacedArray:
    """Return the elements in one dim, row by row."""
    return manipulation.reshape(manipulation.transpose(a) if order == "F" else a, -1)


def moveaxis(a: PlacedArray, source: Axis, destination: Axis) -> PlacedArray:
    """Return a view with dims moved to other positions."""
    ndim = len(a.shape)
    old, new = (checked_dims(axis, ndim, "moveaxis") for axis in (source, destination))
    order = [dim for dim in range(ndim) if dim not in old]
    for position, dim in sorted(zip(new, old, strict=True)):
        order.insert(position, dim)
    return manipulation.transpose(a, order)


def swapaxes(x: PlacedArray, axis1: int, axis2: int) -> PlacedArray:
    """Return a view with two dims exchanged."""
    order = list(range(len(x.shape)))
    (one,), (other,) = (checked_dims(axis, len(order), "swapaxes") for axis in (axis1, axis2))
    order[one], order[other] = other, one
    return manipulation.transpose(x, order)


def _reduction(name: Name, *, dtyped: bool = False) -> Callable[..., PlacedArray]:
    def with_dtype(a: PlacedArray, axis: Axis = None, dtype: npt.DTypeLike | None = None, out: Any = None,
                   keepdims: bool = False, initial: Any = None, where: Any = True) -> PlacedArray:  # fmt: skip
        if dtype is None and isinstance(out, PlacedArray):
            dtype = out.dtype
        result = reduce_where(a, name, axis, dtype, keepdims=keepdims, initial=initial, where=where)
        return write_result(name, result, out)

    def without_dtype(a: PlacedArray, axis: Axis = None, out: Any = None, keepdims: bool = False,
                      initial: Any = None, where: Any = True) -> PlacedArray:  # fmt: skip
        result = reduce_where(a, name, axis, keepdims=keepdims, initial=initial, where=where)
        return write_result(name, result, out)

    return with_dtype if dtyped else without_dtype


def _elementwise(function: Callable[..., Any], operands: int = 1) -> Callable[..., PlacedArray]:
    """Return the implementation of a function whose first arguments are arrays; the others all ranks have."""
    name = f"numpy.{function.__name__}"

    def call(*args: Any, **options: Any) -> PlacedArray:
        like = next(one for one in (*args, *options.values()) if isinstance(one, PlacedArray))
        rest = [along_dims.whole_local(one, name) for one in args[operands:]]
        named = {key: along_dims.whole_local(value, name) for key, value in options.items()}
        arrays = as_placed_arrays(args[:operands], like)
        return apply(name, lambda *locals_: function(*locals_, *rest, **named), arrays)

    return call


FUNCTIONS: dict[Callable[..., object], Callable[..., object]] = {
    **{getattr(np, name): _reduction(name, dtyped=True) for name in ("sum", "mean", "prod")},
    **{getattr(np, name): _reduction(name) for name in ("max", "min", "any", "all")},
    np.amax: _reduction("max"),
    np.amin: _reduction("min"),
    np.var: statistics.var,
    np.std: statistics.std,
    np.ptp: statistics.ptp,
    np.average: statistics.average,
    np.count_nonzero: statistics.count_nonzero,
    np.linalg.norm: statistics.norm,
    **{
        getattr(np, f"nan{name}"): statistics.without_nan(name)
        for name in ("sum", "prod", "mean", "var", "std", "max", "min")
    },
    np.allclose: statistics.allclose,
    np.array_equal: statistics.array_equal,
    np.array_equiv: statistics.array_equiv,
    np.einsum: contractions.einsum,
    np.tensordot: contractions.tensordot,
    np.dot: contractions.dot,
    np.inner: contractions.inner,
    np.outer: contractions.outer,
    np.vdot: contractions.vdot,
    np.trace: contractions.trace,
    np.diagonal: along_dims.diagonal,
    np.tril: along_dims.triangle("tril"),
    np.triu: along_dims.triangle("triu"),
    np.take_along_axis: along_dims.take_along_axis,
    np.pad: along_dims.pad,
    np.tile: along_dims.tile,
    np.broadcast_to: along_dims.broadcast_to,
    np.transpose: manipulation.transpose,
    np.swapaxes: swapaxes,
    np.moveaxis: moveaxis,
    np.reshape: manipulation.reshape,
    np.ravel: ravel,
    np.expand_dims: manipulation.expand_dims,
    np.squeeze: manipulation.squeeze,
    np.concatenate: concatenate,
    np.stack: stack,
    np.vstack: _joined(0, 2),
    np.hstack: _joined(1, 1),
    np.dstack: _joined(2, 3),
    np.clip: clip,
    np.where: choose_where,
    np.copy: copy,
    np.copyto: copyto,
    np.full_like: full_like,
    np.zeros_like: _filled_like(0),
    np.empty_like: _filled_like(0),
    np.ones_like: _filled_like(1),
    **{
        function: _elementwise(function)
        for function in (
            np.real, np.imag, np.angle, np.round, np.around, np.nan_to_num, np.isin, np.isreal, np.iscomplex,
            np.isposinf, np.isneginf, np.fix, np.sinc, np.i0, np.digitize, np.interp,
        )
    },
    np.isclose: _elementwise(np.isclose, 2),
    np.shape: lambda a: a.shape,
    np.ndim: lambda a: len(a.shape),
    np.size: lambda a, axis=None: int(np.prod([a.shape[dim] for dim in checked_dims(axis, len(a.shape), "size")])),
    np.iscomplexobj: lambda x: x.dtype.kind == "c",
    np.isrealobj: lambda x: x.dtype.kind != "c",
    np.result_type: lambda *given: np.result_type(*(getattr(one, "dtype", one) for one in given)),
}  # fmt: skip
REDUCING_UFUNCS: dict[np.ufunc, Name] = {
    np.add: "sum",
    np.multiply: "prod",
    np.maximum: "max",
    np.minimum: "min",
    np.logical_or: "any",
    np.logical_and: "all",
}
# The ufuncs that contract dims; NumPy has some of them since 2.0 or 2.2 only.
CONTRACTING_UFUNCS: dict[object, Callable[..., PlacedArray]] = {
    np.matmul: multiply_matrices,
    **{getattr(np, name): getattr(contractions, name) for name in ("vecdot", "matvec", "vecmat") if hasattr(np, name)},
}

__all__ = ["CONTRACTING_UFUNCS", "FUNCTIONS", "REDUCING_UFUNCS", "apply_ufunc", "cast_to", "clip", "copy", "power"]
