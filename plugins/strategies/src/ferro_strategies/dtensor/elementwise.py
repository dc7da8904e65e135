"""Elementwise operations: broadcasting over what each rank has, when operands lie alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ferro import UnsupportedError, UsageError

from ..nn.arrays import Array, namespace_of
from .alignment import Alignment, Linear, Operand, align, never, numerator, one_factor, together
from .layout import Shape
from .piece import Piece, replicated, same_mesh

Scalar: TypeAlias = bool | int | float | complex | np.generic
# Called with one array or number per operand; returns an array, or several of the same shape.
Function: TypeAlias = Callable[..., object]

_LINEAR: dict[np.ufunc, Linear] = {
    np.positive: together,
    np.negative: together,
    np.conjugate: together,
    np.add: together,
    np.subtract: together,
    np.multiply: one_factor,
    np.true_divide: numerator,
}


def apply_ufunc(
    ufunc: np.ufunc,
    inputs: Sequence[Piece | Array | Scalar],
    *,
    out: tuple[Piece | None, ...] = (),
    dtype: npt.DTypeLike | None = None,
) -> tuple[Piece, ...]:
    """Return a ufunc's results, or `out` filled with them.

    Args:
        ufunc: an elementwise one.
        inputs: pieces, or what is the same on every rank: numbers, arrays.
        out: where results go, None for a new array; placed as the result is.
        dtype: as the ufunc takes it.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent or written.
    """
    linear = never if dtype is not None else _LINEAR.get(ufunc, never)
    name = f"numpy.{ufunc.__name__}"
    arguments, shape, alignment = _prepared(name, inputs, linear)
    for target in out:
        if target is not None:
            _check_out(name, target, arguments, shape, alignment)
    locals_ = _locals(arguments, alignment)
    results: object
    if any(target is not None for target in out):
        into = tuple(None if target is None else target.local for target in out)
        results = ufunc(*locals_, out=into, dtype=dtype)
    else:
        results = ufunc(*locals_, dtype=dtype)
    found = results if isinstance(results, tuple) else (results,)
    pieces = [_result(one, arguments, shape, alignment) for one in found]
    given = (*out, *(None,) * (len(pieces) - len(out)))
    return tuple(
        piece if target is None else target for piece, target in zip(pieces, given, strict=True)
    )


def apply(
    name: str,
    function: Function,
    inputs: Sequence[Piece | Array | Scalar],
    linear: Linear = never,
) -> Piece:
    """Return what a function gives that works element by element, with broadcasting."""
    arguments, shape, alignment = _prepared(name, inputs, linear)
    return _result(function(*_locals(arguments, alignment)), arguments, shape, alignment)


def assign(target: Piece, value: Piece | Array | Scalar) -> None:
    """Write over an array; the value is broadcast to it.

    Raises:
        UsageError: shapes or placements do not fit; nothing was sent or written.
    """
    inputs = [target, value]
    arguments, shape, alignment = _prepared("assignment", inputs, together)
    _check_out("assignment", target, arguments, shape, alignment)
    target.local[...] = _locals(arguments, alignment)[1]


def _prepared(
    name: str, inputs: Sequence[Piece | Array | Scalar], linear: Linear
) -> tuple[list[Piece | Scalar], Shape, Alignment]:
    """Return the operands, the shape of the result, and how they are to be aligned.

    Numbers take no part in the alignment; they do in the question what is linear.
    """
    first = next(one for one in inputs if isinstance(one, Piece))
    arguments = [_taken_in(one, first) for one in inputs]
    pieces = [one for one in arguments if isinstance(one, Piece)]
    try:
        shape = np.broadcast_shapes(*(piece.shape for piece in pieces))
    except ValueError:
        shapes = ", ".join(str(piece.shape) for piece in pieces)
        raise UsageError(f"{name}: shapes {shapes} do not broadcast together", op=name) from None
    if linear is not never and len(pieces) < len(arguments):
        linear = _with_numbers(linear, arguments)
    operands = [Operand(piece=piece, labels=_labels(piece.shape, shape)) for piece in pieces]
    return arguments, shape, align(name, operands, len(shape), linear)


def _with_numbers(linear: Linear, arguments: Sequence[Piece | Scalar]) -> Linear:
    """Return the rule for the pieces alone when some operands are numbers, the same on all."""
    if linear is together:
        return never
    if linear is numerator and not isinstance(arguments[0], Piece):
        return never
    return together  # one piece, times or divided by a number


def _taken_in(value: Piece | Array | Scalar, like: Piece) -> Piece | Scalar:
    """Return an operand as a piece, or a number as it is: its type must stay weak."""
    if isinstance(value, Piece | bool | int | float | complex | np.generic):
        return value
    return replicated(namespace_of(like.local).asarray(value), like.mesh)


def _labels(shape: Shape, result: Shape) -> tuple[int | None, ...]:
    """Return which dim of the result each dim becomes; None for one that is stretched."""
    missing = len(result) - len(shape)
    return tuple(
        missing + dim if size == result[missing + dim] else None for dim, size in enumerate(shape)
    )


def _locals(arguments: Sequence[Piece | Scalar], alignment: Alignment) -> list[Array | Scalar]:
    aligned = iter(alignment.pieces())
    return [next(aligned).local if isinstance(one, Piece) else one for one in arguments]


def _result(
    value: object, arguments: Sequence[Piece | Scalar], shape: Shape, alignment: Alignment
) -> Piece:
    like = next(one for one in arguments if isinstance(one, Piece))
    local = cast("Array", namespace_of(like.local).asarray(value))  # NumPy makes 0-d ones numbers
    return like.with_local(local, shape=shape, placements=alignment.result)


def _check_out(
    name: str,
    out: Piece,
    arguments: Sequence[Piece | Scalar],
    shape: Shape,
    alignment: Alignment,
) -> None:
    like = next(one for one in arguments if isinstance(one, Piece))
    agree = out.shape == shape and out.placements == alignment.result
    if not agree or not same_mesh(out.mesh, like.mesh):
        raise UsageError(
            f"{name}: what is written to has shape {out.shape} and placements {out.placements}, "
            f"the result has shape {shape} and placements {alignment.result}. Redistribute what is "
            "written to first, or do without out= (x = x + y for x += y).",
            op=name,
        )


def unsupported(name: str) -> UnsupportedError:
    """Return the error for what DTensors do not have."""
    return UnsupportedError(
        f"{name} is not defined for DTensors. Work on .local where that is right for each part, "
        "or on full_tensor(), which gathers the whole on every rank.",
        op=name,
    )
