"""Linear, an affine map of the last dimension, and Flatten, which reshapes inputs to rows."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .arguments import whole_number
from .arrays import Array, Rng, affine, conjugate, matmul, namespace_of
from .checks import check_dtype, check_gradient, check_input, checked_pullback
from .initialization import he_uniform
from .module import Module, Pullback
from .parameter import Parameter
from .sums import column_sums


class Linear(Module):
    """y = x @ weight + bias, for x of shape (..., in_features), real or complex.

    Gradients of complex numbers are those that point uphill, as in torch: that of x is grad_y @ weight.conj().T.

    Args:
        bias: whether to add a bias.
        dtype: dtype of the parameters, the input and the output.
        rng: random generator or seed for the weight.

    Attributes:
        in_features: as given.
        out_features: as given.
        weight: (in_features, out_features), He-uniform at first.
        bias: (out_features,), zeros at first; None without.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        self.in_features = inner = whole_number("Linear", "in_features", in_features)
        self.out_features = outer = whole_number("Linear", "out_features", out_features)
        self.weight = Parameter(he_uniform((inner, outer), inner, dtype, rng), name="weight")
        self.bias = Parameter(np.zeros(outer, dtype), name="bias") if bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (..., in_features) to (..., out_features), as one matrix product."""
        inner, outer = self.weight.data.shape
        check_dtype(self, x, self.weight.data.dtype)
        check_input(self, x, f"(..., {inner})", fits=x.ndim > 0 and x.shape[-1] == inner)
        weight = self.weight.use()
        bias = self.bias.use() if self.bias is not None else None
        rows = x.reshape(x.size // inner, inner)
        y = affine(rows, weight.data, bias.data if bias is not None else None)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, (*x.shape[:-1], outer))
            grad_rows = grad_y.reshape(rows.shape[0], outer)
            if bias is not None:
                bias.add_grad(column_sums(grad_rows))
            if weight.requires_grad:
                weight.add_grad_product(conjugate(rows.T), grad_rows)
            return matmul(grad_rows, conjugate(weight.data.T)).reshape(x.shape)

        return y.reshape(*x.shape[:-1], outer), pullback

    def __repr__(self) -> str:
        bias = self.bias is not None
        return f"Linear({self.in_features}, {self.out_features}, bias={bias})"


class Flatten(Module):
    """Reshape (N, ...) to (N, features), for the layers that take rows."""

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Merge all dimensions but the first."""
        check_input(self, x, "(N, ...)", fits=x.ndim >= 1)
        namespace_of(x)
        shape = x.shape
        y = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        return y, checked_pullback(self, y.shape, lambda grad_y: grad_y.reshape(shape))

    def __repr__(self) -> str:
        return "Flatten()"
