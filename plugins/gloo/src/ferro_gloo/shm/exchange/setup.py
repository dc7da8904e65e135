"""make_exchange: the ranks of a group set up a persistent exchange together."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ferro.types import Array
from ferro_gloo.shm.arena import ArenaSpan, HostArenas
from ferro_gloo.shm.bootstrap import LocalHost, bootstrap_all_gather
from ferro_gloo.shm.counters import pure_python_is_safe
from ferro_gloo.shm.exchange.channels import DIRECT_BYTES, ChannelLayout
from ferro_gloo.shm.exchange.exchange import ShmExchange, Waiting
from ferro_gloo.shm.exchange.native_steps import NATIVE_STEPS, Channel, StepsType
from ferro_gloo.shm.exchange.plain_steps import PlainSteps
from ferro_gloo.tcp.backend import TcpBackend

Messages: TypeAlias = Sequence[tuple[int, Array]]

_TAG = 1 << 35  # a bit above every user's tag, and above those of `TcpBackend`, `bootstrap` and `transfer`
# A rank's answer: whether all its messages can go through shared memory, whether it has the native steps, and whether
# it is safe without them.
_ANSWER = struct.Struct("<???")
_NOWHERE = -1
# As in `counters`: Being woken from sleep takes longer than most waits.
_NATIVE = Waiting(spins=2000, yields=1000)
_PLAIN = Waiting(spins=300, yields=500)


def make_exchange(
    tcp: TcpBackend, host: LocalHost, sends: Messages, recvs: Messages, *, number: int, deadline: float
) -> ShmExchange | None:
    """Set up an exchange; every rank of the group calls it, see `Backend.persistent_exchange`.

    Return None, on all ranks, where a message of one of them cannot go through shared memory.
    """
    arenas, memory = host.arenas, host.exchange_memory
    sent = [_Sent(arenas, array.view(np.uint8)) for _, array in sends]
    bell = memory.bell()
    area = memory.allocate(sum(one.layout.nbytes for one in sent))
    offsets = [sum(one.layout.nbytes for one in sent[:index]) for index in range(len(sent))]
    peers = [peer for peer, _ in (*sends, *recvs)]
    able = (
        tcp.world_size > 1
        and arenas.span_of(bell) is not None
        and (arenas.span_of(area) is not None or not sent)
        and all(arenas.is_peer(tcp.ranks[peer]) for peer in peers)
    )
    tag = _TAG | number
    answer = _ANSWER.pack(able, host.native and NATIVE_STEPS is not None, pure_python_is_safe())
    answers = [_ANSWER.unpack(raw) for raw in bootstrap_all_gather(tcp, answer, deadline, tag)]
    all_able, native, safe = (all(column) for column in zip(*answers, strict=True))
    if not all_able or not (native or safe):
        return None
    try:
        places = _exchange_places(tcp, arenas, sends, recvs, sent, bell, area, offsets, tag, deadline)
    except BaseException:
        memory.keep(area, offsets)  # another rank may have learnt where it is
        raise
    bells = {peer: _view(arenas, tcp, peer, words[0], bell.size) for peer, words in places.items()}
    outgoing = [
        one.channel(area[offset : offset + one.layout.nbytes], bells[peer])
        for one, offset, (peer, _) in zip(sent, offsets, sends, strict=True)
    ]
    following = {peer: 1 for peer in places}
    incoming, needs_peers = [], any(one.layout.direct for one in sent)
    for peer, array in recvs:
        at, source_at = places[peer][following[peer] :][:2]
        following[peer] += 2
        message = array.view(np.uint8)
        layout = ChannelLayout.of(message.size, direct=source_at != _NOWHERE)
        source = _view(arenas, tcp, peer, source_at, message.size) if layout.direct else None
        channel = _view(arenas, tcp, peer, at, layout.nbytes)
        incoming.append((message, channel, bells[peer], layout.block, layout.slots, source))
        needs_peers |= layout.needs_receiver(message.size)
    waiting = _NATIVE if native else _PLAIN
    if not host.spin:
        waiting = Waiting(spins=0, yields=waiting.yields)
    make: StepsType = NATIVE_STEPS if native and NATIVE_STEPS is not None else PlainSteps
    return ShmExchange(
        make(bell, outgoing, incoming, waiting.spins, waiting.yields),
        tcp,
        peers,
        len(sends),
        needs_peers=needs_peers,
        waiting=waiting,
        memory=memory,
        area=area,
        channels=offsets,
    )


class _Sent:
    """A message that this rank sends."""

    def __init__(self, arenas: HostArenas, message: Array) -> None:
        self._message = message
        span = arenas.span_of(message) if message.size >= DIRECT_BYTES else None
        self.source_at = _NOWHERE if span is None else span.offset
        self.layout = ChannelLayout.of(message.size, direct=span is not None)

    def channel(self, memory: Array, bell: Array) -> Channel:
        source = self._message if self.layout.direct else None
        return self._message, memory, bell, self.layout.block, self.layout.slots, source


def _exchange_places(
    tcp: TcpBackend,
    arenas: HostArenas,
    sends: Messages,
    recvs: Messages,
    sent: Sequence[_Sent],
    bell: Array,
    area: Array,
    offsets: Sequence[int],
    tag: int,
    deadline: float,
) -> dict[int, list[int]]:
    """Tell each peer where this rank's memory for it is, and learn the same of the peer's.

    Returns:
        By peer the offsets in its arena: of its bell; then, for each message that it sends to this rank, of the channel
        and of the message itself, or `_NOWHERE`.
    """
    bell_span, area_span = arenas.span_of(bell), arenas.span_of(area)
    assert bell_span is not None, "the ranks have agreed on shared memory"
    told: dict[int, list[int]] = {peer: [bell_span.offset] for peer, _ in (*sends, *recvs)}
    for (peer, _), one, offset in zip(sends, sent, offsets, strict=True):
        assert area_span is not None, "the ranks have agreed on shared memory"
        told[peer] += [area_span.offset + offset, one.source_at]
    counts = dict.fromkeys(told, 1)
    for peer, _ in recvs:
        counts[peer] += 2
    got = {peer: np.empty(count, np.int64) for peer, count in counts.items()}
    mine = [(peer, np.array(words, np.int64)) for peer, words in told.items()]
    tcp.exchange(mine, list(got.items()), tag=tag, deadline=deadline)
    return {peer: words.tolist() for peer, words in got.items()}


def _view(arenas: HostArenas, tcp: TcpBackend, peer: int, offset: int, nbytes: int) -> Array:
    """View a peer's memory."""
    return arenas.view(tcp.ranks[peer], ArenaSpan(offset, nbytes))
