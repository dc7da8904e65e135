"""make_exchange: the ranks of a group set up a persistent exchange together.

All ranks tell each other whether shared memory will do for all their messages, and which process they are. Neighbours
then tell each other whether they can read each other's memory, and where the channels of their messages are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.arena import ArenaSpan, address_of
from ferro_gloo.shm.bootstrap import LocalHost, bootstrap_all_gather
from ferro_gloo.shm.counters import pure_python_is_safe
from ferro_gloo.shm.exchange.channels import DIRECT_BYTES, REMOTE_BYTES, ChannelLayout
from ferro_gloo.shm.exchange.exchange import ShmExchange, Waiting
from ferro_gloo.shm.exchange.native_steps import NATIVE_STEPS, Channel, Source, StepsType, read_memory
from ferro_gloo.shm.exchange.plain_steps import PlainSteps
from ferro_gloo.tcp.backend import TcpBackend

Messages: TypeAlias = Sequence[tuple[int, Array]]

_TAG = 1 << 35  # a bit above every user's tag, and above those of `TcpBackend`, `bootstrap` and `transfer`
_TOKEN_BYTES = 16
_ANSWER = struct.Struct(f"<???qQ{_TOKEN_BYTES}s")
_NOWHERE = -1
_PLACE_WORDS = 3  # of each message: where its channel is, and where it is itself, in the arena and in the process
# As in `counters`: being woken from sleep takes longer than most waits.
_NATIVE = Waiting(spins=2000, yields=1000)
_PLAIN = Waiting(spins=300, yields=500)


class _Answer(NamedTuple):
    """What a rank tells all others.

    Attributes:
        able: whether all its messages can go through shared memory.
        native: whether it has the native steps.
        safe: whether it is safe without them.
        process: its number.
        address: where in its memory `token` is.
        token: random bytes, by which others see that they read the right process.
    """

    able: bool
    native: bool
    safe: bool
    process: int
    address: int
    token: bytes


def make_exchange(
    tcp: TcpBackend, host: LocalHost, sends: Messages, recvs: Messages, *, number: int, deadline: float
) -> ShmExchange | None:
    """Set up an exchange; every rank of the group calls it, see `Backend.persistent_exchange`.

    Return None, on all ranks, where a message of one of them cannot go through shared memory.
    """
    return _Setup(tcp, host, sends, recvs, _TAG | number, deadline).make()


class _Setup:
    """One rank's part in setting up an exchange."""

    def __init__(
        self, tcp: TcpBackend, host: LocalHost, sends: Messages, recvs: Messages, tag: int, deadline: float
    ) -> None:
        self._tcp, self._host, self._tag, self._deadline = tcp, host, tag, deadline
        self._arenas, self._memory = host.arenas, host.exchange_memory
        self._sends = [(peer, array.view(np.uint8)) for peer, array in sends]
        self._recvs = [(peer, array.view(np.uint8)) for peer, array in recvs]
        self._peers = [peer for peer, _ in (*sends, *recvs)]
        self._bell = self._memory.bell()
        self._readable: dict[int, int] = {}  # the processes whose memory this rank can read, by peer

    def make(self) -> ShmExchange | None:
        """See `make_exchange`."""
        answers = self._gather_answers()
        native = all(answer.native for answer in answers)
        if not all(answer.able and (native or answer.safe) for answer in answers):
            return None
        readers = self._find_readers() if native else set()
        layouts = [self._layout_of(array, peer in readers) for peer, array in self._sends]
        channels = [sum(layout.nbytes for layout in layouts[:index]) for index in range(len(layouts))]
        area = self._memory.allocate(sum(layout.nbytes for layout in layouts))
        try:
            places = self._exchange_places(area, channels, readers)
            ready = [bool(ok[0]) for ok in self._gather(bytes([self._has_places(places)]))]
        except BaseException:
            self._memory.keep(area, channels)  # another rank may have learnt where it is
            raise
        if not all(ready):
            return None
        bells = {peer: self._view(peer, words[0], self._bell.size) for peer, words in places.items()}
        outgoing = [
            self._outgoing(array, layout, area[at:], bells[peer])
            for (peer, array), layout, at in zip(self._sends, layouts, channels, strict=True)
        ]
        incoming, awaited = self._incoming(places, bells)
        # The receiver of a message that is read in place needs this rank no more when the step has begun.
        carried = {index for index, layout in enumerate(layouts) if not layout.direct}
        carried.update(len(outgoing) + index for index in awaited)
        waiting = _NATIVE if native else _PLAIN
        if not self._host.spin:
            waiting = Waiting(spins=0, yields=waiting.yields)
        make: StepsType = NATIVE_STEPS if native and NATIVE_STEPS is not None else PlainSteps
        return ShmExchange(
            make(self._bell, outgoing, incoming, waiting.spins, waiting.yields),
            self._tcp,
            self._peers,
            carried=carried,
            waiting=waiting,
            memory=self._memory,
            area=area,
            channels=channels,
        )

    def _gather(self, data: bytes) -> list[bytes]:
        return bootstrap_all_gather(self._tcp, data, self._deadline, self._tag)

    def _gather_answers(self) -> list[_Answer]:
        """Gather the answers of all ranks."""
        on_host = all(self._arenas.is_peer(self._tcp.ranks[peer]) for peer in self._peers)
        able = self._tcp.world_size > 1 and on_host and self._arenas.span_of(self._bell) is not None
        native = self._host.native and NATIVE_STEPS is not None
        token = np.frombuffer(os.urandom(_TOKEN_BYTES), np.uint8)
        answer = _Answer(able, native, pure_python_is_safe(), os.getpid(), address_of(token), token.tobytes())
        answers = [_Answer(*_ANSWER.unpack(raw)) for raw in self._gather(_ANSWER.pack(*answer))]
        if all(one.able and one.native for one in answers):
            for peer, _ in self._recvs:
                it = answers[peer]
                if read_memory(it.process, it.address, _TOKEN_BYTES) == it.token:
                    self._readable[peer] = it.process
        self._gather(b"\0")  # `token` is there until all have tried
        return answers

    def _find_readers(self) -> set[int]:
        """Learn which peers can read this rank's memory."""
        told = [(peer, np.array([peer in self._readable], np.uint8)) for peer in dict.fromkeys(self._peers)]
        learnt = [(peer, np.empty(1, np.uint8)) for peer, _ in told]
        self._tcp.exchange(told, learnt, tag=self._tag, deadline=self._deadline)
        return {peer for peer, answer in learnt if answer[0]}

    def _layout_of(self, array: Array, can_be_read: bool) -> ChannelLayout:
        """Choose the layout of a message that this rank sends."""
        in_arena = array.size >= DIRECT_BYTES and self._arenas.span_of(array) is not None
        return ChannelLayout.of(array.size, direct=in_arena or (can_be_read and array.size >= REMOTE_BYTES))

    def _exchange_places(self, area: Array, channels: Sequence[int], readers: set[int]) -> dict[int, list[int]]:
        """Tell each peer where this rank's memory for it is, and learn the same of the peer's.

        Returns:
            By peer: where its bell is in its arena; then, for each message that it sends to this rank, where the
            channel and the message are in its arena, and where the message is in its process; `_NOWHERE` if it is not.
        """
        bell_span, area_span = self._arenas.span_of(self._bell), self._arenas.span_of(area)
        assert bell_span is not None, "the ranks have agreed on shared memory"
        told: dict[int, list[int]] = {peer: [bell_span.offset] for peer in self._peers}
        for (peer, array), channel in zip(self._sends, channels, strict=True):
            span = self._arenas.span_of(array) if array.size >= DIRECT_BYTES else None
            remote = span is None and peer in readers and array.size >= REMOTE_BYTES
            told[peer] += [
                _NOWHERE if area_span is None else area_span.offset + channel,
                _NOWHERE if span is None else span.offset,
                address_of(array) if remote else _NOWHERE,
            ]
        counts = dict.fromkeys(told, 1)
        for peer, _ in self._recvs:
            counts[peer] += _PLACE_WORDS
        got = [(peer, np.empty(count, np.int64)) for peer, count in counts.items()]
        mine = [(peer, np.array(words, np.int64)) for peer, words in told.items()]
        self._tcp.exchange(mine, got, tag=self._tag, deadline=self._deadline)
        return {peer: words.tolist() for peer, words in got}

    @staticmethod
    def _has_places(places: dict[int, list[int]]) -> bool:
        """Return True if every message to this rank has a channel."""
        return all(_NOWHERE not in words[1::_PLACE_WORDS] for words in places.values())

    @staticmethod
    def _outgoing(array: Array, layout: ChannelLayout, memory: Array, bell: Array) -> Channel:
        source = array if layout.direct else None
        return array, memory[: layout.nbytes], bell, layout.block, layout.slots, source

    def _incoming(self, places: dict[int, list[int]], bells: dict[int, Array]) -> tuple[list[Channel], list[int]]:
        """List the channels to this rank, and the indices of those whose senders may have to wait for it."""
        incoming: list[Channel] = []
        awaited: list[int] = []
        following = dict.fromkeys(places, 1)
        for peer, array in self._recvs:
            channel, in_arena, address = places[peer][following[peer] :][:_PLACE_WORDS]
            following[peer] += _PLACE_WORDS
            source: Source | None = None
            if address != _NOWHERE:
                source = self._readable[peer], address
            elif in_arena != _NOWHERE:
                source = self._view(peer, in_arena, array.size)
            layout = ChannelLayout.of(array.size, direct=source is not None)
            memory = self._view(peer, channel, layout.nbytes)
            if layout.needs_receiver(array.size):
                awaited.append(len(incoming))
            incoming.append((array, memory, bells[peer], layout.block, layout.slots, source))
        return incoming, awaited

    def _view(self, peer: int, offset: int, nbytes: int) -> Array:
        """View a peer's memory."""
        return self._arenas.view(self._tcp.ranks[peer], ArenaSpan(offset, nbytes))
