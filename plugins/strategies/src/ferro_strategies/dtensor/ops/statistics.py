"""Statistics over dims, cut or not: variance, norms, averages, and reductions without NaN.

They are composed of reductions and elementwise operations. Over a cut dim a variance reduces the mean first, and is a
Partial sum then. Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ferro import UsageError

from ...nn.arrays import Array, namespace_of, wide_dtype
from ..placed_array import PlacedArray, is_half
from ..placement import Partial, Replicate, all_replicated
from ..redistribute import redistribute
from .elementwise import Input, apply, apply_ufunc, as_placed_arrays, unsupported
from .manipulation import expand_dims, squeeze
from .reductions import Axis, Name, checked_dims, identity, reduce
from .sharding_propagation import jointly_linear, keeps_sum, not_linear


def cast_to(x: PlacedArray, dtype: npt.DTypeLike) -> PlacedArray:
    """Return a copy of another dtype; a sum stays Partial if the conversion is exact."""
    target = np.dtype(dtype)
    # Conversion to a wider dtype commutes with a sum, truncation does not.
    linear = jointly_linear if keeps_sum(x.dtype, target) else not_linear
    return apply("astype", lambda local: local.astype(target), [x], linear)


def _rounded(x: PlacedArray, dtype: np.dtype) -> PlacedArray:
    """Round a result of arithmetic in float32 to half precision, after its reduction over the ranks."""
    return x if x.dtype == dtype else x.with_local(x.local, dtype=dtype)


def _wide(x: PlacedArray, dtype: npt.DTypeLike | None = None) -> tuple[PlacedArray, np.dtype]:
    """Return the array in the dtype to compute in, and the dtype of the result."""
    result = np.dtype(float) if x.dtype.kind in "biu" else x.dtype
    result = result if dtype is None else np.dtype(dtype)
    wide = wide_dtype(result) if is_half(result) else result
    return (x if x.dtype == wide else cast_to(x, wide)), result


def without_partial(x: PlacedArray) -> PlacedArray:
    """Reduce an array over the axes of the mesh on which it is Partial."""
    reduced = tuple(Replicate() if isinstance(one, Partial) else one for one in x.placements)
    return redistribute(x, reduced, copy=False)


def item(x: PlacedArray) -> Any:
    """Return an array of one element as a Python number, on every rank."""
    return redistribute(x, all_replicated(x.mesh.ndim), copy=False).local.item()


def reduce_where(
    x: PlacedArray,
    name: Name,
    axis: Axis = None,
    dtype: npt.DTypeLike | None = None,
    *,
    keepdims: bool = False,
    initial: Any = None,
    where: Any = True,
) -> PlacedArray:
    """Reduce the elements where a condition holds, starting from `initial`."""
    if where is not True:
        x = without_partial(x)
        if name == "mean":
            return _mean_where(x, axis, dtype, keepdims, where)
        if name in ("max", "min") and initial is None:
            raise UsageError(f"{name}: where= needs initial=, the result of no elements", op=name)
        x = _choose(x, where, identity(name, x.dtype))
    if initial is None:
        return reduce(x, name, axis, dtype, keepdims=keepdims)
    ufunc = _WITH_INITIAL.get(name)
    if ufunc is None:
        raise unsupported(f"numpy.{name} with initial=")
    if name in ("max", "min") and any(x.shape[dim] == 0 for dim in checked_dims(axis, len(x.shape), name)):
        nothing = cast_to(reduce(x, "any", axis, keepdims=keepdims), x.dtype)
        return apply("initial=", lambda local: namespace_of(local).full_like(local, initial), [nothing])
    result = reduce(x, name, axis, dtype, keepdims=keepdims)
    return cast_to(apply_ufunc(ufunc, [result, initial])[0], result.dtype)


_WITH_INITIAL: dict[str, np.ufunc] = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def _choose(x: PlacedArray, where: Any, other: Any) -> PlacedArray:
    """Put a number in place of the elements where a condition does not hold."""

    def choose(condition: Array, local: Array) -> Array:
        xp = namespace_of(local)
        return xp.where(condition, local, xp.asarray(other).astype(local.dtype))  # type: ignore[no-any-return]

    return apply("where=", choose, [where, x])


def _count_where(where: Any, like: PlacedArray, axis: Axis, keepdims: bool) -> PlacedArray:
    """Count the elements where a condition holds, as numbers of the dtype of `like`."""

    def everywhere(condition: Array, local: Array) -> Array:
        return namespace_of(local).broadcast_to(condition, local.shape).astype(bool)  # type: ignore[no-any-return]

    mask = apply("where=", everywhere, [where, like])
    return cast_to(without_partial(reduce(mask, "sum", axis, keepdims=keepdims)), _real(like.dtype))


def _mean_where(x: PlacedArray, axis: Axis, dtype: npt.DTypeLike | None, keepdims: bool, where: Any) -> PlacedArray:
    x, result_dtype = _wide(x, dtype)
    total = reduce_where(x, "sum", axis, keepdims=keepdims, where=where)
    count = _count_where(where, x, axis, keepdims)
    return _rounded(apply_ufunc(np.true_divide, [total, count])[0], result_dtype)


def var(
    a: PlacedArray,
    axis: Axis = None,
    dtype: npt.DTypeLike | None = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    correction: float | None = None,
    where: Any = True,
) -> PlacedArray:
    """Return the variance, of the global number of elements less `ddof`."""
    x, result_dtype = _wide(without_partial(a), dtype)
    variance = _variance(x, axis, ddof if correction is None else correction, keepdims, where)
    return _rounded(variance, _real(result_dtype))


def std(
    a: PlacedArray,
    axis: Axis = None,
    dtype: npt.DTypeLike | None = None,
    ddof: float = 0,
    keepdims: bool = False,
    *,
    correction: float | None = None,
    where: Any = True,
) -> PlacedArray:
    """Return the standard deviation, the square root of the variance."""
    x, result_dtype = _wide(without_partial(a), dtype)
    variance = _variance(x, axis, ddof if correction is None else correction, keepdims, where)
    return _rounded(apply_ufunc(np.sqrt, [variance])[0], _real(result_dtype))


def _real(dtype: np.dtype) -> np.dtype:
    return np.empty(0, dtype).real.dtype if dtype.kind == "c" else dtype


def _variance(x: PlacedArray, axis: Axis, ddof: float, keepdims: bool, where: Any) -> PlacedArray:
    dims = checked_dims(axis, len(x.shape), "var")
    mean = reduce_where(x, "mean", dims, keepdims=True, where=where)
    squares = _squares(apply_ufunc(np.subtract, [x, mean])[0])
    total = reduce_where(squares, "sum", dims, keepdims=keepdims, where=where)
    if where is True:
        return apply_ufunc(np.true_divide, [total, max(math.prod(x.shape[dim] for dim in dims) - ddof, 0)])[0]
    (count,) = apply_ufunc(np.subtract, [_count_where(where, squares, dims, keepdims), ddof])
    return apply_ufunc(np.true_divide, [total, *apply_ufunc(np.maximum, [count, 0])])[0]


def _squares(x: PlacedArray) -> PlacedArray:
    """Return the squares of the absolute values."""
    if x.dtype.kind != "c":
        return apply_ufunc(np.multiply, [x, x])[0]
    return apply("square", lambda local: local.real * local.real + local.imag * local.imag, [x])


def average(a: PlacedArray, axis: Axis = None, weights: Any = None, *, keepdims: bool = False) -> PlacedArray:
    """Average with weights of the array's shape, or of the length of the one dim `axis`."""
    if weights is None:
        return reduce(a, "mean", axis, keepdims=keepdims)
    a = without_partial(a)
    dims = checked_dims(axis, len(a.shape), "average")
    (w,) = as_placed_arrays([weights], a)
    if w.shape != a.shape:
        if len(dims) != 1 or w.shape != (a.shape[dims[0]],):
            raise UsageError(f"average: weights of shape {w.shape} for shape {a.shape}, axis {axis}", op="average")
        others = tuple(dim for dim in range(len(a.shape)) if dim not in dims)
        w = expand_dims(w, others) if others else w
    x, result_dtype = _wide(a, np.result_type(a.dtype, w.dtype, *([np.float64] if a.dtype.kind in "biu" else [])))
    w = _wide(without_partial(w), result_dtype)[0]
    weight_of_each = apply("average", lambda one, other: namespace_of(one).broadcast_to(one, other.shape), [w, x])
    total = reduce(apply_ufunc(np.multiply, [x, w])[0], "sum", dims, keepdims=keepdims)
    scale = without_partial(reduce(weight_of_each, "sum", dims, keepdims=keepdims))
    if item(reduce(apply_ufunc(np.equal, [scale, 0])[0], "any")):
        raise ZeroDivisionError("average: the weights add up to zero")
    return _rounded(apply_ufunc(np.true_divide, [total, scale])[0], result_dtype)


def ptp(a: PlacedArray, axis: Axis = None, *, keepdims: bool = False) -> PlacedArray:
    """Return the largest element less the smallest."""
    a = without_partial(a)
    largest, smallest = (reduce(a, name, axis, keepdims=keepdims) for name in _EXTREMES)
    return apply_ufunc(np.subtract, [largest, smallest])[0]


_EXTREMES: tuple[Name, Name] = ("max", "min")


def norm(x: PlacedArray, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> PlacedArray:  # noqa: A002
    """Return numpy.linalg.norm, of vectors or matrices, except for norms of matrices that take singular values."""
    dims = checked_dims(axis, len(x.shape), "norm")
    x, dtype = _wide(without_partial(x))
    if ord is None or (ord == 2 and len(dims) == 1) or (ord in ("f", "fro") and len(dims) == 2):
        (found,) = apply_ufunc(np.sqrt, [reduce(_squares(x), "sum", dims, keepdims=keepdims)])
    elif len(dims) == 1 and not isinstance(ord, str):
        found = _vector_norm(x, float(ord), dims, keepdims)
    elif len(dims) == 2 and ord in (1, -1, math.inf, -math.inf):
        summed, rest = dims if abs(ord) == 1 else dims[::-1]
        sums = reduce(apply_ufunc(np.absolute, [x])[0], "sum", summed, keepdims=True)
        found = reduce(sums, "max" if ord > 0 else "min", rest, keepdims=True)
        found = found if keepdims else squeeze(found, dims)
    else:
        raise unsupported(f"numpy.linalg.norm with ord={ord!r} over {len(dims)} dims")
    return _rounded(found, _real(dtype))


def _vector_norm(x: PlacedArray, order: float, dims: tuple[int, ...], keepdims: bool) -> PlacedArray:
    (size,) = apply_ufunc(np.absolute, [x])
    if math.isinf(order):
        return reduce(size, "max" if order > 0 else "min", dims, keepdims=keepdims)
    if order == 0:
        return reduce(cast_to(apply_ufunc(np.not_equal, [x, 0])[0], size.dtype), "sum", dims, keepdims=keepdims)
    if order == 1:
        return reduce(size, "sum", dims, keepdims=keepdims)
    total = reduce(apply_ufunc(np.power, [size, order])[0], "sum", dims, keepdims=keepdims)
    return apply_ufunc(np.power, [total, 1 / order])[0]


def without_nan(name: str) -> Callable[..., PlacedArray]:
    """Return the implementation of numpy.nansum and the like: the function without "nan", of the elements but NaN."""

    def function(
        a: PlacedArray,
        axis: Axis = None,
        dtype: npt.DTypeLike | None = None,
        *,
        ddof: float = 0,
        keepdims: bool = False,
    ) -> PlacedArray:
        a = without_partial(a)
        where = apply("isnan", lambda local: ~np.isnan(local), [a])
        if name in ("var", "std"):
            return (var if name == "var" else std)(a, axis, dtype, ddof, keepdims, where=where)
        if name in ("max", "min"):
            some = without_partial(reduce(where, "any", axis, keepdims=keepdims))
            chosen = reduce(_choose(a, where, identity(name, a.dtype)), cast("Name", name), axis, keepdims=keepdims)
            return chosen if a.dtype.kind in "biu" else _choose(chosen, some, math.nan)
        return reduce_where(a, cast("Name", name), axis, dtype, keepdims=keepdims, where=where)

    return function


def count_nonzero(a: PlacedArray, axis: Axis = None, *, keepdims: bool = False) -> PlacedArray:
    """Count the elements that are not zero."""
    return reduce(apply_ufunc(np.not_equal, [a, 0])[0], "sum", axis, keepdims=keepdims)


def allclose(a: Input, b: Input, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """Return True on every rank if all elements are close."""

    def isclose(one: Array, other: Array) -> Array:
        return np.isclose(one, other, rtol, atol, equal_nan)

    return bool(item(reduce(apply("allclose", isclose, [a, b]), "all")))


def array_equal(a1: Input, a2: Input, equal_nan: bool = False) -> bool:
    """Return True on every rank if the shapes and all elements are equal."""
    one, other = as_placed_arrays([a1, a2])
    return one.shape == other.shape and _all_equal(one, other, equal_nan)


def array_equiv(a1: Input, a2: Input) -> bool:
    """Return True on every rank if the arrays, broadcast to one shape, are equal."""
    one, other = as_placed_arrays([a1, a2])
    try:
        np.broadcast_shapes(one.shape, other.shape)
    except ValueError:
        return False
    return _all_equal(one, other, equal_nan=False)


def _all_equal(one: PlacedArray, other: PlacedArray, equal_nan: bool) -> bool:
    def equal(left: Array, right: Array) -> Array:
        same = left == right
        return same | ((left != left) & (right != right)) if equal_nan else same  # type: ignore[no-any-return]

    return bool(item(reduce(apply("array_equal", equal, [one, other]), "all")))
