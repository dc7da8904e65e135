"""Dispatch: call the implementation of a NumPy ufunc or function whose operands are DTensors.

DTensor's `__array_ufunc__` and `__array_function__` come here, with PlacedArrays for DTensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from .ops.elementwise import apply_ufunc, unsupported
from .ops.functions import FUNCTIONS, REDUCING_UFUNCS, multiply_matrices
from .ops.reductions import Axis, reduce
from .placed_array import PlacedArray


def call_ufunc(
    ufunc: np.ufunc, method: str, inputs: Sequence[object], options: Mapping[str, object]
) -> tuple[PlacedArray, ...]:
    """Call a ufunc, or its `reduce`, on PlacedArrays, numbers and arrays.

    Raises:
        UnsupportedError: DTensors do not support this ufunc, method or option.
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
    out = cast("tuple[PlacedArray | None, ...]", given.get("out", ()))
    if not all(one is None or isinstance(one, PlacedArray) for one in out):
        raise unsupported(f"{name} with an array as out=")
    dtype = cast("npt.DTypeLike | None", given.get("dtype"))
    return apply_ufunc(ufunc, inputs, out=out, dtype=dtype)  # type: ignore[arg-type]


def call_function(function: Callable[..., object], args: Sequence[object], options: Mapping[str, object]) -> object:
    """Call a NumPy function on PlacedArrays, numbers and arrays.

    Raises:
        UnsupportedError: DTensors do not support this function, or one of these arguments.
    """
    name = f"numpy.{getattr(function, '__name__', function)}"
    implementation = FUNCTIONS.get(function)
    if implementation is None:
        raise unsupported(name)
    try:
        inspect.signature(implementation).bind(*args, **options)
    except TypeError as error:
        raise unsupported(f"{name} so called ({error})") from None
    return implementation(*args, **options)


def _reduce(ufunc: np.ufunc, inputs: Sequence[object], given: Mapping[str, object], axis: object) -> PlacedArray:
    """Call `ufunc.reduce`; NumPy's default axis is 0 here, and None reduces over all dims."""
    unknown = given.keys() - {"axis", "keepdims"}
    if unknown:
        raise unsupported(f"numpy.{ufunc.__name__}.reduce with {', '.join(sorted(unknown))}")
    (operand,) = inputs
    assert isinstance(operand, PlacedArray), "the only operand is a DTensor"
    keepdims = bool(given.get("keepdims", False))
    return reduce(operand, REDUCING_UFUNCS[ufunc], cast("Axis", axis), keepdims=keepdims)
