"""Transfers: one pass's messages along one edge, sent and received while the ranks compute.

Each edge has a process group of its own, of two ranks. So no message waits for a message of another edge, even on a
backend that runs a group's operations one after the other on a device stream.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from ferro import CollectiveMismatch, FerroError, Work

from ...nn.arrays import Array
from ...nn.trees import Arrays
from .channel import StageChannel
from .error_translation import translated_errors
from .header import ArrayHeader
from .packed_trees import pack_tree, unpack_tree
from .plan import Edge, PipelineCall
from .repeated_messages import SOURCE, TARGET, RepeatedSend

_NO_MICROBATCH = -1  # stands for the stop message, which has no microbatch


class PassStopped(Exception):
    """The rank at the other end has stopped this pass, because it or a third rank failed."""


class _Sending(Protocol):
    """A message that is being sent."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...


class StageSender:
    """Sends a pass's arrays along one edge, in their order.

    Args:
        edge: the edge to send along.
        channel: this rank's end of it.
        call: the call that this rank executes.
    """

    def __init__(self, edge: Edge, channel: StageChannel, call: PipelineCall) -> None:
        self._edge = edge
        self._channel = channel
        self._call = call
        self._unsent = len(edge.order)
        self._stopped = False
        self._pending: list[tuple[int, _Sending]] = []

    def send(self, microbatch: int, tree: Arrays) -> None:
        """Start to send an array or a tree of arrays, which must not be changed from now on."""
        is_tree = not hasattr(tree, "dtype")
        array = pack_tree(tree) if is_tree else tree
        header = ArrayHeader.of(array, microbatch, is_tree=is_tree)
        self._finish_done()
        fits = self._channel.fits(header)
        self._start(microbatch, self._channel.pack(self._call, header, array))
        if not fits:
            self._start(microbatch, array)
        self._channel.adapt_capacity(header)
        self._unsent -= 1

    def stop(self, *, always: bool = False) -> None:
        """Send one stop message if the receiver expects more arrays, or if `always`."""
        if (self._unsent or always) and not self._stopped:
            self._stopped = True
            self._finish_done()
            self._start(_NO_MICROBATCH, self._channel.pack(self._call, None, None))

    def finish(self) -> None:
        """Wait until all messages have been sent; raise the error of a send that failed."""
        while self._pending:
            self._finish(self._pending[0])

    def _start(self, microbatch: int, message: Array | RepeatedSend) -> None:
        with translated_errors(self._edge, self._channel, microbatch):
            if isinstance(message, RepeatedSend):
                message.start()
                self._pending.append((microbatch, message))
            else:
                work = self._channel.group.send(message, TARGET, async_op=True, copy=False)
                self._pending.append((microbatch, work))

    def _finish_done(self) -> None:
        for sent in [sent for sent in self._pending if sent[1].done()]:
            self._finish(sent)

    def _finish(self, sent: tuple[int, _Sending]) -> None:
        self._pending.remove(sent)
        microbatch, sending = sent
        with translated_errors(self._edge, self._channel, microbatch):
            sending.wait()


class StageReceiver:
    """Receives a pass's arrays along one edge, up to the last one that `start` has asked for.

    The next message is received while the rank computes. An array that follows its header as a message of its own (see
    `channel`) is received when it is needed: its size is known only then.

    Args:
        edge: the edge to receive along.
        channel: this rank's end of it.
        call: the call that this rank executes.

    Attributes:
        other_call: the sender's call, once a message has shown that it differs; else None.
    """

    def __init__(self, edge: Edge, channel: StageChannel, call: PipelineCall) -> None:
        self.other_call: PipelineCall | None = None
        self._edge = edge
        self._channel = channel
        self._call = call
        self._index = {microbatch: index for index, microbatch in enumerate(edge.order)}
        self._total = len(edge.order)
        self._wanted = 0
        self._received = 0
        self._pending: Work[Array] | None = None
        self._arrived: dict[int, Arrays] = {}
        self._ended = False

    def start(self, microbatch: int) -> None:
        """Start to receive this microbatch's array, after those sent before it."""
        self._wanted = max(self._wanted, self._index[microbatch] + 1)
        with translated_errors(self._edge, self._channel, microbatch):
            self._start_next()

    def recv(self, microbatch: int) -> Arrays:
        """Wait for this microbatch's array or tree and return it; call it once for each microbatch.

        Raises:
            PassStopped: the sender has stopped.
            CollectiveMismatch: the sender executes another call.
            FerroError: the transfer failed.
        """
        self.start(microbatch)
        while microbatch not in self._arrived:
            with translated_errors(self._edge, self._channel, microbatch):
                self._accept(self._finish_next())
                self._start_next()
        return self._arrived.pop(microbatch)

    def drain(self) -> None:
        """Receive all messages that are still sent, so that none is left for a later pass."""
        with suppress(FerroError):
            while self._received < self._total and not self._ended:
                self._wanted = self._total
                self._start_next()
                self._finish_next()

    def _start_next(self) -> None:
        """Start to receive the next message, if it is wanted and not pending; a repeated one comes by itself."""
        if self._pending is None and self._received < self._wanted and not self._channel.next_is_repeated:
            # The receive is always asynchronous, which tells backends that the caller's thread computes.
            self._pending = self._channel.group.recv(self._channel.empty(), SOURCE, async_op=True)

    def _finish_next(self) -> tuple[int, Arrays] | None:
        """Wait for the next message; return its microbatch and array or tree, or None for a stop message."""
        try:
            if self._channel.repeated is not None and self._channel.next_is_repeated:
                message = self._channel.repeated.receive()
            else:
                assert self._pending is not None, "a receive is started before it is awaited"
                message = self._pending.wait()
            call, header, array = self._channel.unpack(message)
            if call != self._call:
                self.other_call, self._total = call, call.microbatches
            if header is None:
                self._ended = True
                return None
            if array is None:
                work = self._channel.group.recv(header.empty(), SOURCE, async_op=True)
                array = work.wait()
        except BaseException:
            self._ended = True
            raise
        self._channel.adapt_capacity(header)
        self._received += 1
        self._pending = None
        return header.microbatch, unpack_tree(array) if header.is_tree else array

    def _accept(self, message: tuple[int, Arrays] | None) -> None:
        """Keep an array for `recv`, if it belongs to this pass."""
        edge = self._edge
        if self.other_call is not None:
            raise self._mismatch(f"rank {edge.source} called {self.other_call}, rank {edge.target} {self._call}")
        if message is None:
            raise PassStopped(f"rank {edge.source} has stopped")
        microbatch, array = message
        expected = edge.order[self._received - 1]
        if microbatch != expected:
            raise self._mismatch(
                f"rank {edge.source} sent microbatch {microbatch} where the {edge} were to go on with {expected}"
            )
        self._arrived[microbatch] = array

    def _mismatch(self, difference: str) -> CollectiveMismatch:
        return CollectiveMismatch(
            f"Pipeline on group {self._channel.pipeline!r}: {difference}. Call step and forward in "
            "the same order, with the same number of microbatches, on every rank.",
            op=self._call.op,
            group=self._channel.pipeline,
            rank=self._edge.target,
            peer=self._edge.source,
        )
