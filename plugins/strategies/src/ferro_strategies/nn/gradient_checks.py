"""Checks of gradients before they are added to those of a parameter."""

from __future__ import annotations

import math

import numpy as np

from ferro.errors import UsageError

from .arrays import Array, namespace_of


def check_grad(name: str, value: Array, grad: Array) -> None:
    """Refuse what `Parameter.add_grad` cannot add.

    Args:
        name: the parameter's name.
        value: the parameter's value.
        grad: the gradient.

    Raises:
        UsageError: `grad` is no plain array, has another shape than the value, or is complex where that is real.
    """
    if not (type(grad) is np.ndarray and grad.shape == value.shape):
        if not isinstance(grad, np.generic):
            namespace_of(grad)
        check_grad_shape(name, value, grad.shape)
    _check_real(name, value, grad)


def check_grad_product(name: str, value: Array, a: Array, b: Array) -> None:
    """Refuse what `Parameter.add_grad_product` cannot add; see `check_grad`."""
    namespace_of(a)
    namespace_of(b)
    shape, rows, columns = value.shape, a.shape[0], b.shape[-1]
    if (rows, columns) != shape or not a.ndim == b.ndim == 2 or a.shape[1] != b.shape[0]:
        fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and rows * columns == value.size
        if not fits or all(math.prod(shape[:split]) != rows for split in range(len(shape) + 1)):
            raise _wrong_shape(name, value, (*a.shape[:-1], columns))
    _check_real(name, value, a)
    _check_real(name, value, b)


def check_grad_rows(name: str, value: Array, rows: Array, grads: Array) -> None:
    """Refuse what `Parameter.add_grad_rows` cannot add; see `check_grad`."""
    namespace_of(grads)
    check_grad_shape(name, value, (value.shape[0], *grads.shape[1:]))
    if rows.shape != grads.shape[:1]:
        raise UsageError(
            f"gradients of {grads.shape[0]} rows of parameter {name!r} were given for indices of shape {rows.shape}. "
            "Correct the pullback that added them."
        )
    _check_real(name, value, grads)


def check_grad_shape(name: str, value: Array, shape: tuple[int, ...]) -> None:
    """Refuse a gradient of another shape than the value's."""
    if shape != value.shape:
        raise _wrong_shape(name, value, shape)


def _wrong_shape(name: str, value: Array, shape: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"gradient of parameter {name!r} has shape {shape}, but the parameter has {value.shape}. Correct the pullback "
        "that added it."
    )


def _check_real(name: str, value: Array, grad: Array) -> None:
    if grad.dtype.kind == "c" and value.dtype.kind != "c":
        raise UsageError(
            f"gradient of parameter {name!r} is {grad.dtype}, but the parameter is {value.dtype}: its imaginary part "
            "would be lost. Correct the pullback that added it."
        )
