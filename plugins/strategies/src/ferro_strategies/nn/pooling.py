"""MaxPool2d: the largest value of each window of an image."""

from __future__ import annotations

from .arrays import Array, namespace_of
from .checks import check_gradient, check_input
from .module import Module, Pullback
from .windows import Windows, pair


class MaxPool2d(Module):
    """Take the maximum over windows of images (N, C, H, W); pixels left over are not used.

    Where maxima are equal, the first one, row by row, gets the gradient. A NaN is the maximum of
    its window, and such a window has no gradient.

    Args:
        kernel_size: size in pixels, one number or (vertical, horizontal).
        stride: distance between windows in pixels; None: the kernel's size.
    """

    def __init__(self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None) -> None:
        kernel = pair(kernel_size)
        self.windows = Windows(kernel, kernel if stride is None else pair(stride))
        self.windows.check("MaxPool2d")

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, C, H, W) to (N, C, H', W'), H' = (H - kernel) // stride + 1."""
        kh, kw = self.windows.kernel
        fits = x.ndim == 4 and self.windows.fit(*x.shape[2:])
        check_input(self, x, f"(N, C, H >= {kh}, W >= {kw})", fits=fits)
        xp = namespace_of(x)
        first, *others = self.windows.taps(x)
        y = first.copy()
        for tap in others:
            xp.maximum(y, tap, out=y)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape)
            # Searching the maxima again needs only x and y, which neighbouring layers usually keep anyway.
            grad_x: Array = xp.zeros(x.shape, grad_y.dtype)
            taken = xp.zeros(y.shape, bool)
            taps = zip(self.windows.taps(x), self.windows.taps(grad_x), strict=True)
            for tap, grad_tap in taps:
                is_maximum = (tap == y) & ~taken
                taken |= is_maximum
                grad_tap += xp.where(is_maximum, grad_y, grad_y.dtype.type(0))  # a product could make NaN of inf
            return grad_x

        return y, pullback

    def __repr__(self) -> str:
        return f"MaxPool2d(kernel_size={self.windows.kernel}, stride={self.windows.stride})"
