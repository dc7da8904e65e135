"""Repeated messages: those of one edge that go through persistent operations, which need no thread and no socket.

Such an operation has a message of one size in memory that stays, so it is for edges whose arrays keep their size. The
operations of an edge take turns. Each has one message under way at a time, so the sender uses the next one only when
the receiver has taken its last message; otherwise the message goes the ordinary way. The sender alone knows that, so
each message tells in which way the next one comes (see `channel`).
"""

from __future__ import annotations

from itertools import cycle
from typing import Protocol

import numpy as np

from ferro import ProcessGroup

from ...nn.arrays import Array

SOURCE, TARGET = 0, 1  # ranks in an edge's group
_MOST_OPERATIONS = 8
_MOST_BYTES = 32 << 20  # of all operations of an edge
MOST_MESSAGE_BYTES = _MOST_BYTES // 2  # an edge needs two operations, of which one is free while the other is used


class _Repeatable(Protocol):
    """A persistent operation (see `ProcessGroup.persistent`)."""

    @property
    def has_native_progress(self) -> bool: ...
    def __call__(self) -> object: ...
    def start(self) -> None: ...
    def done(self) -> bool: ...
    def wait(self) -> object: ...
    def close(self) -> None: ...


class RepeatedSend:
    """Sends messages from one piece of memory, one after the other.

    Attributes:
        memory: the message, which the caller writes while nothing is under way.
        is_under_way: True from `start` until `wait` has returned.
    """

    def __init__(self, operation: _Repeatable, memory: Array) -> None:
        self.memory = memory
        self.is_under_way = False
        self._operation = operation

    def start(self) -> None:
        """Start to send the message."""
        self._operation.start()
        self.is_under_way = True

    def done(self) -> bool:
        """Return True if the receiver needs the memory no more."""
        return self._operation.done()

    def wait(self) -> None:
        """Wait until the receiver needs the memory no more."""
        self._operation.wait()
        self.is_under_way = False


class RepeatedMessages:
    """One end of the operations of an edge.

    Args:
        operations: of this rank.
        memories: of the messages: one for each operation at the sender, one for all at the receiver.

    Attributes:
        nbytes: size of a message.
    """

    def __init__(self, operations: list[_Repeatable], memories: list[Array]) -> None:
        self.nbytes = memories[0].nbytes
        self._operations = operations
        self._memories = memories
        self._sends = [RepeatedSend(*each) for each in zip(operations, memories, strict=False)]
        self._next = 0
        self._receives = cycle(operations)

    @property
    def turn(self) -> RepeatedSend:
        """The operation that sends the next message."""
        return self._sends[self._next]

    def is_free(self, ahead: int) -> bool:
        """Return True if nothing is under way in the operation whose turn comes after so many others."""
        return not self._sends[(self._next + ahead) % len(self._sends)].is_under_way

    def pass_turn(self) -> None:
        """Let the next operation have its turn: a message for this one is complete."""
        self._next = (self._next + 1) % len(self._sends)

    def receive(self) -> Array:
        """Wait for the next message; return it, (nbytes,) uint8, in memory that the one after it overwrites."""
        next(self._receives)()
        return self._memories[0]

    def close(self) -> None:
        """Let go of all memory; at both ends, when nothing is under way."""
        for operation in self._operations:
            operation.close()


def make_repeated_messages(group: ProcessGroup, nbytes: int, messages: int) -> RepeatedMessages | None:
    """Make operations for messages of one size; both ranks of the edge call it, as a collective.

    Args:
        group: of the edge.
        nbytes: size of a message, at most MOST_MESSAGE_BYTES.
        messages: how many there are in a pass, as many as may be under way at the same time.

    Returns:
        None at both ends where a persistent operation is no better than the ordinary call, because the backend does
        not carry it on beside the computation.
    """
    count = max(2, min(_MOST_OPERATIONS, messages, _MOST_BYTES // nbytes))
    is_sender = group.rank == SOURCE
    operations: list[_Repeatable] = []
    memories: list[Array] = [] if is_sender else [np.empty(nbytes, np.uint8)]
    for _ in range(count):
        if is_sender:
            memories.append(group.empty(nbytes, np.uint8))
        moved = ([(TARGET, memories[-1])], []) if is_sender else ([], [(SOURCE, memories[-1])])
        operations.append(group.persistent("exchange", *moved))
        if not _is_better(operations[-1]):
            operations[-1].close()
            return None
    return RepeatedMessages(operations, memories)


def _is_better(operation: _Repeatable) -> bool:
    """Return True if a persistent operation is better than ordinary calls; the same at both ends."""
    return operation.has_native_progress
