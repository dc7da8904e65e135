"""Conv2d: two-dimensional convolution as one matrix product (im2col)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .arrays import Array, Rng, he_uniform, matmul, namespace_of
from .checks import check_dtype, check_gradient, check_input, check_positive
from .module import Module, Pullback
from .parameter import Parameter
from .windows import Windows, pair


class Conv2d(Module):
    """Cross-correlate images (N, in_channels, H, W) with a kernel per output channel.

    The output is (N, out_channels, H', W'), H' = (H + 2 * padding - kernel) // stride + 1. The windows are gathered
    into a matrix of one column per output pixel. A kernel of k pixels makes the matrix k times larger than the input,
    so the pullback gathers it again instead of keeping it.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal), as are the next two.
        stride: distance between windows.
        padding: width of the zeros around the image.
        bias: whether to add a bias per output channel.
        dtype: dtype of the parameters, the input and the output.
        rng: random generator or seed for the weight.

    Attributes:
        in_channels: as given.
        out_channels: as given.
        weight: (out_channels, in_channels, kh, kw), He-uniform at first.
        bias: (out_channels,), zeros at first; None without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        check_positive("Conv2d", in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.windows = Windows(pair(kernel_size), pair(stride), pair(padding))
        self.windows.check("Conv2d")
        kh, kw = self.windows.kernel
        weight = he_uniform((out_channels, in_channels, kh, kw), in_channels * kh * kw, dtype, rng)
        self.weight = Parameter(weight, name="weight")
        self.bias = Parameter(np.zeros(out_channels, dtype), name="bias") if bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        self._check(x)
        weight = self.weight.use()
        bias = self.bias.use() if self.bias is not None else None
        outer = weight.data.shape[0]
        n, _, height, width = x.shape
        down, across = self.windows.output_size(height, width)
        y = matmul(weight.data.reshape(outer, -1), self._columns(x))
        if bias is not None:
            y += bias.data[:, None]

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, (n, outer, down, across))
            grad_rows = grad_y.transpose(1, 0, 2, 3).reshape(outer, n * down * across)
            if bias is not None:
                bias.add_grad(grad_rows.sum(axis=1))
            if weight.requires_grad:
                weight.add_grad_product(grad_rows, self._columns(x).T)
            columns = matmul(weight.data.reshape(outer, -1).T, grad_rows)
            return self._scatter(columns, x)

        y = y.reshape(outer, n, down, across).transpose(1, 0, 2, 3)
        return namespace_of(x).ascontiguousarray(y), pullback

    def _columns(self, x: Array) -> Array:
        """Gather the windows of `x` as columns: (C * kh * kw, N * H' * W')."""
        kh, kw = self.windows.kernel
        sh, sw = self.windows.stride
        n, c, height, width = x.shape
        down, across = self.windows.output_size(height, width)
        image = self.windows.padded(x)
        by_n, by_c, by_h, by_w = image.strides
        windows = namespace_of(x).lib.stride_tricks.as_strided(
            image, shape=(c, kh, kw, n, down, across), strides=(by_c, by_h, by_w, by_n, by_h * sh, by_w * sw)
        )
        columns: Array = windows.reshape(c * kh * kw, n * down * across)
        return columns

    def _scatter(self, columns: Array, x: Array) -> Array:
        """Compute the gradient of `x`: add each column to the pixels that it was taken from."""
        (kh, kw), (ph, pw) = self.windows.kernel, self.windows.padding
        n, c, height, width = x.shape
        down, across = self.windows.output_size(height, width)
        by_tap = columns.reshape(c, kh * kw, n, down, across)
        xp = namespace_of(x)
        # Channels come first, as in the columns, so that only the smaller result is transposed.
        image = xp.zeros((c, n, height + 2 * ph, width + 2 * pw), x.dtype)
        for index, tap in enumerate(self.windows.taps(image)):
            tap += by_tap[:, index]
        inside = image[:, :, ph : ph + height, pw : pw + width]
        grad_x: Array = xp.ascontiguousarray(inside.transpose(1, 0, 2, 3))
        return grad_x

    def _check(self, x: Array) -> None:
        check_dtype(self, x, self.weight.data.dtype)
        channels = self.in_channels
        (kh, kw), (ph, pw) = self.windows.kernel, self.windows.padding
        check_input(
            self,
            x,
            f"(N, {channels}, H >= {kh - 2 * ph}, W >= {kw - 2 * pw})",
            fits=x.ndim == 4 and x.shape[1] == channels and self.windows.fit(*x.shape[2:]),
        )

    def __repr__(self) -> str:
        kernel, stride, padding = self.windows.kernel, self.windows.stride, self.windows.padding
        return (
            f"Conv2d({self.in_channels}, {self.out_channels}, kernel_size={kernel}, "
            f"stride={stride}, padding={padding}, bias={self.bias is not None})"
        )
