"""The activation functions ReLU and GELU."""

from __future__ import annotations

import math

from .arrays import Array, namespace_of, wide_dtype
from .checks import check_gradient
from .module import Module, Pullback


class ReLU(Module):
    """y = max(x, 0), for x of any shape; the gradient at 0 is 0."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Replace negative elements by zero."""
        y: Array = namespace_of(x).maximum(x, 0)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape)
            # An infinite gradient must not become NaN where none passes, as a product with 0 would.
            grad_x: Array = namespace_of(y).where(y <= 0, grad_y.dtype.type(0), grad_y)
            return grad_x

        return y, pullback

    def __repr__(self) -> str:
        return "ReLU()"


class GELU(Module):
    """y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), for x of any shape.

    This is the tanh approximation (torch's `approximate="tanh"`), because NumPy has no error
    function; it differs from x * Phi(x) by less than 5e-4.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, section 2.
    """

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Multiply each element by the probability that a normal variable is below it."""
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        wide = x.astype(wide_dtype(x.dtype), copy=False)
        tanh: Array = namespace_of(x).tanh(scale * wide * (1 + cubic * (wide * wide)))
        y = 0.5 * wide * (1 + tanh)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, x.shape)
            slope = scale * (1 + 3 * cubic * (wide * wide))
            grad_x: Array = grad_y * (0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * slope)
            return grad_x.astype(x.dtype, copy=False)

        return y.astype(x.dtype, copy=False), pullback

    def __repr__(self) -> str:
        return "GELU()"
