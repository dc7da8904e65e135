"""BatchNorm: normalise each channel by its statistics over the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arrays import Array, namespace_of
from .buffer import Buffer
from .checks import check_dtype, check_input, check_positive
from .module import Module, Pullback
from .parameter import Parameter
from .use import Use


class BatchNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, per channel of (N, C) or (N, C, ...).

    In training mean and (biased) variance are those of the batch, over all dimensions but the
    channels, and the running statistics move towards them: running = (1 - momentum) * running +
    momentum * batch, with the unbiased variance. In evaluation the running ones are used.

    Args:
        num_features: channels, C.
        eps: added to the variance.
        momentum: weight of a new batch; None: running statistics are the average of all batches.
        affine: whether there are weight and bias.
        dtype: of parameters, statistics, input and output.

    Attributes:
        weight: (C,), ones at first; None without affine.
        bias: (C,), zeros at first; None without affine.
        running_mean: buffer, (C,), zeros at first.
        running_var: buffer, (C,), ones at first.
        num_batches_tracked: buffer, 0-d int64.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, algorithms 1 and 2.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        check_positive("BatchNorm", num_features=num_features)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(np.ones(num_features, dtype), name="weight") if affine else None
        self.bias = Parameter(np.zeros(num_features, dtype), name="bias") if affine else None
        self.running_mean = Buffer(np.zeros(num_features, dtype))
        self.running_var = Buffer(np.ones(num_features, dtype))
        self.num_batches_tracked = Buffer(np.zeros((), np.int64))

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Normalise (N, C) or (N, C, ...); in training, move the running statistics as well.

        Raises:
            UsageError: wrong shape or dtype, or a training batch of one value per channel.
        """
        self._check(x)
        # All below works on (N, C, L): L is 1 for (N, C), the number of pixels for images.
        values = x.reshape(*x.shape[:2], x[0, 0].size if x.size else 0)
        normalise = self._by_batch if self.training else self._by_running
        xhat, pull_xhat = normalise(values)
        weight = self.weight.use() if self.weight is not None else None
        bias = self.bias.use() if self.bias is not None else None
        y = xhat
        if weight is not None and bias is not None:
            y = xhat * weight.data[:, None]
            y += bias.data[:, None]

        def pullback(grad_y: Array) -> Array:
            grad = grad_y.reshape(values.shape)
            if weight is not None and bias is not None:
                grad = _pull_affine(weight, bias, xhat, grad)
            return pull_xhat(grad).reshape(x.shape)

        return y.reshape(x.shape), pullback

    def _by_batch(self, values: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Normalise (N, C, L) by its own statistics, and remember them."""
        count = values.shape[0] * values.shape[2]
        if count < 2:
            raise UsageError(
                f"{self!r}: training needs more than one value per channel, got input of shape "
                f"{values.shape[:2]} with {count}. Use a larger batch, or call eval()."
            )
        mean = values.sum(axis=2).sum(axis=0) / count
        xhat = values - mean[:, None]
        var = _channel_dot(xhat, xhat) / count
        inverse = 1 / namespace_of(values).sqrt(var + self.eps)
        xhat *= inverse[:, None]
        self._track(mean, var * (count / (count - 1)))

        def pull_xhat(grad: Array) -> Array:
            # grad - mean(grad) - xhat * mean(grad * xhat), times the inverse deviation
            grad_x: Array = xhat * (_channel_dot(grad, xhat) / -count)[:, None]
            grad_x += grad
            grad_x -= (grad.sum(axis=2).sum(axis=0) / count)[:, None]
            grad_x *= inverse[:, None]
            return grad_x

        return xhat, pull_xhat

    def _by_running(self, values: Array) -> tuple[Array, Callable[[Array], Array]]:
        """Normalise (N, C, L) by the running statistics, which are constants to the gradient."""
        inverse: Array = 1 / namespace_of(values).sqrt(self.running_var.data + self.eps)
        xhat: Array = values - self.running_mean.data[:, None]
        xhat *= inverse[:, None]

        def pull_xhat(grad: Array) -> Array:
            grad_x: Array = grad * inverse[:, None]
            return grad_x

        return xhat, pull_xhat

    def _track(self, mean: Array, unbiased_var: Array) -> None:
        tracked = self.num_batches_tracked.data
        tracked += 1
        factor = 1 / int(tracked) if self.momentum is None else self.momentum
        running = ((self.running_mean.data, mean), (self.running_var.data, unbiased_var))
        for kept, new in running:
            kept *= 1 - factor
            kept += factor * new

    def _check(self, x: Array) -> None:
        c = self.num_features
        check_dtype(self, x, self.running_mean.data.dtype)
        check_input(self, x, f"(N, {c}) or (N, {c}, ...)", fits=x.ndim >= 2 and x.shape[1] == c)

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None})"
        )


def _pull_affine(weight: Use, bias: Use, xhat: Array, grad: Array) -> Array:
    """Add the gradients of weight and bias; return that of `xhat`."""
    bias.add_grad(grad.sum(axis=2).sum(axis=0))
    weight.add_grad(_channel_dot(grad, xhat))
    grad_xhat: Array = grad * weight.data[:, None]
    return grad_xhat


def _channel_dot(a: Array, b: Array) -> Array:
    """Sum a * b over all but the channels, without an array of products: (N, C, L) -> (C,)."""
    by_row = namespace_of(a).einsum("ncl,ncl->nc", a, b)
    total: Array = by_row.sum(axis=0)
    return total
