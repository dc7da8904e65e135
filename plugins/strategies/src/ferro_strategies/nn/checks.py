"""Checks of layers' inputs and arguments, with messages that name the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ferro import ProcessGroup
from ferro.arrays import lost_meaning
from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .trees import Arrays, Shapes, TreeShapes, describe, has_gradient


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


def check_gradient(layer: object, grad: Arrays, shape: Shapes, *, real: bool = False) -> None:
    """Refuse a gradient that is not that of an output of `shape`, before the pullback changes anything.

    Args:
        layer: the module, or its name, for the message.
        grad: the gradient that was given to the pullback.
        shape: `shapes_of` the output: the shape of an array, or the shapes of a tree of arrays. A leaf of a tree may
            have no gradient (None), but not all of them.
        real: refuse complex gradients, for a layer whose output is never complex.

    Raises:
        UsageError: `grad` is no plain array of that shape, such as a loss, or no tree of such arrays.
    """
    if type(grad) is np.ndarray and grad.shape == shape and grad.dtype.kind in ("fV" if real else "fcV"):
        return
    name = layer if isinstance(layer, str) else type(layer).__name__
    if isinstance(shape, TreeShapes):
        problem = _misfit(grad, shape) or ("" if has_gradient(grad) else "it got no gradient at any leaf")
        if problem:
            raise UsageError(
                f"{name}: pullback takes the gradient of the output, a tree of arrays of shapes {shape}, with None for "
                f"an array without gradient; {problem}."
            )
    elif found := _array_misfit(grad, shape, real=real):
        raise UsageError(
            f"{name}: pullback takes the gradient of the output, an array of shape {shape}; "
            f"nn.cross_entropy returns (loss, grad). It got {found}."
        )


def check_input_gradient(layer: object, grad: Arrays, shape: Shapes) -> None:
    """Refuse what a pullback returned, unless it is the gradient of an input of `shape`, or None.

    Containers and strategies check each part by this, so that the message names the part whose pullback is wrong, and
    not the one before, which takes the gradient.

    Raises:
        UsageError: `grad` does not fit.
    """
    if grad is None or (type(grad) is np.ndarray and grad.shape == shape):
        return
    if isinstance(shape, TreeShapes):
        problem = _misfit(grad, shape)
    else:
        problem = _array_misfit(grad, shape)
        problem = problem and f"it returned {problem}"
    if problem:
        name = layer if isinstance(layer, str) else type(layer).__name__
        raise UsageError(
            f"{name}: its pullback must return the gradient of its input, of shape {shape}, or None; {problem}. "
            "Correct that module's vjp. Gradients that this backward pass had added so far stay added."
        )


def checked_pullback(
    layer: object, shape: Shapes, pull: Callable[[Arrays], Arrays | None]
) -> Callable[[Arrays], Arrays | None]:
    """Put a check of the gradient of an output of `shape` before a pullback."""

    def pullback(grad_y: Arrays) -> Arrays | None:
        check_gradient(layer, grad_y, shape)
        return pull(grad_y)

    return pullback


def _misfit(grads: Arrays, shapes: TreeShapes) -> str:
    """Say how a tree of gradients does not fit, as the end of a sentence; "" if it fits."""
    try:
        found = shapes.structure.flatten(grads)
    except UsageError:
        return f"it got {describe(grads)}"
    for position, (grad, shape) in enumerate(zip(found, shapes.shapes, strict=True)):
        if grad is None:
            continue
        if shape is None:
            return f"leaf {position} is no array and has no gradient, but it got {describe(grad)}"
        if problem := _array_misfit(grad, shape):
            return f"for leaf {position}, of shape {shape}, it got {problem}"
    return ""


def _array_misfit(grad: Arrays, shape: tuple[int, ...], *, real: bool = False) -> str:
    """Describe an object that is no plain array of this shape; "" if it is one."""
    if found := lost_meaning(grad):
        return found
    is_array = hasattr(grad, "shape") and not isinstance(grad, np.generic)
    if is_array and grad.shape == shape:
        namespace_of(grad)
        if grad.dtype.kind in "iub":
            return f"an array of {grad.dtype}, which would lose fractions"
        if grad.dtype.kind == "c":
            return f"an array of {grad.dtype}, whose imaginary part would be lost" if real else ""
        return "" if grad.dtype.kind in "fV" else f"an array of {grad.dtype}, which are no numbers"
    return f"an array of shape {grad.shape}" if is_array else f"a {type(grad).__name__}"


def check_group(caller: str, group: object) -> None:
    """Refuse what is no process group, such as a mesh, or another argument in its place.

    Raises:
        UsageError: `group` is something else; the message names the caller.
    """
    if not isinstance(group, ProcessGroup):
        raise UsageError(
            f"{caller}: its group is a {type(group).__name__}. Give it what ferro.init() returned, or an axis of a "
            'mesh, such as mesh["dp"].'
        )


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
