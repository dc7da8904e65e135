"""MaxPool2d and AvgPool2d: the largest value, or the mean, of each window of an image."""

from __future__ import annotations

import math

import numpy.typing as npt

from ferro.errors import UsageError

from .arguments import Sizes, check_real
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_gradient, check_input
from .module import Module, Pullback
from .windows import Windows, conv_windows


class MaxPool2d(Module):
    """Take the maximum over windows of images (N, C, H, W); pixels left over are not used.

    Where maxima are equal, the first one, row by row, gets the gradient. A NaN is the maximum of
    its window, and such a window has no gradient.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal), as are the others.
        stride: distance between windows in pixels; None: the kernel's size.
        padding: width of the border around the image, whose pixels are below any other; at most half the kernel's size.
        dilation: distance between the pixels of a window.
    """

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, dilation: Sizes = 1
    ) -> None:
        self.windows = _pool_windows("MaxPool2d", kernel_size, stride, padding, dilation)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, C, H, W) to (N, C, H', W'), H' = (H + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1."""
        _check_images(self, x, self.windows)
        windows, xp = self.windows, namespace_of(x)
        first, *others = windows.taps(windows.padded(x, -math.inf))
        y = first.copy()
        for tap in others:
            xp.maximum(y, tap, out=y)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape, real=True)
            # Searching the maxima again needs only x and y, which neighbouring layers usually keep anyway.
            padded = windows.padded(x, -math.inf)
            grad_x: Array = xp.zeros(padded.shape, wide_dtype(grad_y.dtype))
            taken = xp.zeros(y.shape, bool)
            for tap, grad_tap in zip(windows.taps(padded), windows.taps(grad_x), strict=True):
                is_maximum = (tap == y) & ~taken
                taken |= is_maximum
                grad_tap += xp.where(is_maximum, grad_y, grad_y.dtype.type(0))  # a product could make NaN of inf
            return _unpadded(windows, grad_x, grad_y)

        return y, pullback

    def __repr__(self) -> str:
        return f"MaxPool2d({_written(self.windows)})"


class AvgPool2d(Module):
    """Take the mean over windows of images (N, C, H, W); pixels left over are not used.

    Half precision is added up in float32.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal), as are the next two.
        stride: distance between windows in pixels; None: the kernel's size.
        padding: width of the zeros around the image; at most half the kernel's size.
        count_include_pad: whether these zeros count as pixels of the window in its mean.
    """

    def __init__(
        self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0, *, count_include_pad: bool = True
    ) -> None:
        self.windows = _pool_windows("AvgPool2d", kernel_size, stride, padding, 1)
        self.count_include_pad = count_include_pad

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, C, H, W) to (N, C, H', W'), H' = (H + 2 * padding - kernel) // stride + 1."""
        _check_images(self, x, self.windows)
        windows, xp, wide = self.windows, namespace_of(x), wide_dtype(x.dtype)
        padded = windows.padded(x)
        counts = self._counts(x, wide)
        total: Array = xp.zeros((*x.shape[:2], *windows.output_size(*x.shape[2:])), wide)
        for tap in windows.taps(padded):
            total += tap
        total /= counts
        padded_shape, shape = padded.shape, total.shape

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, shape, real=True)
            share = grad_y / counts.astype(wide_dtype(grad_y.dtype), copy=False)
            grad_x: Array = xp.zeros(padded_shape, share.dtype)
            for tap in windows.taps(grad_x):
                tap += share
            return _unpadded(windows, grad_x, grad_y)

        return total.astype(x.dtype, copy=False), pullback

    def _counts(self, x: Array, wide: npt.DTypeLike) -> Array:
        """Count the pixels of each window: (H', W'), or () where all windows have as many."""
        xp, windows = namespace_of(x), self.windows
        if self.count_include_pad or windows.padding == (0, 0):
            counts: Array = xp.full((), math.prod(windows.kernel), wide)
            return counts
        first, *others = windows.taps(windows.padded(xp.ones((1, 1, *x.shape[2:]), wide)))
        counts = first[0, 0].copy()
        for tap in others:
            counts += tap[0, 0]
        return counts

    def __repr__(self) -> str:
        count = "" if self.count_include_pad else ", count_include_pad=False"
        return f"AvgPool2d({_written(self.windows)}{count})"


def _pool_windows(layer: str, kernel: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes) -> Windows:
    windows = conv_windows(layer, kernel, kernel if stride is None else stride, padding, dilation)
    if any(2 * pad > extent for pad, extent in zip(windows.padding, windows.extent, strict=True)):
        raise UsageError(
            f"{layer}: padding must be at most half of the kernel's size, got {windows.padding} and {windows.kernel}."
        )
    return windows


def _check_images(layer: Module, x: Array, windows: Windows) -> None:
    check_real(layer, x)
    height, width = windows.least_size
    fits = x.ndim == 4 and windows.fit(*x.shape[2:])
    check_input(layer, x, f"(N, C, H >= {height}, W >= {width})", fits=fits)


def _unpadded(windows: Windows, grad_x: Array, grad_y: Array) -> Array:
    """Cut the gradient of padded images to that of the images, in the dtype of `grad_y`."""
    with quiet_overflow(grad_y.dtype):
        grad: Array = namespace_of(grad_x).ascontiguousarray(windows.inside(grad_x), grad_y.dtype)
    return grad


def _written(windows: Windows) -> str:
    text = f"kernel_size={windows.kernel}, stride={windows.stride}"
    if windows.padding != (0, 0):
        text += f", padding={windows.padding}"
    return text if windows.dilation == (1, 1) else f"{text}, dilation={windows.dilation}"
