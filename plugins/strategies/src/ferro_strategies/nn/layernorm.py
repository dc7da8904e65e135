"""LayerNorm and RMSNorm: normalise each position by its own mean and variance, or by its mean square."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arguments import Sizes, check_real, check_real_dtype, trailing_shape
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_dtype, check_gradient, check_input
from .module import Module, Pullback
from .parameter import Parameter
from .sums import column_dots, column_sums, row_dots


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the trailing dimensions.

    Half precision is computed in float32.

    Args:
        normalized_shape: sizes of the trailing dimensions, or the size of the last one.
        eps: added to the (biased) variance.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias beside the weight.
        dtype: dtype of the parameters, the input and the output.

    Attributes:
        normalized_shape: as given, a tuple.
        weight: of `normalized_shape`, ones at first; None without elementwise_affine.
        bias: of `normalized_shape`, zeros at first; None without.

    Source: Ba et al., "Layer Normalization", 2016, section 3.
    """

    def __init__(
        self,
        normalized_shape: Sizes,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_real_dtype("LayerNorm", dtype)
        self.normalized_shape = shape = trailing_shape("LayerNorm", "normalized_shape", normalized_shape)
        self.eps = eps
        self.weight = Parameter(np.ones(shape, dtype), name="weight") if elementwise_affine else None
        self.bias = Parameter(np.zeros(shape, dtype), name="bias") if elementwise_affine and bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (..., *normalized_shape)."""
        rows = _rows(self, x, self.normalized_shape, self.weight)
        dtype, x_shape, size = x.dtype, x.shape, rows.shape[1]
        weight = self.weight.use() if self.weight is not None else None
        bias = self.bias.use() if self.bias is not None else None
        xhat, inverse = normalised(rows, self.eps)
        y = xhat
        if weight is not None:
            y = xhat * weight.data.reshape(size)
        if bias is not None:
            y += bias.data.reshape(size)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, x_shape, real=True)
            grad = _contiguous(grad_y, xhat)
            summed: Callable[[], Array] | None = None
            if weight is not None:
                sums = namespace_of(grad).stack((column_sums(grad), column_dots(grad, xhat)))
                summed = self._sum_over_positions(sums)
                grad = grad * weight.data.reshape(size)
            grad_x = normalised_gradient(grad, xhat, inverse)
            if summed is not None:
                for use, total in zip((bias, weight), summed(), strict=True):
                    if use is not None:
                        use.add_grad(total.reshape(self.normalized_shape))
            return _rounded(grad_x, dtype).reshape(x_shape)

        return _rounded(y, dtype).reshape(x_shape), pullback

    def _sum_over_positions(self, sums: Array) -> Callable[[], Array]:
        """Begin to add up `sums`, (2, D), over the ranks that share the positions: here, this rank alone.

        Returns:
            A function that waits for the sums.
        """
        return lambda: sums

    def __repr__(self) -> str:
        text = f"LayerNorm({self.normalized_shape}, eps={self.eps}"
        if self.weight is None:
            return f"{text}, elementwise_affine=False)"
        return f"{text})" if self.bias is not None else f"{text}, bias=False)"


class RMSNorm(Module):
    """y = x / sqrt(mean(x**2) + eps) * weight over the trailing dimensions.

    Half precision is computed in float32.

    Args:
        normalized_shape: sizes of the trailing dimensions, or the size of the last one.
        eps: added to the mean square.
        elementwise_affine: whether there is a weight.
        dtype: dtype of the weight, the input and the output.

    Attributes:
        normalized_shape: as given, a tuple.
        weight: of `normalized_shape`, ones at first; None without elementwise_affine.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, section 3.
    """

    def __init__(
        self,
        normalized_shape: Sizes,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_real_dtype("RMSNorm", dtype)
        self.normalized_shape = shape = trailing_shape("RMSNorm", "normalized_shape", normalized_shape)
        self.eps = eps
        self.weight = Parameter(np.ones(shape, dtype), name="weight") if elementwise_affine else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (..., *normalized_shape)."""
        rows = _rows(self, x, self.normalized_shape, self.weight)
        dtype, x_shape, size = x.dtype, x.shape, rows.shape[1]
        weight = self.weight.use() if self.weight is not None else None
        inverse = 1 / namespace_of(x).sqrt(_row_mean(rows, rows) + self.eps)
        xhat = rows * inverse
        y = xhat if weight is None else xhat * weight.data.reshape(size)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, x_shape, real=True)
            grad = _contiguous(grad_y, xhat)
            if weight is not None:
                weight.add_grad(column_dots(grad, xhat).reshape(self.normalized_shape))
                grad = grad * weight.data.reshape(size)
            grad_x: Array = xhat * -_row_mean(grad, xhat)
            grad_x += grad
            grad_x *= inverse
            return _rounded(grad_x, dtype).reshape(x_shape)

        return _rounded(y, dtype).reshape(x_shape), pullback

    def __repr__(self) -> str:
        affine = "" if self.weight is not None else ", elementwise_affine=False"
        return f"RMSNorm({self.normalized_shape}, eps={self.eps}{affine})"


def normalised(rows: Array, eps: float) -> tuple[Array, Array]:
    """Subtract the mean of each row, and divide by its deviation: (n, m) -> (n, m), and 1 / deviation, (n, 1)."""
    xhat = rows - rows.mean(axis=1, keepdims=True)
    inverse: Array = 1 / namespace_of(rows).sqrt(_row_mean(xhat, xhat) + eps)
    xhat *= inverse
    return xhat, inverse


def normalised_gradient(grad: Array, xhat: Array, inverse: Array) -> Array:
    """Compute the gradient of the rows from that of their normalised values."""
    grad_x: Array = xhat * -_row_mean(grad, xhat)
    grad_x += grad
    grad_x -= grad.mean(axis=1, keepdims=True)
    grad_x *= inverse
    return grad_x


def _rows(layer: Module, x: Array, shape: tuple[int, ...], weight: Parameter | None) -> Array:
    """Check an input, and make it rows of the normalised elements, contiguous and wide."""
    if weight is None:
        check_real(layer, x)
    else:
        check_dtype(layer, x, weight.data.dtype)
    expected = f"(..., {', '.join(map(str, shape))})"
    check_input(layer, x, expected, fits=x.shape[-len(shape) :] == shape)
    size = math.prod(shape)
    rows: Array = namespace_of(x).ascontiguousarray(x.reshape(x.size // size, size), wide_dtype(x.dtype))
    return rows


def _contiguous(grad_y: Array, xhat: Array) -> Array:
    """Make rows of a gradient, as those of xhat: NumPy sums pairwise along contiguous rows only."""
    grad: Array = namespace_of(grad_y).ascontiguousarray(grad_y.reshape(xhat.shape), xhat.dtype)
    return grad


def _rounded(values: Array, dtype: npt.DTypeLike) -> Array:
    with quiet_overflow(dtype):
        return values.astype(dtype, copy=False)


def _row_mean(a: Array, b: Array) -> Array:
    """Average a * b over each row, without making that product: (N, D) -> (N, 1)."""
    total = row_dots(a, b)
    total /= a.shape[1]
    return total[:, None]
