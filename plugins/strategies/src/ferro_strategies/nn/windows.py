"""Sliding windows over images, for convolution and pooling."""

from __future__ import annotations

from dataclasses import dataclass

from .arguments import Sizes, whole_numbers
from .arrays import Array, namespace_of


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of `kernel` pixels, `stride` apart, over an image with `padding` pixels around it.

    Each of the four is (vertical, horizontal), in pixels. The pixels of a window are `dilation` apart.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def extent(self) -> tuple[int, int]:
        """The size of the part of an image that a window covers, gaps between its pixels included."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    @property
    def least_size(self) -> tuple[int, int]:
        """The size of the smallest image that holds a window."""
        (eh, ew), (ph, pw) = self.extent, self.padding
        return max(eh - 2 * ph, 1), max(ew - 2 * pw, 1)

    def fit(self, height: int, width: int) -> bool:
        """Return True if an image of this size holds at least one window."""
        least = self.least_size
        return height >= least[0] and width >= least[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Count the windows in an image, (down, across); they do not cover leftover pixels."""
        (eh, ew), (sh, sw), (ph, pw) = self.extent, self.stride, self.padding
        return (height + 2 * ph - eh) // sh + 1, (width + 2 * pw - ew) // sw + 1

    def padded(self, images: Array, value: float = 0.0) -> Array:
        """Surround `images` (N, C, H, W) with `value`, as wide as `padding`."""
        ph, pw = self.padding
        if not (ph or pw):
            return images
        n, c, height, width = images.shape
        shape = (n, c, height + 2 * ph, width + 2 * pw)
        xp = namespace_of(images)
        padded: Array = xp.full(shape, value, images.dtype) if value else xp.zeros(shape, images.dtype)
        self.inside(padded)[...] = images
        return padded

    def inside(self, padded: Array) -> Array:
        """View the images inside of padded ones."""
        (ph, pw), (height, width) = self.padding, padded.shape[2:]
        return padded[:, :, ph : height - ph, pw : width - pw]

    def taps(self, images: Array) -> list[Array]:
        """Cut padded images (N, C, H, W) into one view per kernel pixel, row by row.

        View i * kw + j is (N, C, down, across): pixel (i, j) of every window. Unlike the windows
        themselves, which overlap, a view has each element once, so gradients can be added to it.
        """
        (kh, kw), (sh, sw), (dh, dw), (eh, ew) = self.kernel, self.stride, self.dilation, self.extent
        down = (images.shape[2] - eh) // sh + 1
        across = (images.shape[3] - ew) // sw + 1
        rows = [slice(i * dh, i * dh + sh * down, sh) for i in range(kh)]
        columns = [slice(j * dw, j * dw + sw * across, sw) for j in range(kw)]
        return [images[:, :, row, column] for row in rows for column in columns]

    def gather(self, images: Array) -> Array:
        """Gather the windows of `images` (N, C, H, W) as columns: (C * kh * kw, N * down * across)."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        n, c, height, width = images.shape
        down, across = self.output_size(height, width)
        padded = self.padded(images)
        by_n, by_c, by_h, by_w = padded.strides
        windows = namespace_of(images).lib.stride_tricks.as_strided(
            padded, shape=(c, kh, kw, n, down, across), strides=(by_c, by_h * dh, by_w * dw, by_n, by_h * sh, by_w * sw)
        )
        columns: Array = windows.reshape(c * kh * kw, n * down * across)
        return columns

    def scatter(self, columns: Array, shape: tuple[int, ...]) -> Array:
        """Add each column, (C * kh * kw, N * down * across), to the pixels of its window: (N, C, H, W), of `shape`."""
        (kh, kw), (ph, pw) = self.kernel, self.padding
        n, c, height, width = shape
        by_tap = columns.reshape(c, kh * kw, n, *self.output_size(height, width))
        xp = namespace_of(columns)
        # Channels come first, as in the columns, so that only the smaller result is transposed.
        image = xp.zeros((c, n, height + 2 * ph, width + 2 * pw), columns.dtype)
        for index, tap in enumerate(self.taps(image)):
            tap += by_tap[:, index]
        images: Array = xp.ascontiguousarray(self.inside(image).transpose(1, 0, 2, 3))
        return images


def pair(layer: str, name: str, value: Sizes, *, least: int = 1) -> tuple[int, int]:
    """Make (vertical, horizontal) from one number for both, or from two.

    Raises:
        UsageError: `value` is neither, or a number is less than `least`.
    """
    vertical, horizontal = whole_numbers(layer, name, value, 2, least=least)
    return vertical, horizontal


def conv_windows(layer: str, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Windows:
    """Make the windows of a layer for images from its arguments."""
    return Windows(
        pair(layer, "kernel_size", kernel),
        pair(layer, "stride", stride),
        pair(layer, "padding", padding, least=0),
        pair(layer, "dilation", dilation),
    )


def row_windows(layer: str, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Windows:
    """Make the windows of a layer for sequences, which are images of height 1, from its arguments."""

    def one(name: str, value: Sizes, least: int = 1) -> int:
        return whole_numbers(layer, name, value, 1, least=least)[0]

    return Windows(
        (1, one("kernel_size", kernel)),
        (1, one("stride", stride)),
        (0, one("padding", padding, 0)),
        (1, one("dilation", dilation)),
    )
