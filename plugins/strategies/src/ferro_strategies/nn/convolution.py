"""Conv2d and Conv1d: convolution as matrix products (im2col)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import Sizes, whole_number
from .arrays import Array, Rng, conjugate, matmul, namespace_of, quiet_overflow, wide_matmul
from .checks import check_dtype, check_gradient, check_input
from .initialization import he_uniform
from .module import Module, Pullback
from .parameter import Parameter, Use
from .sums import row_sums
from .windows import Windows, conv_windows, row_windows


class Conv2d(Module):
    """Cross-correlate images (N, in_channels, H, W) with a kernel per output channel.

    The output is (N, out_channels, H', W'), H' = (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1. The
    windows are gathered into a matrix of one column per output pixel. A kernel of k pixels makes the matrix k times
    larger than the input, so the pullback gathers it again instead of keeping it.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal), as are the next two and dilation.
        stride: distance between windows.
        padding: width of the zeros around the image.
        bias: whether to add a bias per output channel.
        dilation: distance between the pixels of a window.
        groups: number of parts into which the channels are divided; each part of the outputs sees its part of the
            inputs alone. It divides both numbers of channels.
        dtype: dtype of the parameters, the input and the output, real or complex.
        rng: random generator or seed for the weight.

    Attributes:
        in_channels: as given.
        out_channels: as given.
        groups: as given.
        weight: (out_channels, in_channels / groups, kh, kw), He-uniform at first.
        bias: (out_channels,), zeros at first; None without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        bias: bool = True,
        *,
        dilation: Sizes = 1,
        groups: int = 1,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        self.in_channels, self.out_channels, self.groups = channels("Conv2d", in_channels, out_channels, groups)
        self.windows = conv_windows("Conv2d", kernel_size, stride, padding, dilation)
        shape = (self.out_channels, self.in_channels // self.groups, *self.windows.kernel)
        self.weight = Parameter(he_uniform(shape, math.prod(shape[1:]), dtype, rng), name="weight")
        self.bias = Parameter(np.zeros(self.out_channels, dtype), name="bias") if bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        check_dtype(self, x, self.weight.data.dtype)
        least, c = self.windows.least_size, self.in_channels
        fits = x.ndim == 4 and x.shape[1] == c and self.windows.fit(*x.shape[2:])
        check_input(self, x, f"(N, {c}, H >= {least[0]}, W >= {least[1]})", fits=fits)
        bias = self.bias.use() if self.bias is not None else None
        y, pull = convolve(x, self.weight.use(), bias, self.windows, self.groups)
        shape = y.shape

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            return pull(grad_y)

        return y, pullback

    def __repr__(self) -> str:
        arguments = written(self.windows, self.groups, lambda sizes: sizes)
        return f"Conv2d({self.in_channels}, {self.out_channels}, {arguments}, bias={self.bias is not None})"


class Conv1d(Module):
    """Cross-correlate sequences (N, in_channels, L) with a kernel per output channel: see Conv2d.

    The output is (N, out_channels, L'), L' = (L + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1.

    Args:
        kernel_size: number of positions.
        stride: distance between windows.
        padding: number of zeros at each end.
        bias: whether to add a bias per output channel.
        dilation: distance between the positions of a window.
        groups: number of parts of the channels, see Conv2d.
        dtype: dtype of the parameters, the input and the output, real or complex.
        rng: random generator or seed for the weight.

    Attributes:
        in_channels: as given.
        out_channels: as given.
        groups: as given.
        weight: (out_channels, in_channels / groups, kernel_size), He-uniform at first.
        bias: (out_channels,), zeros at first; None without.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        bias: bool = True,
        *,
        dilation: Sizes = 1,
        groups: int = 1,
        dtype: npt.DTypeLike = np.float32,
        rng: Rng = None,
    ) -> None:
        self.in_channels, self.out_channels, self.groups = channels("Conv1d", in_channels, out_channels, groups)
        self.windows = row_windows("Conv1d", kernel_size, stride, padding, dilation)
        shape = (self.out_channels, self.in_channels // self.groups, self.windows.kernel[1])
        self.weight = Parameter(he_uniform(shape, math.prod(shape[1:]), dtype, rng), name="weight")
        self.bias = Parameter(np.zeros(self.out_channels, dtype), name="bias") if bias else None

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, in_channels, L) to (N, out_channels, L')."""
        check_dtype(self, x, self.weight.data.dtype)
        least, c = self.windows.least_size[1], self.in_channels
        check_input(self, x, f"(N, {c}, L >= {least})", fits=x.ndim == 3 and x.shape[1] == c and x.shape[2] >= least)
        bias = self.bias.use() if self.bias is not None else None
        y, pull = convolve(x[:, :, None], self.weight.use(), bias, self.windows, self.groups)
        shape = (y.shape[0], y.shape[1], y.shape[3])

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape)
            return pull(grad_y[:, :, None])[:, :, 0]

        return y[:, :, 0], pullback

    def __repr__(self) -> str:
        arguments = written(self.windows, self.groups, lambda sizes: sizes[1])
        return f"Conv1d({self.in_channels}, {self.out_channels}, {arguments}, bias={self.bias is not None})"


def convolve(
    x: Array, weight: Use, bias: Use | None, windows: Windows, groups: int
) -> tuple[Array, Callable[[Array], Array]]:
    """Cross-correlate images (N, C, H, W) with kernels.

    Args:
        x: the images.
        weight: one row for each output channel, (out, C / groups, ...), with kh * kw elements in the last dimensions.
        bias: (out,) or None.
        windows: the windows, with their padding.
        groups: number of parts of the channels.

    Returns:
        The outputs (N, out, H', W'), and the function from their gradient to that of `x`.
    """
    n, _, height, width = x.shape
    outer, dtype = weight.data.shape[0], x.dtype
    down, across = windows.output_size(height, width)

    def by_group(matrix: Array) -> Array:
        return matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1]) if groups > 1 else matrix

    def kernels() -> Array:
        return by_group(weight.data.reshape(outer, -1))

    with quiet_overflow(dtype):
        by_channel = wide_matmul(kernels(), by_group(windows.gather(x))).reshape(outer, n * down * across)
        if bias is not None:
            by_channel += bias.data[:, None]
        y = by_channel.astype(dtype, copy=False).reshape(outer, n, down, across).transpose(1, 0, 2, 3)

    def pull(grad_y: Array) -> Array:
        grad_rows = grad_y.transpose(1, 0, 2, 3).reshape(outer, n * down * across)
        if bias is not None:
            bias.add_grad(row_sums(grad_rows))
        if weight.requires_grad and groups == 1:
            weight.add_grad_product(grad_rows, conjugate(windows.gather(x).T))
        elif weight.requires_grad:
            columns = conjugate(by_group(windows.gather(x)).swapaxes(1, 2))
            weight.add_grad(matmul(by_group(grad_rows), columns).reshape(weight.data.shape))
        with quiet_overflow(grad_y.dtype):
            columns = wide_matmul(conjugate(kernels().swapaxes(-2, -1)), by_group(grad_rows))
            grad_x = windows.scatter(columns, x.shape)
            return grad_x.astype(grad_y.dtype, copy=False)

    return namespace_of(x).ascontiguousarray(y), pull


def channels(layer: str, in_channels: int, out_channels: int, groups: int) -> tuple[int, int, int]:
    """Check numbers of channels, and of the groups into which they are divided.

    Raises:
        UsageError: a number is no whole number or less than 1, or `groups` does not divide the channels.
    """
    inner = whole_number(layer, "in_channels", in_channels)
    outer = whole_number(layer, "out_channels", out_channels)
    parts = whole_number(layer, "groups", groups)
    if inner % parts or outer % parts:
        raise UsageError(f"{layer}: groups must divide in_channels and out_channels, got {parts}, {inner} and {outer}.")
    return inner, outer, parts


def written(windows: Windows, groups: int, choose: Callable[[tuple[int, int]], object]) -> str:
    """Write the arguments for a layer's repr; dilation and groups only where they are not 1."""
    text = f"kernel_size={choose(windows.kernel)}, stride={choose(windows.stride)}, padding={choose(windows.padding)}"
    if windows.dilation != (1, 1):
        text += f", dilation={choose(windows.dilation)}"
    return f"{text}, groups={groups}" if groups > 1 else text
