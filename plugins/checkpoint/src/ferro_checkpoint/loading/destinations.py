"""The arrays that are loaded into: they must be writable, and no element may be two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.placement.array_piece import ArrayPiece
from ferro_checkpoint.placement.local_array import LocalArray

_MOST_COMPARISONS = 10_000  # in which NumPy finds out whether two arrays that lie within each other share an element


class Destinations:
    """The arrays that are loaded into.

    An array that is in the state under several names is loaded once. What the checkpoint has under the other names is
    read into memory of its own, and compared.

    Args:
        pieces: names and pieces of this rank.

    Attributes:
        arrays: to load into.

    Raises:
        StateError: one is read-only, or shares a part of its memory with another one, or with itself.
    """

    def __init__(self, pieces: Iterable[tuple[str, ArrayPiece]]) -> None:
        self._same: list[tuple[LocalArray, LocalArray]] = []
        self.arrays: list[LocalArray] = []
        known: dict[tuple[object, ...], LocalArray] = {}
        bounds: list[tuple[int, int, int]] = []  # of each array's memory, and its position
        for name, piece in pieces:
            data = piece.data
            array = LocalArray(name, piece)
            if isinstance(data, np.ndarray) and data.size:
                _check_alone(name, data)
                begin, end = _bounds(data)
                first = known.setdefault((begin, data.dtype, data.shape, data.strides), array)
                if first is array:
                    bounds.append((begin, end, len(self.arrays)))
                else:
                    array = LocalArray(name, piece._replace(data=np.empty(data.shape, data.dtype)))
                    self._same.append((first, array))
            self.arrays.append(array)
        self._check_apart(sorted(bounds))

    def check_copies(self) -> None:
        """Compare what was loaded for an array under several names, when everything is loaded.

        Raises:
            StateError: the checkpoint has different values for it.
        """
        for first, other in self._same:
            if first.piece.data.tobytes() != other.piece.data.tobytes():
                raise StateError(
                    f"{first.name!r} and {other.name!r} are one array in the state, and differ in the checkpoint. "
                    f"Arrays of the state have changed"
                )

    def _check_apart(self, bounds: Sequence[tuple[int, int, int]]) -> None:
        """Check that no two arrays share memory; `bounds` are in order."""
        farthest: tuple[int, int, int] | None = None
        for item in bounds:
            if farthest is not None and item[0] < farthest[1]:
                one, other = self.arrays[farthest[2]], self.arrays[item[2]]
                if _share(one.piece.data, other.piece.data):
                    raise StateError(
                        f"{one.name!r} and {other.name!r} share memory in the state: give arrays of their own"
                    )
            if farthest is None or item[1] > farthest[1]:
                farthest = item


def _check_alone(name: str, data: Array) -> None:
    if not data.flags.writeable:
        raise StateError(f"{name!r} is read-only in the state: give an array that can be written to")
    if data.flags.c_contiguous:
        return
    reach = data.itemsize
    for stride, size in sorted(zip(map(abs, data.strides), data.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise StateError(f"elements of {name!r} share memory in the state: give an array of its own")
            reach += (size - 1) * stride


def _bounds(data: Array) -> tuple[int, int]:
    """Return the address of an array's first byte, and of the one after its last."""
    begin: int = data.__array_interface__["data"][0]
    if data.flags.c_contiguous:
        return begin, begin + data.nbytes
    steps = [(size - 1) * stride for size, stride in zip(data.shape, data.strides, strict=True)]
    first = begin + sum(step for step in steps if step < 0)
    return first, begin + sum(step for step in steps if step > 0) + data.itemsize


def _share(one: Array, other: Array) -> bool:
    try:
        return bool(np.shares_memory(one, other, max_work=_MOST_COMPARISONS))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False  # They are views of one array, such as its columns, and no common element was found.
