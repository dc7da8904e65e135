"""ArrayPiece: the elements of one array that one rank holds, and where they lie in the whole array."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.placement.boxes import Box, flat_boxes


class Placed(Protocol):
    """What an object of another package has that says where its elements lie."""

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


class ArrayPiece(NamedTuple):
    """This rank's piece of an array: a box of it, or consecutive elements of a flattened box.

    Attributes:
        shape: of the whole array; () for a number.
        data: the elements that this rank holds, in C order. A load writes into it.
        start: the box's first index in each dimension.
        extent: the box's size in each dimension; a rank that holds nothing has a size of 0.
        flat: the first of the flattened box's elements, and how many of them this rank holds; None for all.
        replicas_may_differ: ranks that hold the same elements need not have the same values, and those of the lowest
            rank count, as with running statistics that are synchronised from time to time.
        on_all_ranks: every rank knows the array, though it may hold nothing of it. False where ranks have different
            parts of a model, as the stages of a pipeline do.
    """

    shape: tuple[int, ...]
    data: Array
    start: tuple[int, ...]
    extent: tuple[int, ...]
    flat: tuple[int, int] | None = None
    replicas_may_differ: bool = False
    on_all_ranks: bool = True

    @classmethod
    def whole(cls, data: Array) -> ArrayPiece:
        """Describe an array that this rank holds as a whole."""
        shape = data.shape
        return cls(shape, data, (0,) * len(shape), shape)

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
        return cls(
            shape=shape,
            data=placed.data,
            start=start,
            extent=extent,
            flat=flat,
            replicas_may_differ=bool(getattr(placed, "replicas_may_differ", False)),
            on_all_ranks=bool(getattr(placed, "on_all_ranks", True)),
        )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements."""
        return self.data.dtype

    @property
    def is_whole(self) -> bool:
        """True if this rank holds the whole array."""
        return self.extent == self.shape and (self.flat is None or self.flat == (0, math.prod(self.shape)))

    def boxes(self) -> list[Box]:
        """List the boxes of the whole array of which this rank holds the elements, in the order of its data."""
        if self.flat is None:
            box = Box(self.start, self.extent)
            return [box] if box.size else []
        first, count = self.flat
        return [box.moved(self.start) for box in flat_boxes(self.extent, first, first + count)]

    def views(self, name: str) -> list[Array]:
        """Return the elements of each of `boxes`, in its shape, without a copy.

        Raises:
            StateError: the memory of `data` has such an order that no view has the box's shape.
        """
        if self.flat is None and self.data.shape == self.extent:
            return [self.data] if self.data.size else []
        views, place = [], 0
        for box in self.boxes():
            view = _view(self.data, place, box)
            if view is None:
                raise StateError(
                    f"{name!r}: the memory of its {self.data.shape} elements is not in C order: give a piece in the "
                    f"shape of its box, {self.extent}, or a copy in C order"
                )
            views.append(view)
            place += box.size
        return views

    def consecutive(self) -> tuple[int, int] | None:
        """Find this rank's elements in the flattened whole array.

        Returns:
            The first element, and one more than the last, if they are consecutive there; else None.
        """
        if self.flat is not None and self.extent == self.shape:
            return self.flat[0], sum(self.flat)
        boxes = self.boxes()
        if not boxes:
            return 0, 0
        found = boxes[0].consecutive(self.shape)
        for box in boxes[1:]:
            more = box.consecutive(self.shape)
            if found is None or more is None or found[1] != more[0]:
                return None
            found = found[0], more[1]
        return found


def _view(data: Array, first: int, box: Box) -> Array | None:
    """View elements of an array in a box's shape; None if its memory has an order in which there is no such view.

    Args:
        data: the array.
        first: the first of the elements, in C order.
        box: has as many elements as the view.
    """
    if data.flags.c_contiguous:
        return data.reshape(-1)[first : first + box.size].reshape(box.extent)
    inner = math.prod(data.shape[1:])
    if first % inner or box.size % inner:
        return None
    rows = data[first // inner : (first + box.size) // inner]
    view = rows.reshape(box.extent)
    return view if np.may_share_memory(view, rows) else None  # `reshape` makes a copy where it cannot make a view
