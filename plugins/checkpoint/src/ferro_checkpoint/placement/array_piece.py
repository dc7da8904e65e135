"""ArrayPiece: the elements of one array that one rank holds, and where they lie in the whole array."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.placement.runs import Runs, box_runs


class Placed(Protocol):
    """What an object of another package has that says where its elements lie; `ArrayPiece` describes each."""

    # The attributes are those of `ArrayPiece`.
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def data(self) -> Array: ...  # noqa: D102
    @property
    def start(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def extent(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def flat(self) -> tuple[int, int] | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPiece:
    """This rank's piece of an array: a box of it, or consecutive elements of a flattened box.

    Attributes:
        shape: of the whole array; () for a number.
        data: the elements that this rank holds, in C order. A load writes into it.
        start: the box's first index in each dimension.
        extent: the box's size in each dimension; a rank that holds nothing has a size of 0.
        flat: the first of the flattened box's elements, and how many of them this rank holds; None for all.
    """

    shape: tuple[int, ...]
    data: Array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    flat: tuple[int, int] | None = None

    @classmethod
    def whole(cls, data: Array) -> ArrayPiece:
        """Place an array that this rank holds as a whole."""
        return cls(shape=data.shape, data=data, start=(0,) * data.ndim, extent=data.shape)

    @classmethod
    def checked(cls, name: str, placed: Placed) -> ArrayPiece:
        """Read a piece that another package describes.

        Raises:
            StateError: the box leaves the array, or the data are not as many as the box or its part has.
        """
        shape, start, extent = (tuple(map(int, sizes)) for sizes in (placed.shape, placed.start, placed.extent))
        flat = None if placed.flat is None else (int(placed.flat[0]), int(placed.flat[1]))
        fits = len(shape) == len(start) == len(extent) and all(
            first >= 0 and size >= 0 and first + size <= whole
            for whole, first, size in zip(shape, start, extent, strict=True)
        )
        box = math.prod(extent)
        fits = fits and (flat is None or (flat[0] >= 0 and flat[1] >= 0 and sum(flat) <= box))
        if not fits or placed.data.size != (box if flat is None else flat[1]):
            raise StateError(
                f"{name!r}: a piece of {placed.data.size} elements at {start}, of {extent}"
                f"{'' if flat is None else f', {flat[1]} elements from {flat[0]} on'}, is none of an array of {shape}"
            )
        return cls(shape=shape, data=placed.data, start=start, extent=extent, flat=flat)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements."""
        return self.data.dtype

    @property
    def is_whole(self) -> bool:
        """True if this rank holds the whole array."""
        return self.extent == self.shape and (self.flat is None or self.flat == (0, math.prod(self.shape)))

    def runs(self) -> Runs:
        """List the consecutive elements of the whole array that this rank holds."""
        return box_runs(self.shape, self.start, self.extent, self.flat)
