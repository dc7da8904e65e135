"""LocalArray: reads and writes bytes of this rank's piece of an array, wherever its memory is and however it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.layout.dtypes import dtype_name
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.placement.boxes import Box, flat_boxes, whole_box

_MOST_COMPLEX_DIMS = 31  # NumPy 1 has arrays of at most 32 dimensions, and the pairs are one more
_COMPLEX = np.dtype(np.complex128)
_BLOCK = 128  # elements
COMPLEX128 = "C128"
"""The dtype of an array of complex128, in place of the float64 as which files have it."""


class LocalArray:
    """A piece, as bytes.

    A complex128 array, which no safetensors file has, is one of float64 with a last dimension of 2 more.

    Args:
        name: of the array, for messages.
        piece: this rank's piece.

    Attributes:
        name: as given.
        dtype_name: of the array in files; COMPLEX128 for pairs of float64.
        shape: of the whole array in files.
        itemsize: bytes of an element.
        range: the first of the whole array's elements that this rank holds, and one more than the last, if they are
            consecutive there; else None.
        boxes: the boxes that this rank holds, where `range` is None.

    Raises:
        StateError: no file has this dtype, or the piece's memory has an order in which its boxes have no views.
    """

    __slots__ = ("_flat", "_views", "boxes", "dtype_name", "itemsize", "name", "piece", "range", "shape")

    def __init__(self, name: str, piece: ArrayPiece) -> None:
        dtype = piece.data.dtype
        self.name = name
        if dtype == _COMPLEX:
            if piece.data.ndim >= _MOST_COMPLEX_DIMS:
                raise StateError(f"{name!r} is complex128 and has {piece.data.ndim} dimensions, which are too many")
            piece = _of_floats(piece)
            self.dtype_name, self.itemsize = COMPLEX128, 8
        else:
            self.dtype_name, self.itemsize = dtype_name(dtype, name), dtype.itemsize
        self.piece, self.shape = piece, piece.shape
        self._views: list[Array] | None = None
        self._flat: memoryview | None = None
        self.range: tuple[int, int] | None
        self.boxes: Sequence[Box] = ()
        if piece.flat is None and piece.extent == piece.shape:
            self.range = (0, piece.data.size)
        else:
            self.range = piece.consecutive()
            if self.range is None:
                self.boxes = piece.boxes()
                if not piece.data.flags.c_contiguous:
                    self._views = piece.views(name)

    def range_view(self, lo: int, hi: int) -> memoryview | None:
        """View the bytes of elements `lo` to `hi - 1` of the whole array; None if they are not there in this order."""
        if self._flat is None:
            data = self.piece.data
            if not isinstance(data, np.ndarray) or not data.flags.c_contiguous:
                return None
            self._flat = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        assert self.range is not None
        first = self.range[0]
        return self._flat[(lo - first) * self.itemsize : (hi - first) * self.itemsize]

    def read(self, lo: int, hi: int, out: Array) -> None:
        """Copy the bytes of elements `lo` to `hi - 1` of the whole array into an array of bytes."""
        if (view := self.range_view(lo, hi)) is not None:
            out[:] = np.frombuffer(view, np.uint8)
            return
        place = 0
        for view_part in self._parts(lo, hi):
            place += _read(view_part, out[place:])

    def write(self, lo: int, hi: int, source: Array) -> None:
        """Copy an array of bytes into elements `lo` to `hi - 1` of the whole array."""
        if (view := self.range_view(lo, hi)) is not None:
            np.frombuffer(view, np.uint8)[:] = source
            return
        place = 0
        for view_part in self._parts(lo, hi):
            place += _write(view_part, source[place:])

    def read_box(self, number: int, box: Box, out: Array) -> None:
        """Copy the bytes of a box of the whole array, which lies in box `number`, into an array of bytes."""
        _read(self._box_views()[number][box.within(self.boxes[number])], out)

    def write_box(self, number: int, box: Box, source: Array) -> None:
        """Copy an array of bytes into a box of the whole array, which lies in box `number`."""
        _write(self._box_views()[number][box.within(self.boxes[number])], source)

    def _parts(self, lo: int, hi: int) -> Iterator[Array]:
        """List views whose elements, one after the other, are those from `lo` to `hi - 1` of the whole array."""
        assert self.range is not None
        data = self.piece.data
        for box in flat_boxes(data.shape, lo - self.range[0], hi - self.range[0]):
            yield data[box.within(whole_box(data.shape))]

    def _box_views(self) -> list[Array]:
        if self._views is None:
            self._views = self.piece.views(self.name)
        return self._views


def _read(view: Array, out: Array) -> int:
    """Copy a view's elements into the beginning of an array of bytes; return how many bytes they have."""
    target = out[: view.nbytes].view(view.dtype).reshape(view.shape)
    if hasattr(view, "get"):  # CuPy's arrays have it
        target[...] = view.get()
    else:
        _copy(view, target, view.strides)
    return view.nbytes


def _write(view: Array, source: Array) -> int:
    """Copy the beginning of an array of bytes into a view; return how many bytes it has."""
    values = source[: view.nbytes].view(view.dtype).reshape(view.shape)
    if hasattr(view, "get"):
        import cupy

        view[...] = cupy.asarray(values)
    else:
        _copy(values, view, view.strides)
    return view.nbytes


def _copy(source: Array, target: Array, strides: tuple[int, ...]) -> None:
    """Copy elements; by blocks where the last dimension's are far apart, as in Fortran order.

    NumPy goes along the target's rows, and there touches a page of the source for each element: in blocks, a copy of
    large arrays takes an eighth of the time.
    """
    if source.ndim > 1 and abs(strides[-1]) > min(map(abs, strides)):
        for begin in range(0, source.shape[-1], _BLOCK):
            target[..., begin : begin + _BLOCK] = source[..., begin : begin + _BLOCK]
    else:
        target[...] = source


def _of_floats(piece: ArrayPiece) -> ArrayPiece:
    """Describe a piece of a complex128 array as one of an array of pairs of float64."""
    real = piece.data.real
    data = np.lib.stride_tricks.as_strided(
        real, (*real.shape, 2), (*real.strides, 8), writeable=piece.data.flags.writeable
    )
    box_flat = None if piece.flat is None else (2 * piece.flat[0], 2 * piece.flat[1])
    return ArrayPiece(
        shape=(*piece.shape, 2),
        data=data.reshape(-1) if piece.flat is not None and piece.data.flags.c_contiguous else data,
        start=(*piece.start, 0),
        extent=(*piece.extent, 2),
        flat=box_flat,
        replicas_may_differ=piece.replicas_may_differ,
        on_all_ranks=piece.on_all_ranks,
    )
