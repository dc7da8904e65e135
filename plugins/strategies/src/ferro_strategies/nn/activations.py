"""Activation functions: ReLU, GELU, SiLU, SwiGLU, Sigmoid, Tanh and Softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

from .arguments import check_real, whole_number
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_gradient, check_input
from .module import Module, Pullback
from .sums import row_sums


class ReLU(Module):
    """y = max(x, 0), for x of any shape; the gradient at 0 is 0."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Replace negative elements by zero."""
        check_real(self, x)
        y: Array = namespace_of(x).maximum(x, 0)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape, real=True)
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
        wide = _widened(self, x)
        tanh: Array = namespace_of(x).tanh(scale * wide * (1 + cubic * (wide * wide)))
        y = 0.5 * wide * (1 + tanh)

        def slope() -> Array:
            rate = scale * (1 + 3 * cubic * (wide * wide))
            rates: Array = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * rate
            return rates

        return _pointwise(self, x, y, slope)

    def __repr__(self) -> str:
        return "GELU()"


class SiLU(Module):
    """y = x * sigmoid(x), for x of any shape; also called swish.

    Source: Elfwing et al., "Sigmoid-Weighted Linear Units", 2017, section 2.
    """

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Multiply each element by its sigmoid."""
        wide = _widened(self, x)
        gate = sigmoid(wide)
        return _pointwise(self, x, wide * gate, lambda: gate * (1 + wide * (1 - gate)))

    def __repr__(self) -> str:
        return "SiLU()"


class SwiGLU(Module):
    """y = SiLU(gate) * up, where gate and up are the halves of the last dimension of x: (..., 2 * n) -> (..., n).

    A transformer's feed-forward layer with it is
    Sequential(Linear(dim, 2 * hidden, bias=False), SwiGLU(), Linear(hidden, dim, bias=False)).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, section 2.
    """

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Multiply the second half by the SiLU of the first."""
        wide = _widened(self, x)
        fits = x.ndim > 0 and x.shape[-1] > 0 and x.shape[-1] % 2 == 0
        check_input(self, x, "(..., an even number of columns)", fits=fits)
        xp, half, dtype = namespace_of(x), x.shape[-1] // 2, x.dtype
        gate, up = wide[..., :half], wide[..., half:]
        share = sigmoid(gate)
        y = gate * share * up

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape, real=True)
            grad_x: Array = xp.empty(wide.shape, grad_y.dtype)
            with quiet_overflow(grad_y.dtype):
                grad_x[..., :half] = grad_y * (up * share * (1 + gate * (1 - share)))
                grad_x[..., half:] = grad_y * (gate * share)
            return grad_x

        with quiet_overflow(dtype):
            return y.astype(dtype, copy=False), pullback

    def __repr__(self) -> str:
        return "SwiGLU()"


class Sigmoid(Module):
    """y = 1 / (1 + exp(-x)), for x of any shape."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map each element into (0, 1)."""
        y = sigmoid(_widened(self, x))
        return _pointwise(self, x, y, lambda: y * (1 - y))

    def __repr__(self) -> str:
        return "Sigmoid()"


class Tanh(Module):
    """y = tanh(x), for x of any shape."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map each element into (-1, 1)."""
        y: Array = namespace_of(x).tanh(_widened(self, x))
        return _pointwise(self, x, y, lambda: 1 - y * y)

    def __repr__(self) -> str:
        return "Tanh()"


class Softmax(Module):
    """y = exp(x) / sum(exp(x)) along one dimension.

    nn.cross_entropy takes logits, to which no Softmax has been applied.

    Args:
        dim: the dimension along which the results add up to 1.
    """

    def __init__(self, dim: int = -1) -> None:
        self.dim = whole_number("Softmax", "dim", dim, least=-64)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise the exponentials of `x`, of any shape with the dimension `dim`, which is not empty."""
        wide = _widened(self, x)
        fits = -x.ndim <= self.dim < x.ndim and x.shape[self.dim] > 0
        check_input(self, x, f"with a dimension {self.dim}, not empty", fits=fits)
        xp = namespace_of(x)
        # The dimension comes last, in contiguous memory, where sums are pairwise.
        y = xp.ascontiguousarray(xp.moveaxis(wide, self.dim, -1))
        y = xp.exp(y - y.max(axis=-1, keepdims=True))
        y /= row_sums(y)[..., None]
        shape, dtype = x.shape, x.dtype

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape, real=True)
            grad = xp.moveaxis(grad_y, self.dim, -1).astype(y.dtype, copy=False)
            grad = y * (grad - row_sums(y * grad)[..., None])
            with quiet_overflow(dtype):
                grad_x: Array = xp.moveaxis(grad, -1, self.dim).astype(grad_y.dtype, copy=False)
            return grad_x

        return xp.moveaxis(y, -1, self.dim).astype(dtype, copy=False), pullback

    def __repr__(self) -> str:
        return f"Softmax({self.dim})"


def sigmoid(x: Array) -> Array:
    """Compute 1 / (1 + exp(-x)) for float32 or wider, without overflow, to the last digits for negative x, too."""
    xp = namespace_of(x)
    small: Array = xp.exp(-abs(x))  # at most 1
    whole: Array = xp.where(x < 0, small, x.dtype.type(1))
    whole /= 1 + small
    return whole


def _widened(layer: Module, x: Array) -> Array:
    """Refuse all but real floating-point numbers; compute half precision in float32."""
    check_real(layer, x)
    return x.astype(wide_dtype(x.dtype), copy=False)


def _pointwise(layer: Module, x: Array, y: Array, slope: Callable[[], Array]) -> tuple[Array, Pullback]:
    """Make the output and the pullback of a function of each element.

    Args:
        layer: the layer, for messages.
        x: the input.
        y: the output, in float32 for half precision.
        slope: computes the derivative at each element, of the dtype of `y`.
    """
    dtype, shape = x.dtype, x.shape

    def pullback(grad_y: Array) -> Array:
        check_gradient(layer, grad_y, shape, real=True)
        with quiet_overflow(grad_y.dtype):
            grad_x: Array = (grad_y * slope()).astype(grad_y.dtype, copy=False)
        return grad_x

    with quiet_overflow(dtype):
        return y.astype(dtype, copy=False), pullback
