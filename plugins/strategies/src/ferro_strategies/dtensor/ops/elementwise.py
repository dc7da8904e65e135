"""Apply elementwise operations with broadcasting; each rank computes on its local arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ferro import UnsupportedError, UsageError
from ferro.arrays import lost_meaning

from ...nn.arrays import Array, namespace_of
from ..agreement import compute_agreed
from ..local_shapes import Shape
from ..placed_array import PlacedArray, replicated, same_mesh
from ..placement import Partial, Placements, Replicate
from ..redistribute import redistribute
from .sharding_propagation import (
    Linearity,
    Operand,
    OpSharding,
    broadcast_labels,
    has_partial_sum,
    jointly_linear,
    linear_in_first,
    multilinear,
    not_linear,
    propagate_sharding,
    whole_operand,
)

Scalar: TypeAlias = bool | int | float | complex | np.generic
Input: TypeAlias = PlacedArray | Array | Scalar  # arrays and numbers are the same on every rank
Argument: TypeAlias = PlacedArray | Scalar
# Takes one array or number per operand; returns an array, or several of the same shape.
Function: TypeAlias = Callable[..., object]

_LINEARITY: dict[np.ufunc, Linearity] = {
    np.positive: jointly_linear,
    np.negative: jointly_linear,
    np.conjugate: jointly_linear,
    np.add: jointly_linear,
    np.subtract: jointly_linear,
    np.multiply: multilinear,
    np.true_divide: linear_in_first,
}


def apply_ufunc(
    ufunc: np.ufunc,
    inputs: Sequence[Input],
    *,
    out: tuple[PlacedArray | None, ...] = (),
    dtype: npt.DTypeLike | None = None,
    where: Input = True,
) -> tuple[PlacedArray, ...]:
    """Apply an elementwise ufunc and return its results, which are `out` where that is given.

    Args:
        ufunc: an elementwise ufunc.
        inputs: PlacedArrays, and numbers or arrays that are the same on every rank.
        out: array for each result, None for a new one; its placements must be the result's.
        dtype: passed to the ufunc.
        where: the elements that are computed; the others of `out` stay as they are.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent or written.
    """
    linear = not_linear if dtype is not None or where is not True else _LINEARITY.get(ufunc, not_linear)
    name = f"numpy.{ufunc.__name__}"
    operands = inputs if where is True else [*inputs, where]
    arguments, shape, sharding = _propagate(name, operands, ufunc, linear)
    like = next(one for one in arguments if isinstance(one, PlacedArray))
    for target in out:
        if target is not None:
            _check_out(name, target, like, shape, sharding)
    locals_ = _locals(arguments, sharding)
    options: dict[str, object] = {} if where is True else {"where": locals_.pop()}
    if any(target is not None for target in out):
        options["out"] = tuple(None if target is None else target.local for target in out)
    results = _call(name, ufunc, arguments, lambda: ufunc(*locals_, dtype=dtype, **options))
    found = results if isinstance(results, tuple) else (results,)
    placed = [_result(one, arguments, shape, sharding, sharding.sum_dtype) for one in found]
    given = (*out, *(None,) * (len(placed) - len(out)))
    return tuple(new if target is None else target for new, target in zip(placed, given, strict=True))


def apply(name: str, function: Function, inputs: Sequence[Input], linear: Linearity = not_linear) -> PlacedArray:
    """Apply a function that works element by element, with broadcasting."""
    arguments, shape, sharding = _propagate(name, inputs, function, linear)
    locals_ = _locals(arguments, sharding)
    value = _call(name, function, arguments, lambda: function(*locals_))
    return _result(value, arguments, shape, sharding, sharding.sum_dtype)


def assign(target: PlacedArray, value: Input) -> None:
    """Write a value, broadcast to the target's shape, into an array.

    Into a Partial target the value is written by one rank along the axis, and the others write zeros (ones into a
    product), unless the value is a Partial sum as well.

    Raises:
        UsageError: shapes or placements do not fit; nothing was written.
    """
    (operand,) = as_placed_arrays([value], target)
    if not broadcasts_to(operand.shape, target.shape):
        raise UsageError(
            f"assignment: an array of shape {operand.shape} does not fit into shape {target.shape}", op="assignment"
        )
    labels = broadcast_labels(operand.shape, target.shape)
    operands = [whole_operand(target), Operand(array=operand, labels=labels)]
    sharding = propagate_sharding("assignment", operands, len(target.shape), jointly_linear, target.dtype)
    if sharding.result == target.placements:
        target.local[...] = sharding.redistribute_operands()[1].local
        return
    reduced = tuple(Replicate() if isinstance(one, Partial) else one for one in target.placements)
    operands[0] = whole_operand(target.with_view(target.local, placements=reduced))
    sharding = propagate_sharding("assignment", operands, len(target.shape))
    if sharding.result != reduced:
        raise _misplaced("assignment", target, target.shape, sharding.result)
    new = sharding.redistribute_operands()[1]
    xp = namespace_of(new.local)
    full = xp.broadcast_to(new.local, target.local.shape).astype(target.dtype)
    whole = operands[0].array.with_local(full, dtype=target.dtype)
    target.local[...] = redistribute(whole, target.placements, copy=False).local


def broadcasts_to(shape: Shape, target: Shape) -> bool:
    """Return True if an array of `shape` can be broadcast to the shape `target`."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _propagate(
    name: str, inputs: Sequence[Input], function: Function, linear: Linearity
) -> tuple[list[Argument], Shape, OpSharding]:
    """Return the operands, the result's shape, and the sharding of operands and result (without numbers)."""
    first = next(one for one in inputs if isinstance(one, PlacedArray))
    arguments = [_as_argument(one, first) for one in inputs]
    arrays = [one for one in arguments if isinstance(one, PlacedArray)]
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UsageError(f"{name}: shapes {shapes} do not broadcast together", op=name) from None
    if linear is not not_linear and len(arrays) < len(arguments):
        linear = _linearity_with_scalars(linear, arguments)
    operands = [Operand(array=array, labels=broadcast_labels(array.shape, shape)) for array in arrays]
    dtype = None
    if linear is not not_linear and has_partial_sum(arrays):
        dtype = result_dtype(function, arguments)
    return arguments, shape, propagate_sharding(name, operands, len(shape), linear, dtype)


def result_dtype(function: Function, arguments: Sequence[Argument]) -> np.dtype:
    """Return the dtype of a function's result, by calling it on arrays without elements."""
    empty = (namespace_of(one.local).empty(0, one.dtype) if isinstance(one, PlacedArray) else one for one in arguments)
    found = function(*empty)
    return cast("Array", found[0] if isinstance(found, tuple) else found).dtype


def _linearity_with_scalars(linear: Linearity, arguments: Sequence[Argument]) -> Linearity:
    """Return the linearity as a function of the arrays alone, where some operands are numbers."""
    numbers = [one for one in arguments if not isinstance(one, PlacedArray)]
    if linear is jointly_linear or not all(np.isfinite(one) for one in numbers):
        return not_linear
    if linear is linear_in_first and (not isinstance(arguments[0], PlacedArray) or not arguments[1]):
        return not_linear
    return jointly_linear  # a single array, times or divided by a number


def _as_argument(value: Input, like: PlacedArray) -> Argument:
    """Place an array on all ranks; return a number as it is, because NumPy promotes numbers weakly.

    Raises:
        UsageError: the value is no array of numbers, or means more than its numbers, as masked arrays do.
    """
    if isinstance(value, PlacedArray | bool | int | float | complex | np.generic):
        return value
    if problem := lost_meaning(value):
        raise UsageError(f"DTensor: an operand is {problem}")
    array = namespace_of(like.local).asarray(value)
    if array.dtype.kind in "OSUT":
        raise UsageError(f"DTensor: an operand is a {type(value).__name__} of dtype {array.dtype}, not of numbers")
    return replicated(array, like.mesh)


def as_placed_arrays(values: Sequence[Input], like: PlacedArray | None = None) -> list[PlacedArray]:
    """Return operands as PlacedArrays; arrays and numbers among them are the same on every rank."""
    if like is None:
        like = next(one for one in values if isinstance(one, PlacedArray))
    arguments = [_as_argument(one, like) for one in values]
    asarray = namespace_of(like.local).asarray
    return [one if isinstance(one, PlacedArray) else replicated(asarray(one), like.mesh) for one in arguments]


def _locals(arguments: Sequence[Argument], sharding: OpSharding) -> list[Array | Scalar]:
    arrays = iter(sharding.redistribute_operands())
    return [next(arrays).local if isinstance(one, PlacedArray) else one for one in arguments]


def _call(name: str, function: Function, arguments: Sequence[Argument], call: Callable[[], object]) -> object:
    """Compute the local result; where the numbers decide whether that raises an error, all ranks raise it."""
    if not _is_power_that_may_fail(function, arguments) and "raise" not in np.geterr().values():
        return call()
    mesh = next(one for one in arguments if isinstance(one, PlacedArray)).mesh
    return compute_agreed(name, mesh, call)


def _is_power_that_may_fail(function: Function, arguments: Sequence[Argument]) -> bool:
    """Return True for integers to a power that may be negative, which NumPy refuses."""
    if function not in (np.power, operator.pow):
        return False
    kinds = [one.dtype.kind if isinstance(one, PlacedArray) else np.asarray(one).dtype.kind for one in arguments]
    exponent = arguments[1]
    positive = kinds[1] in "bu" or (isinstance(exponent, int | np.integer) and exponent >= 0)
    return kinds[0] in "biu" and kinds[1] in "biu" and not positive


def _result(
    value: object, arguments: Sequence[Argument], shape: Shape, sharding: OpSharding, dtype: np.dtype | None
) -> PlacedArray:
    like = next(one for one in arguments if isinstance(one, PlacedArray))
    # NumPy returns 0-d results as numbers.
    local = cast("Array", namespace_of(like.local).asarray(value))
    return like.with_local(local, shape=shape, placements=sharding.result, dtype=dtype)


def _check_out(name: str, out: PlacedArray, like: PlacedArray, shape: Shape, sharding: OpSharding) -> None:
    agree = out.shape == shape and out.placements == sharding.result
    if not agree or not same_mesh(out.mesh, like.mesh):
        raise _misplaced(name, out, shape, sharding.result)


def _misplaced(name: str, out: PlacedArray, shape: Shape, placements: Placements) -> UsageError:
    return UsageError(
        f"{name}: what is written to has shape {out.shape} and placements {out.placements}, "
        f"the result has shape {shape} and placements {placements}. Redistribute what is "
        "written to first, or do without out= (x = x + y for x += y).",
        op=name,
    )


def write_result(name: str, result: PlacedArray, out: object) -> PlacedArray:
    """Write a result into `out` if that is given, and return what then holds it.

    Raises:
        UsageError: `out` has another shape or other placements.
        UnsupportedError: `out` is not a DTensor.
    """
    if out is None:
        return result
    if not isinstance(out, PlacedArray):
        raise unsupported(f"numpy.{name} with an array as out=", "Give a DTensor, or use full_tensor() of the result.")
    if out.shape != result.shape or out.placements != result.placements or not same_mesh(out.mesh, result.mesh):
        raise _misplaced(f"numpy.{name}", out, result.shape, result.placements)
    np.copyto(out.local, result.local, casting="same_kind")
    return out


def unsupported(name: str, remedy: str = "") -> UnsupportedError:
    """Return the error for a function that DTensors do not support as it was called."""
    placed = "" if remedy else " so placed"
    remedy = remedy or (
        "Redistribute to Replicate() on every axis, where NumPy's functions work on every rank. Or work on .local "
        "where that is right for each part, or on full_tensor(), which gathers the whole on every rank."
    )
    return UnsupportedError(f"{name} is not defined for DTensors{placed}. {remedy}", op=name)
