"""Point-to-point transfers between ranks of one host, through shared memory for long messages.

    sender                                   receiver
    copies the message into its arena
    sends its span, with the label     ─→    compares labels
                                             copies the message from the span
                                       ←─    acknowledges

A span is the place of the message in the sender's arena (`ArenaSpan`); it and the acknowledgement go over TCP. If the
caller's array lies in the arena already (`ProcessGroup.empty`), the sender copies nothing. A long send returns when the
message has been received. Short messages go over TCP and are buffered there; long ones also go over TCP when the
sender's arena is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np

from ferro.collectives.label import transfer_call
from ferro.collectives.posted_transfers import move_all
from ferro.types import Array
from ferro_gloo.shm.arena import PACKED_SPAN, ArenaSpan
from ferro_gloo.shm.bootstrap import LocalHost
from ferro_gloo.shm.kernels import copy_in_blocks, copy_large
from ferro_gloo.tcp.backend import TcpBackend
from ferro_gloo.tcp.posted import PostedTcpTransfers
from ferro_gloo.tcp.posted_batches import Step
from ferro_gloo.tcp.protocol import MAX_BODY

_EMPTY = np.empty(0, np.uint8)
_ACK_TAG = 1 << 34  # a bit above every user's tag, and above those of `TcpBackend` and `bootstrap`
_ACK_LABEL = transfer_call(_EMPTY).label()
_NO_SPAN = ArenaSpan(0, 0)

PeerBuffer = tuple[int, Array]


class ShmTransfers:
    """The transfers of one rank in a group.

    Args:
        tcp: the group over TCP.
        host: this rank's host.
    """

    def __init__(self, tcp: TcpBackend, host: LocalHost) -> None:
        self._tcp = tcp
        self._host = host

    def exchange(self, sends: Sequence[PeerBuffer], recvs: Sequence[PeerBuffer], *, tag: int, deadline: float) -> None:
        """See `Backend.exchange`."""
        messages = [("send", *item) for item in sends] + [("recv", *item) for item in recvs]
        if len(messages) > 1 and any(buffer.nbytes > MAX_BODY for _, _, buffer in messages):
            # The steps of a long message must not wait for the other messages.
            channels: dict[tuple[str, int], list[Array]] = {}
            for direction, peer, buffer in messages:
                channels.setdefault((direction, peer), []).append(buffer)
            move_all(self.posted(), {key: iter(buffers) for key, buffers in channels.items()}, tag, deadline)
            return
        for step in self._steps(sends, recvs, tag):
            self._tcp.move(*step, deadline)

    def posted(self) -> PostedTcpTransfers:
        """See `Backend.posted_transfers`."""
        return self._tcp.posted_transfers(self._steps)

    def _steps(self, sends: Sequence[PeerBuffer], recvs: Sequence[PeerBuffer], tag: int) -> Iterator[Step]:
        """Plan transfers; messages through shared memory come first, messages over TCP follow."""
        shm_sends = [item for item in sends if self._is_through_shm(*item)]
        shm_recvs = [item for item in recvs if self._is_through_shm(*item)]
        tcp_sends = [item for item in sends if not self._is_through_shm(*item)]
        tcp_recvs = [item for item in recvs if not self._is_through_shm(*item)]
        if shm_sends or shm_recvs:
            # `staged` keeps the spans' memory alive until the receivers have acknowledged.
            staged = [self._stage(buffer) for _, buffer in shm_sends]
            offers = [
                (peer, np.frombuffer(PACKED_SPAN.pack(*span), np.uint8))
                for (peer, _), (span, _) in zip(shm_sends, staged, strict=True)
            ]
            received = [(peer, np.empty(PACKED_SPAN.size, np.uint8)) for peer, _ in shm_recvs]
            labels = [transfer_call(buffer).label() for _, buffer in (*shm_sends, *shm_recvs)]
            yield offers, received, labels, tag
            spans = [ArenaSpan(*PACKED_SPAN.unpack(raw.data)) for _, raw in received]
            copied = [self._copy_from(*item, span) for item, span in zip(shm_recvs, spans, strict=True)]
            offered = [span != _NO_SPAN for span, _ in staged]
            acks = [(peer, _EMPTY) for (peer, _), yes in zip(shm_recvs, copied, strict=True) if yes]
            awaited_acks = [(peer, _EMPTY) for (peer, _), yes in zip(shm_sends, offered, strict=True) if yes]
            if acks or awaited_acks:
                yield acks, awaited_acks, repeat(_ACK_LABEL), tag | _ACK_TAG
            tcp_sends += [item for item, yes in zip(shm_sends, offered, strict=True) if not yes]
            tcp_recvs += [item for item, yes in zip(shm_recvs, copied, strict=True) if not yes]
        if tcp_sends or tcp_recvs:
            yield from self._tcp.steps(tcp_sends, tcp_recvs, tag)

    def _is_through_shm(self, peer: int, buffer: Array) -> bool:
        """Return True if a message goes through shared memory; sender and receiver get the same answer."""
        return buffer.nbytes > MAX_BODY and self._host.arenas.is_peer(self._tcp.ranks[peer])

    def _stage(self, buffer: Array) -> tuple[ArenaSpan, Array]:
        """Copy a message into the arena unless it is there already; return no span if the arena is full."""
        arenas, data = self._host.arenas, buffer.view(np.uint8)
        span = arenas.span_of(data)
        if span is not None:
            return span, data
        memory: Array = arenas.allocate(data.size)[: data.size]
        span = arenas.span_of(memory)
        if span is None:
            return _NO_SPAN, memory
        copy_in_blocks(memory, data)
        return span, memory

    def _copy_from(self, peer: int, buffer: Array, span: ArenaSpan) -> bool:
        """Copy a message from a span of the peer's arena; return False if there is no span."""
        if span == _NO_SPAN:
            return False
        data = buffer.view(np.uint8)
        copy_large(data, self._host.arenas.view(self._tcp.ranks[peer], span))
        return True
