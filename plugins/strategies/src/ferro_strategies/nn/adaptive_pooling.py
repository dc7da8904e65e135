"""AdaptiveAvgPool2d and AdaptiveMaxPool2d: pooling to an output of a given size, from images of any size."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .arguments import Sizes, check_real
from .arrays import Array, namespace_of, quiet_overflow, wide_dtype
from .checks import check_gradient, check_input
from .module import Module, Pullback
from .sums import row_sums
from .windows import pair


class AdaptiveAvgPool2d(Module):
    """Take the mean over each of (output_size) parts of images (N, C, H, W).

    Part i of n along H is the rows from floor(i * H / n) to ceil((i + 1) * H / n), so parts may overlap. Half precision
    is added up in float32.

    Args:
        output_size: size of the output, one number or (vertical, horizontal).
    """

    def __init__(self, output_size: Sizes) -> None:
        self.output_size = pair("AdaptiveAvgPool2d", "output_size", output_size)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, C, H, W) to (N, C, *output_size)."""
        _check_images(self, x)
        xp, x_shape = namespace_of(x), x.shape
        y: Array = xp.empty((*x_shape[:2], *self.output_size), x.dtype)
        for cell, part in self._parts(x):
            size = math.prod(part.shape[2:])
            y[cell] = row_sums(part.reshape(*x_shape[:2], size)) / size

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape, real=True)
            grad_x: Array = xp.zeros(x_shape, wide_dtype(grad_y.dtype))
            for cell, part in self._parts(grad_x):
                part += (grad_y[cell].astype(part.dtype) / math.prod(part.shape[2:]))[..., None, None]
            with quiet_overflow(grad_y.dtype):
                return grad_x.astype(grad_y.dtype, copy=False)

        return y, pullback

    def _parts(self, x: Array) -> Iterator[tuple[_Cell, Array]]:
        return _parts(x, self.output_size)

    def __repr__(self) -> str:
        return f"AdaptiveAvgPool2d({self.output_size})"


class AdaptiveMaxPool2d(Module):
    """Take the maximum over each of (output_size) parts of images (N, C, H, W): see AdaptiveAvgPool2d.

    Where maxima are equal, the first one, row by row, gets the gradient; a NaN is the maximum of its part.

    Args:
        output_size: size of the output, one number or (vertical, horizontal).
    """

    def __init__(self, output_size: Sizes) -> None:
        self.output_size = pair("AdaptiveMaxPool2d", "output_size", output_size)

    def vjp(self, x: Array) -> tuple[Array, Pullback]:
        """Map (N, C, H, W) to (N, C, *output_size)."""
        _check_images(self, x)
        xp, (n, c, height, width) = namespace_of(x), x.shape
        y: Array = xp.empty((n, c, *self.output_size), x.dtype)
        places: list[Array] = []
        numbers = xp.broadcast_to(xp.arange(height * width).reshape(height, width), x.shape)
        for (cell, part), (_, number) in zip(self._parts(x), self._parts(numbers), strict=True):
            rows = part.reshape(n * c, math.prod(part.shape[2:]))
            place = rows.argmax(axis=1)
            images = xp.arange(n * c)
            places.append(number.reshape(rows.shape)[images, place])
            y[cell] = rows[images, place].reshape(n, c)

        def pullback(grad_y: Array) -> Array:
            check_gradient(self, grad_y, y.shape, real=True)
            grad_x: Array = xp.zeros((n * c, height * width), wide_dtype(grad_y.dtype))
            images = xp.arange(n * c)
            for (cell, _), place in zip(self._parts(x), places, strict=True):
                grad_x[images, place] += grad_y[cell].reshape(n * c)
            with quiet_overflow(grad_y.dtype):
                return grad_x.reshape(n, c, height, width).astype(grad_y.dtype, copy=False)

        return y, pullback

    def _parts(self, x: Array) -> Iterator[tuple[_Cell, Array]]:
        return _parts(x, self.output_size)

    def __repr__(self) -> str:
        return f"AdaptiveMaxPool2d({self.output_size})"


# The index of one pixel of all images of the output.
_Cell = tuple[slice, slice, int, int]


def _parts(x: Array, output_size: tuple[int, int]) -> Iterator[tuple[_Cell, Array]]:
    """Yield the index of each pixel of the output, and a view of the part of `x` that belongs to it."""
    (down, across), (height, width) = output_size, x.shape[2:]
    every = slice(None)
    for i in range(down):
        rows = slice(i * height // down, -(-(i + 1) * height // down))
        for j in range(across):
            columns = slice(j * width // across, -(-(j + 1) * width // across))
            yield (every, every, i, j), x[:, :, rows, columns]


def _check_images(layer: Module, x: Array) -> None:
    check_real(layer, x)
    check_input(layer, x, "(N, C, H >= 1, W >= 1)", fits=x.ndim == 4 and min(x.shape[2:]) > 0)
