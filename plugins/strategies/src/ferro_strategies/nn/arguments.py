"""Checks of layers' arguments: sizes, which are whole numbers, and dtypes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arrays import Array, namespace_of

# One whole number for all dimensions, or one for each.
Sizes = SupportsIndex | Sequence[SupportsIndex]


def whole_number(layer: str, name: str, value: object, *, least: int = 1) -> int:
    """Make an int of a size, which may be a NumPy integer.

    Raises:
        UsageError: `value` is no whole number, or less than `least`; the message names the layer and the argument.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # refused below
    except TypeError:
        raise UsageError(f"{layer}: {name} must be a whole number, got {value!r}.") from None
    if number < least:
        raise UsageError(f"{layer}: {name} must be at least {least}, got {number}.")
    return number


def whole_numbers(layer: str, name: str, value: Sizes, length: int, *, least: int = 1) -> tuple[int, ...]:
    """Make a tuple of `length` sizes from one number for all, or from a sequence of so many.

    Raises:
        UsageError: the sequence has another length, or something in it is no whole number or less than `least`.
    """
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        return (whole_number(layer, name, value, least=least),) * length
    if len(value) != length:
        raise UsageError(f"{layer}: {name} must be one whole number or {length} of them, got {value!r}.")
    return tuple(whole_number(layer, name, item, least=least) for item in value)


def trailing_shape(layer: str, name: str, value: Sizes) -> tuple[int, ...]:
    """Make a shape of at least one dimension from its sizes, or from the size of its only dimension."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        return (whole_number(layer, name, value),)
    if not len(value):
        raise UsageError(f"{layer}: {name} must have at least one size, got {value!r}.")
    return tuple(whole_number(layer, name, item) for item in value)


def is_floating(dtype: npt.DTypeLike) -> bool:
    """Say whether `dtype` is of real floating-point numbers, those of ml_dtypes included."""
    kind = np.dtype(dtype).kind
    if kind != "V":  # that of the dtypes of ml_dtypes
        return kind == "f"
    try:
        ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        return False
    return True


def check_real_dtype(layer: str, dtype: npt.DTypeLike) -> None:
    """Refuse parameters of a dtype for which the layer has no meaning, complex numbers above all.

    Raises:
        UsageError: `dtype` is not of real floating-point numbers.
    """
    if not is_floating(dtype):
        raise UsageError(f"{layer}: dtype must be of real floating-point numbers, got {np.dtype(dtype)}.")


def check_floating(layer: object, x: Array) -> None:
    """Refuse an input of integers or booleans.

    Raises:
        UsageError: `x` is no plain array, or neither real nor complex floating-point numbers.
    """
    namespace_of(x)
    if x.dtype.kind not in "fc":
        check_real(layer, x)


def check_real(layer: object, x: Array, what: str = "input") -> None:
    """Refuse an array that is not of real floating-point numbers.

    Raises:
        UsageError: `x` is no plain array, or of integers, booleans or complex numbers.
    """
    namespace_of(x)
    if x.dtype.kind != "f" and not is_floating(x.dtype):
        remedy = "Take its real part or its absolute value" if x.dtype.kind == "c" else "Convert it with x.astype"
        raise UsageError(f"{layer}: {what} must be of real floating-point numbers, got {x.dtype}. {remedy}.")
