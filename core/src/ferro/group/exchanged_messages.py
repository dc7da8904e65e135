"""ExchangedMessages: what one rank sends to many others, and receives from them, at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ferro.arrays import Input
from ferro.errors import UsageError
from ferro.group.arguments import Reads, copy_elements
from ferro.types import Array, Device

if TYPE_CHECKING:
    from ferro.group.transfer_methods import TransferMethods


class ExchangedMessages:
    """The messages of an exchange: their flat memory, and those of a rank to itself.

    Attributes:
        sends: ranks and flat messages to them.
        recvs: ranks and flat buffers of messages from them.
        tag: of all messages.
        device: of all arrays.
    """

    def __init__(
        self,
        group: TransferMethods,
        sends: Sequence[tuple[int, Input]],
        recvs: Sequence[tuple[int, Input]],
        tag: int,
        reads: Reads,
    ) -> None:
        group._dispatcher.check_open("exchange")
        self.tag = tag
        self.device = Device.CPU
        self._sources: list[tuple[Array, Array]] = []
        self.sends: list[tuple[int, Array]] = []
        self.recvs: list[tuple[int, Array]] = []
        own: list[Array] = []
        own_results = []
        self._results = []
        for peer, x in _pairs(sends, "sends"):
            self._check(group, peer, tag)
            flat, self.device = self._message(group, x, reads)
            if peer == group.rank:
                own.append(flat)
            else:
                self.sends.append((int(peer), flat))
        for peer, buffer in _pairs(recvs, "recvs"):
            self._check(group, peer, tag)
            result = group._output(buffer)
            self.device = result.device
            if peer == group.rank:
                own_results.append(result)
            else:
                self.recvs.append((int(peer), result.flat))
            self._results.append(result)
        described = [[(flat.size, flat.dtype) for flat in flats] for flats in (own, [r.flat for r in own_results])]
        if described[0] != described[1]:
            raise UsageError(
                f"exchange: rank {group.rank} sends itself {described[0]} and receives {described[1]}", op="exchange"
            )
        received = [result.flat for result in self._results]
        sent = [*own, *(flat for _, flat in self.sends)]
        if any(np.may_share_memory(flat, buffer) for flat in sent for buffer in received if type(flat) is np.ndarray):
            raise UsageError(
                "exchange: a message shares memory with a buffer that receives: give them apart", op="exchange"
            )
        self._own = [(flat, result.flat) for flat, result in zip(own, own_results, strict=True)]

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

    def _message(self, group: TransferMethods, x: Input, reads: Reads) -> tuple[Array, Device]:
        """Prepare the flat memory of a message."""
        flat, device = group._message(x, copy=reads is Reads.COPY)
        if reads is Reads.AT_RUN and not (isinstance(x, np.ndarray) and np.shares_memory(x, flat)):
            if not isinstance(x, np.ndarray) or flat.dtype != x.dtype:
                raise UsageError(
                    f"persistent exchange: a {type(x).__name__} cannot be read again: pass NumPy arrays of numbers",
                    op="exchange",
                )
            self._sources.append((x, flat.reshape(x.shape)))
        return flat, device

    @staticmethod
    def _check(group: TransferMethods, peer: int, tag: int) -> None:
        if peer == group.rank:
            group._check_tag(tag)
        else:
            group._check_peer(peer, "exchange with", tag)


def _pairs(messages: Sequence[tuple[int, Input]], what: str) -> list[tuple[int, Input]]:
    try:
        return [(peer, x) for peer, x in messages]
    except (TypeError, ValueError):
        raise UsageError(f"exchange: {what} must be a list of pairs (rank, array), not {messages!r}") from None
