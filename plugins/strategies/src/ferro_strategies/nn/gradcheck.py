"""check_gradients: compare a module's pullback with central differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferro.errors import UsageError

from .arrays import Array
from .module import Module
from .trees import Arrays, leaves, map_leaves, structure


def check_gradients(module: Module, x: Arrays, *, step: float = 1e-5, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Check the gradients of the input and of every parameter of `module`, element by element.

    The check differentiates a sum of the output with random weights (of a fixed seed). The module must compute in
    float64 on NumPy, and give the same output each time. Points without derivative, such as 0 for ReLU, must be farther
    from `x` than `step`. The parameters' gradients are cleared first.

    Args:
        module: the module to check, in float64.
        x: an input, or a tree of several; integers and booleans are indices or masks, whose gradient must be None.
        step: half the distance between the two points of a difference.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: a gradient is wrong; the message names the array and its worst element.
        UsageError: the output, or a floating-point array of it, is not float64.
    """
    module.zero_grad()
    y, pullback = module.vjp(x)
    random = np.random.default_rng(0)
    weights = map_leaves(lambda array: _output_weights(module, array, random), y)
    grad_x = pullback(weights)

    def loss() -> float:
        pairs = zip(leaves(module(x)), leaves(weights), strict=True)
        return float(sum(np.sum(array * weight) for array, weight in pairs if weight is not None))

    grads = structure(x).flatten(grad_x)
    inputs = leaves(x)
    for position, (array, grad) in enumerate(zip(inputs, grads, strict=True)):
        what = "the input" if len(inputs) == 1 else f"leaf {position} of the input"
        if array is None or array.dtype.kind in "iub":
            assert grad is None, "the gradient of indices must be None"
        else:
            _compare(what, grad, _differences(loss, array, step), rtol, atol)
    for name, parameter in module.named_parameters():
        numeric = _differences(loss, parameter.data, step)
        _compare(f"parameter {name!r}", parameter.grad, numeric, rtol, atol)


def _output_weights(module: Module, array: Array, random: np.random.Generator) -> Array | None:
    """Draw the gradient of one array of the output; None for indices and masks."""
    if array.dtype.kind in "iub":
        return None
    if array.dtype != np.float64:
        raise UsageError(f"check_gradients: {module!r} returned {array.dtype}; it needs float64.")
    return random.standard_normal(array.shape)


def _differences(loss: Callable[[], float], array: Array, step: float) -> Array:
    """Compute d loss / d array by central differences, changing one element at a time."""
    result = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + step
        above = loss()
        array[index] = value - step
        result[index] = (above - loss()) / (2 * step)
        array[index] = value
    return result


def _compare(what: str, grad: Array | None, numeric: Array, rtol: float, atol: float) -> None:
    assert grad is not None, f"the gradient of {what} is None"
    assert grad.shape == numeric.shape, f"the gradient of {what} has shape {grad.shape}, not {numeric.shape}"
    excess = np.abs(grad - numeric) - (atol + rtol * np.abs(numeric))
    if excess.size and excess.max() > 0:
        worst = np.unravel_index(excess.argmax(), excess.shape)
        place = tuple(map(int, worst))
        raise AssertionError(
            f"the gradient of {what} at {place} is {grad[worst]}, but central differences give {numeric[worst]}"
        )
