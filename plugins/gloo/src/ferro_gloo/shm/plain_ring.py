"""PlainRing: what the native helper's `Ring` does, in Python and without the lines, for groups that do not use it."""

from __future__ import annotations

from collections.abc import Sequence

from ferro_gloo.shm.counters import ProgressCounters


class PlainRing:
    """The turns of one rank's slots; see `NativeRing` in `native` for the methods.

    Args:
        counters: how far each rank has come.
        headers: this rank's headers, by slot.

    Attributes:
        next: the number of the next chunk.
    """

    def __init__(self, counters: ProgressCounters, headers: Sequence[memoryview]) -> None:
        self.next = 0
        self._counters = counters
        self._headers = headers
        self._written = [b""] * len(headers)

    def begin(self, header: bytes) -> int:
        """Take the number of an operation's first chunk, and write its header unless the slot has it already."""
        number = self.next
        self.next = number + 1
        slot = number % len(self._headers)
        if header != self._written[slot]:
            self._headers[slot][: len(header)] = header
            self._written[slot] = header
        return number

    def publish(self, number: int) -> None:
        """Tell the others that this rank has written chunk `number`, and has read chunk `number - 2`."""
        self._counters.publish(number + 1)

    def retract(self) -> None:
        """Take back all published chunks."""
        self._counters.publish(-1)
