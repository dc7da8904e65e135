"""Matching: the receives posted on a connection, and the frames that came before their receive was posted.

Messages with one tag match receives in the order in which both were made. A frame without a posted receive (an
unexpected message in MPI's terms) is kept: with its body, or without where the sender only offers it; see `connection`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ferro.collectives.label import collective_tag, context_of, in_context
from ferro_gloo.tcp.protocol import EngineError, LabelMismatchError, LengthMismatchError


class TransferBatch:
    """Transfers that one thread waits for together.

    Attributes:
        context: the number of their group.
        remaining: how many transfers have not ended.
        error: the first error, or None.
    """

    __slots__ = ("context", "error", "remaining")

    def __init__(self, context: int, remaining: int) -> None:
        self.context = context
        self.remaining = remaining
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Keep the first error."""
        if self.error is None:
            self.error = error

    @property
    def ended(self) -> bool:
        """True when no transfer remains or one has failed."""
        return self.remaining == 0 or self.error is not None


@dataclass(slots=True)
class PostedReceive:
    """Memory posted for the next frame with a tag."""

    body: memoryview
    label: bytes
    batch: TransferBatch

    def check(self, peer: int, label: bytes, nbytes: int) -> EngineError | None:
        """Make the error for a frame of `peer` that does not fit; None if it fits."""
        if label != self.label:
            return LabelMismatchError(peer, self.label, label)
        if nbytes != self.body.nbytes:
            return LengthMismatchError(peer, self.body.nbytes, nbytes)
        return None


@dataclass(slots=True)
class IncomingFrame:
    """A frame whose header has been read.

    Attributes:
        tag: its tag.
        label: its label.
        nbytes: the size of its body.
        body: the memory that its body goes to; empty for an offer.
        remaining: how many bytes of the body are still to come.
        receive: the receive that the body is for; None while there is none.
        unexpected: True if the body goes to memory of its own, and not to the receive's.
        offer: the number of the offer, -1 if the frame came with its body.
        following: the next unexpected frame with this tag.
    """

    tag: int
    label: bytes
    nbytes: int
    body: memoryview
    remaining: int
    receive: PostedReceive | None
    unexpected: bool = False
    offer: int = -1
    following: IncomingFrame | None = None


class _FrameQueue:
    """Unexpected frames with one tag: a linked list, since a deque takes more memory than a frame."""

    __slots__ = ("first", "last")

    def __init__(self, frame: IncomingFrame) -> None:
        self.first = self.last = frame

    def __iter__(self) -> Iterator[IncomingFrame]:
        frame: IncomingFrame | None = self.first
        while frame is not None:
            yield frame
            frame = frame.following


class ReceiveMatcher:
    """Matches the frames of one connection with receives, in either order."""

    def __init__(self) -> None:
        self._posted: dict[int, deque[PostedReceive]] = {}
        self._unexpected: dict[int, _FrameQueue] = {}

    def post(self, tag: int, receive: PostedReceive) -> None:
        """Post memory for the next frame with this tag; no unexpected frame has the tag."""
        self._posted.setdefault(tag, deque()).append(receive)

    def pop_posted(self, tag: int) -> PostedReceive | None:
        """Take the first receive posted for this tag."""
        receives = self._posted.get(tag)
        if not receives:
            return None
        receive = receives.popleft()
        if not receives:
            del self._posted[tag]
        return receive

    def keep(self, frame: IncomingFrame) -> None:
        """Keep an unexpected frame until its receive is posted."""
        queue = self._unexpected.get(frame.tag)
        if queue is None:
            self._unexpected[frame.tag] = _FrameQueue(frame)
        else:
            queue.last.following = queue.last = frame

    def pop_unexpected(self, tag: int) -> IncomingFrame | None:
        """Take the first unexpected frame with this tag."""
        queue = self._unexpected.get(tag)
        if queue is None:
            return None
        frame = queue.first
        if frame.following is None:
            del self._unexpected[tag]
        else:
            queue.first, frame.following = frame.following, None
        return frame

    def unexpected_label(self, tag: int) -> bytes | None:
        """Return the label of the first unexpected frame with this tag, or None."""
        queue = self._unexpected.get(tag)
        return None if queue is None else queue.first.label

    def unexpected(self) -> Iterator[IncomingFrame]:
        """Iterate over all unexpected frames."""
        for queue in self._unexpected.values():
            yield from queue

    def tags(self) -> list[int]:
        """Return the tags of all posted receives and unexpected frames."""
        return [*self._posted, *self._unexpected]

    def tags_before(self, tag: int) -> list[int]:
        """Return the tags of unexpected frames that belong to earlier collectives of the tag's group."""
        if not self._unexpected:
            return []
        first = in_context(collective_tag(0), context_of(tag))
        return [old for old in self._unexpected if first <= old < tag]

    def drop(self, tag: int) -> Iterator[IncomingFrame]:
        """Drop the posted receives and unexpected frames with this tag; return the frames."""
        self._posted.pop(tag, None)
        queue = self._unexpected.pop(tag, None)
        return iter(()) if queue is None else iter(queue)

    def fail_all(self, error: Exception) -> None:
        """Fail all posted receives."""
        for receives in self._posted.values():
            for receive in receives:
                receive.batch.fail(error)
        self._posted.clear()
