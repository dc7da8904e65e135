"""check_gradients: compare a module's pullback with central differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ferro.errors import UsageError

from .arrays import Array
from .module import Module


def check_gradients(module: Module, x: Array, *, step: float = 1e-5, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Check the gradients of the input and of every parameter of `module`, element by element.

    The check differentiates a sum of the output with random weights (of a fixed seed). The module must compute in
    float64 on NumPy, and give the same output each time. Points without derivative, such as 0 for ReLU, must be farther
    from `x` than `step`. The parameters' gradients are cleared first.

    Args:
        module: the module to check, in float64.
        x: an input; integers are indices, whose gradient must be None.
        step: half the distance between the two points of a difference.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: a gradient is wrong; the message names the array and its worst element.
        UsageError: the output is not float64.
    """
    module.zero_grad()
    y, pullback = module.vjp(x)
    if y.dtype != np.float64:
        raise UsageError(f"check_gradients: {module!r} returned {y.dtype}; it needs float64.")
    weights = np.random.default_rng(0).standard_normal(y.shape)
    grad_x = pullback(weights)

    def loss() -> float:
        return float(np.sum(module(x) * weights))

    if x.dtype.kind in "iu":
        assert grad_x is None, "the gradient of indices must be None"
    else:
        _compare("the input", grad_x, _differences(loss, x, step), rtol, atol)
    for name, parameter in module.named_parameters():
        numeric = _differences(loss, parameter.data, step)
        _compare(f"parameter {name!r}", parameter.grad, numeric, rtol, atol)


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
