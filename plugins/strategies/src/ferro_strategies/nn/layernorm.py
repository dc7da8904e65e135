"""LayerNorm: normalise each position by its own mean and variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .arrays import Array, namespace_of, wide_dtype
from .checks import check_dtype, check_gradient, check_input, check_positive
from .module import Module, Pullback
from .parameter import Parameter


class LayerNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the trailing dimensions.

    Half precision is computed in float32.

    Args:
        normalized_shape: sizes of the trailing dimensions, or the size of the last one.
        eps: added to the (biased) variance.
        dtype: dtype of the parameters, the input and the output.

    Attributes:
        normalized_shape: as given, a tuple.
        weight: of `normalized_shape`, ones at first.
        bias: of `normalized_shape`, zeros at first.

    Source: Ba et al., "Layer Normalization", 2016, section 3.
    """

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float = 1e-5, *, dtype: npt.DTypeLike = np.float32
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        check_positive("LayerNorm", normalized_shape=min(shape, default=0))
        self.normalized_shape = shape
        self.eps = eps
        self.weight = Parameter(np.ones(shape, dtype), name="weight")
        self.bias = Parameter(np.zeros(shape, dtype), name="bias")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (..., *normalized_shape)."""
        shape, dtype = self.weight.data.shape, x.dtype
        check_dtype(self, x, self.weight.data.dtype)
        expected = f"(..., {', '.join(map(str, shape))})"
        check_input(self, x, expected, fits=x.shape[-len(shape) :] == shape)
        weight, bias = self.weight.use(), self.bias.use()
        size = math.prod(shape)
        x_shape = x.shape
        rows = x.reshape(x.size // size, size).astype(wide_dtype(dtype), copy=False)
        xhat = rows - rows.mean(axis=1, keepdims=True)
        var = _row_mean(xhat, xhat)
        inverse = 1 / namespace_of(x).sqrt(var + self.eps)
        xhat *= inverse
        y = xhat * weight.data.reshape(size)
        y += bias.data.reshape(size)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, x_shape)
            grad = grad_y.reshape(xhat.shape).astype(xhat.dtype, copy=False)
            xp = namespace_of(grad)
            sums = xp.stack((grad.sum(axis=0), xp.einsum("nd,nd->d", grad, xhat)))
            summed = self._sum_over_positions(sums)
            grad = grad * weight.data.reshape(size)
            grad_x: Array = xhat * -_row_mean(grad, xhat)
            grad_x += grad
            grad_x -= grad.mean(axis=1, keepdims=True)
            grad_x *= inverse
            for use, total in zip((bias, weight), summed(), strict=True):
                use.add_grad(total.reshape(shape).astype(dtype, copy=False))
            return grad_x.reshape(x_shape).astype(dtype, copy=False)

        return y.reshape(x_shape).astype(dtype, copy=False), pullback

    def _sum_over_positions(self, sums: Array) -> Callable[[], Array]:
        """Begin to add up `sums`, (2, D), over the ranks that share the positions: here, this rank alone.

        Returns:
            A function that waits for the sums.
        """
        return lambda: sums

    def __repr__(self) -> str:
        return f"LayerNorm({self.normalized_shape}, eps={self.eps})"


def _row_mean(a: Array, b: Array) -> Array:
    """Average a * b over each row, without making that product: (N, D) -> (N, 1)."""
    total: Array = namespace_of(a).einsum("nd,nd->n", a, b)
    total /= a.shape[1]
    return total[:, None]
