"""Apply elementwise operations with broadcasting; each rank computes on its local arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ferro import UnsupportedError, UsageError

from ...nn.arrays import Array, namespace_of
from ..local_shapes import Shape
from ..placed_array import PlacedArray, replicated, same_mesh
from .sharding_propagation import (
    Linearity,
    Operand,
    OpSharding,
    broadcast_labels,
    jointly_linear,
    linear_in_first,
    multilinear,
    not_linear,
    propagate_sharding,
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
) -> tuple[PlacedArray, ...]:
    """Apply an elementwise ufunc and return its results, which are `out` where that is given.

    Args:
        ufunc: an elementwise ufunc.
        inputs: PlacedArrays, and numbers or arrays that are the same on every rank.
        out: array for each result, None for a new one; its placements must be the result's.
        dtype: passed to the ufunc.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent or written.
    """
    linear = not_linear if dtype is not None else _LINEARITY.get(ufunc, not_linear)
    name = f"numpy.{ufunc.__name__}"
    arguments, shape, sharding = _propagate(name, inputs, linear)
    for target in out:
        if target is not None:
            _check_out(name, target, arguments, shape, sharding)
    locals_ = _locals(arguments, sharding)
    results: object
    if any(target is not None for target in out):
        local_out = tuple(None if target is None else target.local for target in out)
        results = ufunc(*locals_, out=local_out, dtype=dtype)
    else:
        results = ufunc(*locals_, dtype=dtype)
    found = results if isinstance(results, tuple) else (results,)
    placed = [_result(one, arguments, shape, sharding) for one in found]
    given = (*out, *(None,) * (len(placed) - len(out)))
    return tuple(new if target is None else target for new, target in zip(placed, given, strict=True))


def apply(name: str, function: Function, inputs: Sequence[Input], linear: Linearity = not_linear) -> PlacedArray:
    """Apply a function that works element by element, with broadcasting."""
    arguments, shape, sharding = _propagate(name, inputs, linear)
    return _result(function(*_locals(arguments, sharding)), arguments, shape, sharding)


def assign(target: PlacedArray, value: Input) -> None:
    """Write a value, broadcast to the target's shape, into an array.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent or written.
    """
    inputs = [target, value]
    arguments, shape, sharding = _propagate("assignment", inputs, jointly_linear)
    _check_out("assignment", target, arguments, shape, sharding)
    target.local[...] = _locals(arguments, sharding)[1]


def _propagate(name: str, inputs: Sequence[Input], linear: Linearity) -> tuple[list[Argument], Shape, OpSharding]:
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
    return arguments, shape, propagate_sharding(name, operands, len(shape), linear)


def _linearity_with_scalars(linear: Linearity, arguments: Sequence[Argument]) -> Linearity:
    """Return the linearity as a function of the arrays alone, where some operands are numbers."""
    if linear is jointly_linear:
        return not_linear
    if linear is linear_in_first and not isinstance(arguments[0], PlacedArray):
        return not_linear
    return jointly_linear  # a single array, times or divided by a number


def _as_argument(value: Input, like: PlacedArray) -> Argument:
    """Place an array on all ranks; return a number as it is, because NumPy promotes numbers weakly."""
    if isinstance(value, PlacedArray | bool | int | float | complex | np.generic):
        return value
    return replicated(namespace_of(like.local).asarray(value), like.mesh)


def _locals(arguments: Sequence[Argument], sharding: OpSharding) -> list[Array | Scalar]:
    arrays = iter(sharding.redistribute_operands())
    return [next(arrays).local if isinstance(one, PlacedArray) else one for one in arguments]


def _result(value: object, arguments: Sequence[Argument], shape: Shape, sharding: OpSharding) -> PlacedArray:
    like = next(one for one in arguments if isinstance(one, PlacedArray))
    # NumPy returns 0-d results as numbers.
    local = cast("Array", namespace_of(like.local).asarray(value))
    return like.with_local(local, shape=shape, placements=sharding.result)


def _check_out(name: str, out: PlacedArray, arguments: Sequence[Argument], shape: Shape, sharding: OpSharding) -> None:
    like = next(one for one in arguments if isinstance(one, PlacedArray))
    agree = out.shape == shape and out.placements == sharding.result
    if not agree or not same_mesh(out.mesh, like.mesh):
        raise UsageError(
            f"{name}: what is written to has shape {out.shape} and placements {out.placements}, "
            f"the result has shape {shape} and placements {sharding.result}. Redistribute what is "
            "written to first, or do without out= (x = x + y for x += y).",
            op=name,
        )


def unsupported(name: str) -> UnsupportedError:
    """Return the error for a function that DTensors do not support."""
    return UnsupportedError(
        f"{name} is not defined for DTensors. Work on .local where that is right for each part, "
        "or on full_tensor(), which gathers the whole on every rank.",
        op=name,
    )
