"""Checks of layers' inputs and arguments, with messages that name the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ferro.arrays import lost_meaning
from ferro.errors import UsageError

from .arrays import Array, namespace_of


def check_input(layer: object, x: Array, expected: str, *, fits: bool) -> None:
    """Refuse an input whose shape does not fit.

    Raises:
        UsageError: `fits` is False; the message names the layer, `expected` and the shape of `x`.
    """
    if not fits:
        raise UsageError(f"{layer!r}: expected input of shape {expected}, got {x.shape}.")


def check_dtype(layer: object, x: Array, dtype: npt.DTypeLike) -> None:
    """Refuse an input whose dtype is not `dtype`: all later layers would compute in the input's dtype.

    Raises:
        UsageError: `x` is no array, or its dtype is not `dtype`.
    """
    namespace_of(x)
    if x.dtype != dtype:
        raise UsageError(
            f"{layer!r}: expected input of dtype {np.dtype(dtype)}, that of its parameters, "
            f"got {x.dtype}. Convert it with x.astype, or build the layer with dtype=."
        )


def check_gradient(layer: object, grad: Array, shape: tuple[int, ...]) -> None:
    """Refuse a gradient that is not that of an output of `shape`, before the pullback changes anything.

    Raises:
        UsageError: `grad` is no plain array of that shape, such as a loss.
    """
    if type(grad) is np.ndarray and grad.shape == shape:
        return
    found = lost_meaning(grad)
    if not found:
        if not isinstance(grad, np.generic) and getattr(grad, "shape", None) == shape:
            namespace_of(grad)
            return
        is_array = hasattr(grad, "shape") and not isinstance(grad, np.generic)
        found = f"an array of shape {grad.shape}" if is_array else f"a {type(grad).__name__}"
    name = layer if isinstance(layer, str) else type(layer).__name__
    raise UsageError(
        f"{name}: pullback takes the gradient of the output, an array of shape {shape}; "
        f"nn.cross_entropy returns (loss, grad). It got {found}."
    )


def checked_pullback(
    layer: object, shape: tuple[int, ...], pull: Callable[[Array], Array | None]
) -> Callable[[Array], Array | None]:
    """Put a check of the gradient of an output of `shape` before a pullback."""

    def pullback(grad_y: Array) -> Array | None:
        check_gradient(layer, grad_y, shape)
        return pull(grad_y)

    return pullback


def check_positive(layer: str, **sizes: int) -> None:
    """Refuse sizes that are not at least 1.

    Raises:
        UsageError: a size is less than 1; the message names the layer and the argument.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{layer}: {name} must be at least 1, got {size}.")


def first_few(items: Sequence[str], most: int = 4) -> list[str]:
    """Shorten a list in a message to its first `most` items and the number of the others."""
    rest = len(items) - most
    return [*items[:most], f"and {rest} more"] if rest > 0 else list(items)
