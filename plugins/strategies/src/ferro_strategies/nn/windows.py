"""Sliding windows over images, for convolution and pooling."""

from __future__ import annotations

from dataclasses import dataclass

from ferro.errors import UsageError

from .arrays import Array, namespace_of


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of `kernel` pixels, `stride` apart, over an image with `padding` zeros around it.

    Each of the three is (vertical, horizontal), in pixels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def check(self, layer: str) -> None:
        """Refuse a kernel without pixels, a stride below 1, or negative padding.

        Raises:
            UsageError: names the layer and the values.
        """
        if min(self.kernel) < 1 or min(self.stride) < 1 or min(self.padding) < 0:
            raise UsageError(
                f"{layer}: kernel_size and stride must be at least 1 and padding at least 0, "
                f"got {self.kernel}, {self.stride} and {self.padding}."
            )

    def fit(self, height: int, width: int) -> bool:
        """Return True if an image of this size holds at least one window."""
        return min(self.output_size(height, width)) >= 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Count the windows in an image, (down, across); they do not cover leftover pixels."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel, self.stride, self.padding
        return (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1

    def padded(self, images: Array) -> Array:
        """Surround `images` (N, C, H, W) with zeros, as wide as `padding`."""
        ph, pw = self.padding
        if not (ph or pw):
            return images
        n, c, height, width = images.shape
        shape = (n, c, height + 2 * ph, width + 2 * pw)
        padded: Array = namespace_of(images).zeros(shape, images.dtype)
        padded[:, :, ph : ph + height, pw : pw + width] = images
        return padded

    def taps(self, images: Array) -> list[Array]:
        """Cut padded images (N, C, H, W) into one view per kernel pixel, row by row.

        View i * kw + j is (N, C, down, across): pixel (i, j) of every window. Unlike the windows
        themselves, which overlap, a view has each element once, so gradients can be added to it.
        """
        (kh, kw), (sh, sw) = self.kernel, self.stride
        down = (images.shape[2] - kh) // sh + 1
        across = (images.shape[3] - kw) // sw + 1
        return [images[:, :, i : i + sh * down : sh, j : j + sw * across : sw] for i in range(kh) for j in range(kw)]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Make (vertical, horizontal) from one number for both, or from two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
