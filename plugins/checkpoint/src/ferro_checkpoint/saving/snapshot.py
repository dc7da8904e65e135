"""Where the bytes that a rank supplies come from: its arrays as they are, or a copy of them that was made before."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ferro.types import Array
from ferro_checkpoint.errors import StateError
from ferro_checkpoint.plan.parts import SegmentPart, as_bytes
from ferro_checkpoint.saving.save_plan import SavePlan


class SuppliedBytes(Protocol):
    """The bytes of the parts that this rank supplies."""

    def views(self, number: int, parts: list[SegmentPart]) -> list[memoryview]:
        """Return the bytes of all parts of segment `number` that this rank supplies, in order."""

    def fill(self, number: int, parts: list[SegmentPart], segment: Array, itemsizes: list[int]) -> None:
        """Copy them to their places in the segment's bytes."""


class LiveArrays:
    """The arrays themselves, which must not change until all is written."""

    def __init__(self, plan: SavePlan) -> None:
        self._local = plan.local

    def views(self, number: int, parts: list[SegmentPart]) -> list[memoryview]:  # noqa: D102
        return [self._view(part) for part in parts]

    def fill(self, number: int, parts: list[SegmentPart], segment: Array, itemsizes: list[int]) -> None:  # noqa: D102
        for part, itemsize in zip(parts, itemsizes, strict=True):
            fill_part(part, self._view(part), segment, itemsize)

    def _view(self, part: SegmentPart) -> memoryview:
        view = self._local.view(part)
        if view is None:
            copied = np.empty(part.nbytes, np.uint8)
            self._local.read(part, copied)
            view = memoryview(copied)  # type: ignore[arg-type]
        return view


class Snapshot:
    """A copy of all that this rank supplies, in one buffer; the arrays may change once it is made.

    Args:
        plan: of the save.
        buffer: bytes to copy into, at least `plan.staged_bytes`; made if None.
    """

    def __init__(self, plan: SavePlan, buffer: Array | None = None) -> None:
        if not plan.staged:
            place_parts(plan)
        if buffer is None:
            buffer = np.empty(plan.staged_bytes, np.uint8)
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size < plan.staged_bytes:
            raise StateError(f"the buffer has {buffer.nbytes} bytes, and the copy {plan.staged_bytes}")
        self._staged, self._buffer = plan.staged, buffer
        for number, place in plan.staged.items():
            for part in plan.own_parts(number):
                plan.local.read(part, buffer[place : place + part.nbytes])
                place += part.nbytes

    def views(self, number: int, parts: list[SegmentPart]) -> list[memoryview]:  # noqa: D102
        if not parts:
            return []
        place = self._staged[number]
        return [as_bytes(self._buffer[place : place + sum(part.nbytes for part in parts)])]

    def fill(self, number: int, parts: list[SegmentPart], segment: Array, itemsizes: list[int]) -> None:  # noqa: D102
        place = self._staged.get(number, 0)
        for part, itemsize in zip(parts, itemsizes, strict=True):
            fill_part(part, as_bytes(self._buffer[place : place + part.nbytes]), segment, itemsize)
            place += part.nbytes


def place_parts(plan: SavePlan) -> None:
    """Choose where in a copy the parts of each segment are: `plan.staged` and `plan.staged_bytes`."""
    place = 0
    for number in plan.segments_with_own_parts():
        nbytes = sum(part.nbytes for part in plan.own_parts(number))
        if nbytes:
            plan.staged[number] = place
            place += nbytes
    plan.staged_bytes = place


def fill_part(part: SegmentPart, view: memoryview, segment: Array, itemsize: int) -> None:
    """Copy a part's bytes to its place in the segment's."""
    place = part.place(segment, itemsize)
    place[...] = np.frombuffer(view, np.uint8).reshape(place.shape)
