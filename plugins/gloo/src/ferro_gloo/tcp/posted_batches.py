"""Batches of frames that are begun without waiting, and the wait until one of them has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from ferro.types import Array
from ferro_gloo.tcp.matching import TransferBatch

PeerBuffers: TypeAlias = Sequence[tuple[int, Array]]
Step: TypeAlias = tuple[PeerBuffers, PeerBuffers, Iterable[bytes], int]
"""The sends, the receives, the labels of both, and the tag: the arguments of `TcpBackend.move`."""
Plan: TypeAlias = Callable[[PeerBuffers, PeerBuffers, int], Iterator[Step]]
"""A function that gives the steps of sends and receives with one tag."""


class EndedBatches(TransferBatch):
    """The batches that have ended, for the thread that waits until there are some.

    The engine takes it for a batch, which has ended when there are some or the wait is to end.
    """

    __slots__ = ("batches", "woken")

    def __init__(self, context: int) -> None:
        self.batches: list[PostedBatch] = []
        self.woken = False
        super().__init__(context, 1)

    @property
    def remaining(self) -> int:
        """0 ends the wait."""
        return 0 if self.batches or self.woken else 1

    @remaining.setter
    def remaining(self, value: int) -> None:
        return


class PostedBatch(TransferBatch):
    """One step of a posted transfer, which joins the ended batches by itself."""

    __slots__ = ("_ended", "_remaining", "handle", "steps")

    def __init__(self, ended: EndedBatches, remaining: int, handle: object, steps: Iterator[Step]) -> None:
        self._ended = ended
        self.handle = handle
        self.steps = steps
        super().__init__(ended.context, remaining)

    @property
    def remaining(self) -> int:
        """The number of frames that have not moved."""
        return self._remaining

    @remaining.setter
    def remaining(self, value: int) -> None:
        self._remaining = value
        if value == 0 and self.error is None:
            self._ended.batches.append(self)

    def fail(self, error: Exception) -> None:
        """Keep the first error, and end."""
        if not self.ended:
            self.error = error
            self._ended.batches.append(self)
