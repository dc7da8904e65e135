"""ExchangedMessages: what one rank sends to many others, and receives from them, at the same time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ferro.arrays import Input
from ferro.errors import UsageError
from ferro.group.arguments import ArgumentChecker, NamedDtypeBuffer, OutputBuffer, Reads, copy_elements
from ferro.types import Array, Device


class ExchangedMessages:
    """The messages of an exchange: their flat memory, and those of a rank to itself.

    Attributes:
        sends: ranks and flat messages to them.
        recvs: ranks and flat buffers of messages from them.
        tag: of all messages.
        device: of all arrays.
        are_plain: True if the backend moves all that is to be moved, so that `refill` and `finish` do nothing.
    """

    def __init__(
        self,
        checker: ArgumentChecker,
        sends: Sequence[tuple[int, Input]],
        recvs: Sequence[tuple[int, Input]],
        tag: int,
        reads: Reads,
    ) -> None:
        self.tag = tag
        devices: set[Device] = set()
        self._sources: list[tuple[Array, Array]] = []
        self.sends: list[tuple[int, Array]] = []
        self.recvs: list[tuple[int, Array]] = []
        own: list[Array] = []
        own_results = []
        buffers: list[Array] = []
        self._results: list[OutputBuffer | NamedDtypeBuffer] = []
        for peer, x in _pairs(sends, "sends"):
            self._check(checker, peer, tag)
            flat, device = self._message(checker, x, reads)
            devices.add(device)
            if peer == checker.rank:
                own.append(flat)
            else:
                self.sends.append((int(peer), flat))
        for peer, buffer in _pairs(recvs, "recvs"):
            self._check(checker, peer, tag)
            result = checker.check_buffer(buffer)
            devices.add(result.device)
            if peer == checker.rank:
                own_results.append(result)
            else:
                self.recvs.append((int(peer), result.flat))
            buffers.append(result.flat)
            if type(buffer) is not np.ndarray or isinstance(result, NamedDtypeBuffer):
                self._results.append(result)
        self.device = devices.pop() if devices else Device.CPU
        if devices:
            raise UsageError("exchange: the arrays are on two devices: give them all on one", op="exchange")
        described = [[(flat.size, flat.dtype) for flat in flats] for flats in (own, [r.flat for r in own_results])]
        if described[0] != described[1]:
            raise UsageError(
                f"exchange: rank {checker.rank} sends itself {described[0]} and receives {described[1]}", op="exchange"
            )
        sent = [*own, *(flat for _, flat in self.sends)]
        if any(np.may_share_memory(flat, buffer) for flat in sent for buffer in buffers if type(flat) is np.ndarray):
            raise UsageError("exchange: a message shares memory with a buffer: give them apart", op="exchange")
        self._own = [(flat, result.flat) for flat, result in zip(own, own_results, strict=True)]
        self.are_plain = not (self._sources or self._own or self._results)

    def refill(self) -> None:
        """Read the inputs that are not contiguous again."""
        for array, flat in self._sources:
            copy_elements(array, flat)

    def finish(self) -> None:
        """Move this rank's messages to itself, and complete what was received."""
        for flat, buffer in self._own:
            buffer[...] = flat
        for result in self._results:
            result()

    def _message(self, checker: ArgumentChecker, x: Input, reads: Reads) -> tuple[Array, Device]:
        """Prepare the flat memory of a message."""
        flat, device = checker.check_message(x, copy=reads is Reads.COPY)
        if reads is Reads.AT_RUN and not (isinstance(x, np.ndarray) and np.shares_memory(x, flat)):
            if not isinstance(x, np.ndarray) or flat.dtype != x.dtype:
                raise UsageError(
                    f"persistent exchange: a {type(x).__name__} cannot be read again: pass NumPy arrays of numbers",
                    op="exchange",
                )
            self._sources.append((x, flat.reshape(x.shape)))
        return flat, device

    @staticmethod
    def _check(checker: ArgumentChecker, peer: int, tag: int) -> None:
        if peer == checker.rank:
            checker.check_tag(tag)
        else:
            checker.check_peer(peer, "exchange with", tag)


def _pairs(messages: Sequence[tuple[int, Input]], what: str) -> list[tuple[int, Input]]:
    try:
        return [(peer, x) for peer, x in messages]
    except (TypeError, ValueError):
        raise UsageError(f"exchange: {what} must be a list of pairs (rank, array), not {messages!r}") from None
