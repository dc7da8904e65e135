"""ConvTranspose2d: the gradient of a convolution as a layer, which makes images larger."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import Sizes
from .arrays import Array, Rng, conjugate, matmul, namespace_of, quiet_overflow, wide_matmul
from .checks import check_dtype, check_gradient, check_input
from .convolution import channels, written
from .initialization import he_uniform
from .module import Module, Pullback
from .parameter import Parameter
from .sums import row_sums
from .windows import conv_windows, pair


class ConvTranspose2d(Module):
    """Spread each pixel of images (N, in_channels, H, W) over a window of the output by a kernel.

    The output is (N, out_channels, H', W'), H' = (H - 1) * stride - 2 * padding + dilation * (kernel - 1) +
    output_padding + 1. It is the input's gradient of a Conv2d from out_channels to in_channels with the same weight.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal), as are the next three and dilation.
        stride: distance between the windows of neighbouring pixels.
        padding: number of pixels that are cut off at each border of the output.
        output_padding: number of rows and columns that are added to the output below and at the right, which decides
            between the sizes that a Conv2d makes equal; less than the stride.
        groups: number of parts into which the channels are divided, see Conv2d.
        bias: whether to add a bias per output channel.
        dilation: distance between the pixels of a window.
        dtype: dtype of the parameters, the input and the output, real or complex.
        rng: random generator or seed for the weight.

    Attributes:
        in_channels: as given.
        out_channels: as given.
        groups: as given.
        output_padding: (vertical, horizontal).
        weight: (in_channels, out_channels / groups, kh, kw), He-uniform at first.
        bias: (out_channels,), zeros at first; None without.

    Source: Dumoulin and Visin, "A Guide to Convolution Arithmetic for Deep Learning", 2016, chapter 4.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        *,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        name = type(self).__name__
        self.in_channels, self.out_channels, self.groups = channels(name, in_channels, out_channels, groups)
        self.windows = conv_windows(name, kernel_size, stride, padding, dilation)
        self.output_padding = pair(name, "output_padding", output_padding, least=0)
        if any(extra >= step for extra, step in zip(self.output_padding, self.windows.stride, strict=True)):
            raise UsageError(
                f"{name}: output_padding must be less than stride, got {self.output_padding} and {self.windows.stride}."
            )
        shape = (self.in_channels, self.out_channels // self.groups, *self.windows.kernel)
        fan_in = self.in_channels // self.groups * math.prod(self.windows.kernel)
        self.weight = Parameter(he_uniform(shape, fan_in, dtype, rng), name="weight")
        self.bias = Parameter(np.zeros(self.out_channels, dtype), name="bias") if bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        check_dtype(self, x, self.weight.data.dtype)
        c, groups, windows, dtype = self.in_channels, self.groups, self.windows, x.dtype
        fits = x.ndim == 4 and x.shape[1] == c and min(x.shape[2:]) > 0 and min(self._output_size(x)) > 0
        check_input(self, x, f"(N, {c}, H, W) with an output of at least one pixel", fits=fits)
        weight = self.weight.use()
        bias = self.bias.use() if self.bias is not None else None
        shape = (x.shape[0], self.out_channels, *self._output_size(x))
        x_shape = x.shape

        def by_group(matrix: Array) -> Array:
            return matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1])

        def kernels() -> Array:
            return by_group(weight.data.reshape(c, -1))

        rows = x.transpose(1, 0, 2, 3).reshape(c, -1)
        with quiet_overflow(dtype):
            columns = wide_matmul(kernels().swapaxes(1, 2), by_group(rows))
            y = windows.scatter(columns, shape)
            if bias is not None:
                y += bias.data[:, None, None]
            y = y.astype(dtype, copy=False)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            if bias is not None:
                bias.add_grad(row_sums(grad_y.transpose(1, 0, 2, 3).reshape(shape[1], -1)))
            columns = by_group(windows.gather(grad_y))
            if weight.requires_grad:
                product = matmul(by_group(conjugate(rows)), columns.swapaxes(1, 2))
                weight.add_grad(product.reshape(weight.data.shape))
            grad_x = matmul(conjugate(kernels()), columns).reshape(c, x_shape[0], *x_shape[2:])
            contiguous: Array = namespace_of(x).ascontiguousarray(grad_x.transpose(1, 0, 2, 3))
            return contiguous

        return y, pullback

    def _output_size(self, x: Array) -> tuple[int, int]:
        windows = self.windows
        sizes = zip(x.shape[2:], windows.stride, windows.padding, windows.extent, self.output_padding, strict=True)
        height, width = ((size - 1) * step - 2 * cut + extent + extra for size, step, cut, extent, extra in sizes)
        return height, width

    def __repr__(self) -> str:
        arguments = written(self.windows, self.groups, lambda sizes: sizes)
        if self.output_padding != (0, 0):
            arguments += f", output_padding={self.output_padding}"
        return f"ConvTranspose2d({self.in_channels}, {self.out_channels}, {arguments}, bias={self.bias is not None})"
