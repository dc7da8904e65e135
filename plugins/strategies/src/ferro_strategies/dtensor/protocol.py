"""Protocol: what numpy's functions and operators, given DTensors, are carried out by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from .elementwise import apply_ufunc, unsupported
from .functions import FUNCTIONS, REDUCING_UFUNCS, multiply_matrices
from .piece import Piece
from .reductions import Axis, reduce


def call_ufunc(
    ufunc: np.ufunc, method: str, inputs: Sequence[object], options: Mapping[str, object]
) -> tuple[Piece, ...]:
    """Carry out a ufunc, or its `reduce`, whose operands are pieces, numbers and arrays.

    Raises:
        UnsupportedError: this ufunc, method or option is not defined for DTensors.
    """
    name = f"numpy.{ufunc.__name__}"
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("where") is True:
        del given["where"]
    if method == "reduce" and ufunc in REDUCING_UFUNCS:
        return (_reduce(ufunc, inputs, given, options.get("axis", 0)),)
    if method != "__call__":
        raise unsupported(f"{name}.{method}")
    if ufunc is np.matmul and not given:
        return (multiply_matrices(*inputs),)  # type: ignore[arg-type]
    if ufunc.signature is not None or given.keys() - {"out", "dtype"}:
        text = ", ".join(f"{key}=" for key in given)
        raise unsupported(f"{name} with {text}" if text else name)
    out = cast("tuple[Piece | None, ...]", given.get("out", ()))
    if not all(one is None or isinstance(one, Piece) for one in out):
        raise unsupported(f"{name} with an array as out=")
    dtype = cast("npt.DTypeLike | None", given.get("dtype"))
    return apply_ufunc(ufunc, inputs, out=out, dtype=dtype)  # type: ignore[arg-type]


def call_function(
    function: Callable[..., object], args: Sequence[object], options: Mapping[str, object]
) -> object:
    """Carry out a numpy function whose operands are pieces, numbers and arrays.

    Raises:
        UnsupportedError: it, or one of these arguments, is not defined for DTensors.
    """
    name = f"numpy.{getattr(function, '__name__', function)}"
    ours = FUNCTIONS.get(function)
    if ours is None:
        raise unsupported(name)
    try:
        inspect.signature(ours).bind(*args, **options)
    except TypeError as error:
        raise unsupported(f"{name} so called ({error})") from None
    return ours(*args, **options)


def _reduce(
    ufunc: np.ufunc, inputs: Sequence[object], given: Mapping[str, object], axis: object
) -> Piece:
    """Carry out `ufunc.reduce`: over the first dim unless told, over all for None."""
    more = given.keys() - {"axis", "keepdims"}
    if more:
        raise unsupported(f"numpy.{ufunc.__name__}.reduce with {', '.join(sorted(more))}")
    (operand,) = inputs
    assert isinstance(operand, Piece), "one operand, which is a DTensor"
    keepdims = bool(given.get("keepdims", False))
    return reduce(operand, REDUCING_UFUNCS[ufunc], cast("Axis", axis), keepdims=keepdims)
