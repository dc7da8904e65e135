"""GroupNorm: normalise groups of channels of each example by their own mean and variance."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import check_real, check_real_dtype, whole_number
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_dtype, check_gradient, check_input
from .layernorm import normalised, normalised_gradient
from .module import Module, Pullback
from .parameter import Parameter
from .sums import channel_dots, channel_sums


class GroupNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias for (N, C) or (N, C, ...), over each group of channels.

    Mean and (biased) variance are those of one example's channels of a group, at all positions; weight and bias belong
    to channels. Half precision is computed in float32.

    Args:
        num_groups: number of groups; a divisor of `num_channels`.
        num_channels: number of channels, C.
        eps: added to the variance.
        affine: whether there are weight and bias.
        dtype: dtype of the parameters, the input and the output.

    Attributes:
        num_groups, num_channels: as given.
        weight: (C,), ones at first; None without affine.
        bias: (C,), zeros at first; None without affine.

    Source: Wu and He, "Group Normalization", 2018, section 3.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_real_dtype("GroupNorm", dtype)
        self.num_groups = whole_number("GroupNorm", "num_groups", num_groups)
        self.num_channels = c = whole_number("GroupNorm", "num_channels", num_channels)
        if c % self.num_groups:
            raise UsageError(
                f"GroupNorm: num_channels must be a multiple of num_groups, got {c} and {self.num_groups}."
            )
        self.eps = eps
        self.weight = Parameter(np.ones(c, dtype), name="weight") if affine else None
        self.bias = Parameter(np.zeros(c, dtype), name="bias") if affine else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (N, C) or (N, C, ...)."""
        self._check(x)
        xp, whole_shape, dtype, wide = namespace_of(x), x.shape, x.dtype, wide_dtype(x.dtype)
        n, c = x.shape[:2]
        shape = (n, c, math.prod(x.shape[2:]))
        by_group = (n * self.num_groups, c // self.num_groups * shape[2])
        # NumPy sums pairwise along contiguous memory only.
        xhat, inverse = normalised(xp.ascontiguousarray(x.reshape(by_group), wide), self.eps)
        y = xhat = xhat.reshape(shape)
        weight = self.weight.use() if self.weight is not None else None
        bias = self.bias.use() if self.bias is not None else None
        if weight is not None and bias is not None:
            y = y * weight.data[:, None]
            y += bias.data[:, None]

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, whole_shape, real=True)
            grad = xp.ascontiguousarray(grad_y.reshape(shape), wide)
            if weight is not None and bias is not None:
                bias.add_grad(channel_sums(grad))
                weight.add_grad(channel_dots(grad, xhat))
                grad = grad * weight.data[:, None]
            grad_x = normalised_gradient(grad.reshape(by_group), xhat.reshape(by_group), inverse)
            with quiet_overflow(dtype):
                return grad_x.reshape(whole_shape).astype(dtype, copy=False)

        with quiet_overflow(dtype):
            return y.reshape(whole_shape).astype(dtype, copy=False), pullback

    def _check(self, x: Array) -> None:
        if self.weight is None:
            check_real(self, x)
        else:
            check_dtype(self, x, self.weight.data.dtype)
        c = self.num_channels
        fits = x.ndim >= 2 and x.shape[1] == c and (not len(x) or x[0].size > 0)
        check_input(self, x, f"(N, {c}) or (N, {c}, ...)", fits=fits)

    def __repr__(self) -> str:
        affine = "" if self.weight is not None else ", affine=False"
        return f"GroupNorm({self.num_groups}, {self.num_channels}, eps={self.eps}{affine})"
