"""TcpBackend: collectives on NumPy arrays over a mesh of TCP connections.

The collectives themselves are core's schedules; this moves their segments. Every frame carries
the call's label, so a mismatch is found where it happens and costs no message of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np

from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.collectives.label import Call, in_context, is_collective, mismatch, transfer_call
from ferro.errors import CollectiveMismatch, FerroError, GroupClosed, PeerLost
from ferro.hookspecs import BackendConfig
from ferro.types import Array
from ferro_gloo.tcp.connection import DiffersError, EngineError, LengthError, LostError
from ferro_gloo.tcp.engine import Engine
from ferro_gloo.tcp.frame import DATA, MAX_BODY, pack
from ferro_gloo.tcp.mesh import connect_mesh

_NOTHING = np.empty(0, np.uint8)
_READY = 1 << 32  # above every user's tag: the receiver of a long transfer is ready for the rest
_READY_LABEL = transfer_call(_NOTHING).label()


class TcpBackend(Backend):
    """One rank of a group over the mesh.

    Args:
        engine: drives the connections of this rank to all others of the world.
        ranks: the members' ranks in the world.
        rank: this one's in the group.
        choice: which algorithm serves which call.
        context: the group's number; 0 for the world.
        names: what errors call the members: their ranks in the group that the user knows, of
            which this one is a part; None when it is that group.

    Attributes:
        ranks: the members' ranks in the world.
        names: what errors call the members.
    """

    labels_frames = True

    def __init__(
        self,
        engine: Engine,
        ranks: Sequence[int],
        rank: int,
        choice: Choice | None = None,
        context: int = 0,
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self.ranks = tuple(ranks)
        self._engine = engine
        self.names = tuple(names or range(len(ranks)))
        self._name = dict(zip(ranks, self.names, strict=True))
        self._context = context
        self._label = b""

    @classmethod
    def connect(cls, config: BackendConfig) -> TcpBackend:
        """Connect to all other ranks; every rank does."""
        engine = Engine(connect_mesh(config) if config.world_size > 1 else {})
        return cls(engine, range(config.world_size), config.rank, config.choice)

    def part(self, members: Sequence[int]) -> TcpBackend:
        """Return some of this group's ranks, of which this is one, as a group of its own.

        It stays a part of this one: it shares its calls, so no two parts that have two ranks in
        common may be used at the same time, and aborting one aborts all.
        """
        return TcpBackend(
            self._engine,
            [self.ranks[member] for member in members],
            tuple(members).index(self.rank),
            self.choice,
            self._context,
            [self.names[member] for member in members],
        )

    def look(self, peers: Iterable[int]) -> None:
        """Raise what would end a wait for these ranks: the group's abort, or the loss of one.

        For a wait that is not one on the connections. Returns at once.
        """
        try:
            self._engine.look(self._context, [self.ranks[peer] for peer in peers])
        except EngineError as error:
            raise self._explain(error) from error

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """See `Backend.exchange`; one thread moves all of it, in both directions.

        Of a transfer longer than a frame only the first one travels before its receive is posted;
        then the receiver says that it is ready, and the rest follows.
        """
        if is_collective(tag):
            self.move(sends, recvs, repeat(self._label), tag, deadline)
            return
        labels = [transfer_call(buffer).label() for _, buffer in (*sends, *recvs)]
        first = slice(None, MAX_BODY)
        self.move(_cut(sends, first), _cut(recvs, first), labels, tag, deadline)
        long_sends = [item for item in sends if item[1].nbytes > MAX_BODY]
        long_recvs = [item for item in recvs if item[1].nbytes > MAX_BODY]
        if long_sends or long_recvs:
            ready = [(peer, _NOTHING) for peer, _ in long_recvs]
            awaited = [(peer, _NOTHING) for peer, _ in long_sends]
            label = repeat(_READY_LABEL)
            self.move(ready, awaited, label, tag | _READY, deadline)
            rest = slice(MAX_BODY, None)
            self.move(_cut(long_sends, rest), _cut(long_recvs, rest), label, tag, deadline)

    def move(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        labels: Iterable[bytes],
        tag: int,
        deadline: float,
    ) -> None:
        """Exchange buffers as frames, all at once.

        Args:
            sends: (peer, buffer) of each that goes out.
            recvs: (peer, buffer) of each that comes in, of the size that is sent.
            labels: those of the sends, then those of the receives.
            tag: the tag of all of them.
            deadline: absolute `time.monotonic()` second.
        """
        tag = in_context(tag, self._context)
        outgoing, incoming = [], []
        headers: dict[tuple[int, bytes], bytes] = {}
        label_of_next = iter(labels)
        for peer, buffer in sends:
            label = next(label_of_next)
            for body in _pieces(buffer):
                key = (body.nbytes, label)
                header = headers.get(key)
                if header is None:
                    header = headers[key] = pack(body.nbytes, DATA, tag, label)
                outgoing.append((self.ranks[peer], header, body))
        for peer, buffer in recvs:
            label = next(label_of_next)
            incoming += [(self.ranks[peer], label, body) for body in _pieces(buffer)]
        try:
            self._engine.exchange(outgoing, incoming, tag, deadline)
        except EngineError as error:
            raise self._explain(error) from error

    def begin(self, call: Call) -> None:
        """Begin a collective: from now on frames must carry this call's label."""
        self.call = call
        self._label = call.label()
        try:
            self._engine.activate(in_context(self.tag, self._context), self._label)
        except EngineError as error:
            raise self._explain(error) from error

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`."""
        self.begin(call)
        super().agree(call, deadline=deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> TcpBackend:
        """Return a group over the same connections; its frames carry its own number."""
        members = [self.ranks[rank] for rank in ranks]
        index = tuple(ranks).index(self.rank)
        return TcpBackend(self._engine, members, index, self.choice, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the survivors' group: connections between the living outlast a group."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's transfers on all its ranks; other groups go on."""
        others = [rank for index, rank in enumerate(self.ranks) if index != self.rank]
        self._engine.abort(self._context, others)

    def close(self) -> None:
        """Close the connections; of a subgroup, which owns none, nothing."""
        if self._context == 0:
            self._engine.close()

    def _explain(self, error: Exception) -> FerroError:
        """Return ferro's error for one of the engine's, with ranks of this group."""
        if isinstance(error, LostError):
            return PeerLost(str(error), peer=self._name[error.peer])
        if isinstance(error, DiffersError):
            mine = Call.from_label(error.expected)
            return mismatch(self.names[self.rank], mine, self._name[error.peer], error.got)
        if isinstance(error, LengthError):
            peer = self._name[error.peer]
            text = f"rank {self.names[self.rank]} called {self.call}, rank {peer} too, but {error}"
            return CollectiveMismatch(text, peer=peer)
        return GroupClosed(str(error))


def _cut(items: Sequence[tuple[int, Array]], part: slice) -> list[tuple[int, Array]]:
    """Return part of every buffer's bytes."""
    return [(peer, buffer.view(np.uint8)[part]) for peer, buffer in items]


def _pieces(buffer: Array) -> list[memoryview]:
    """Return the bytes of a buffer in pieces that fit a frame; one piece even when empty."""
    if buffer.nbytes == 0:
        return [memoryview(bytearray())]
    whole = buffer.view(np.uint8).data
    if whole.nbytes <= MAX_BODY:
        return [whole]
    return [whole[start : start + MAX_BODY] for start in range(0, whole.nbytes, MAX_BODY)]
