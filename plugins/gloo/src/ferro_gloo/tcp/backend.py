"""TcpBackend: collectives on NumPy arrays over a mesh of TCP connections.

Core's schedules plan the messages of a collective, and this backend moves them. Every frame carries
the call's label, so the receiver finds a mismatch without a message of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import numpy as np

from ferro.backend import Backend
from ferro.collectives import Choice
from ferro.collectives.label import Call, in_context, is_collective, mismatch, transfer_call
from ferro.errors import CollectiveMismatch, FerroError, GroupClosed, PeerLost, with_awaited
from ferro.hookspecs import BackendConfig
from ferro.types import Array
from ferro_gloo.tcp.engine import KEPT_LIMIT_BYTES, ProgressEngine
from ferro_gloo.tcp.mesh import connect_mesh
from ferro_gloo.tcp.posted import PostedTcpTransfers
from ferro_gloo.tcp.posted_batches import Plan, PostedBatch, Step
from ferro_gloo.tcp.protocol import (
    DATA,
    MAX_BODY,
    ConnectionLostError,
    DeadlinePassedError,
    EngineError,
    LabelMismatchError,
    LengthMismatchError,
    pack,
)

_EMPTY = np.empty(0, np.uint8)
# A bit above every user's tag, for the "clear to send" messages of long transfers.
_CLEAR_TO_SEND_TAG = 1 << 32
_CLEAR_TO_SEND_LABEL = transfer_call(_EMPTY).label()


class TcpBackend(Backend):
    """One rank of a group over the mesh.

    Args:
        engine: drives the connections of this rank to all others of the world.
        ranks: the ranks of the members in the world.
        rank: this rank in the group.
        choice: the algorithm for each call.
        context: the group's number; 0 for the world.
        names: by a rank in the world the one by which errors name it. A `subset` has those of all members of the group
            that the user knows, as it may find any member's mismatch. None where this is that group.

    Attributes:
        ranks: see above.
        names: the ranks by which errors name the members.
    """

    labels_frames = True

    def __init__(
        self,
        engine: ProgressEngine,
        ranks: Sequence[int],
        rank: int,
        choice: Choice | None = None,
        context: int = 0,
        names: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self.ranks = tuple(ranks)
        self._engine = engine
        self._name_of = names or {rank: member for member, rank in enumerate(ranks)}
        self.names = tuple(self._name_of[rank] for rank in ranks)
        self._context = context
        self._label = b""

    @classmethod
    def connect(cls, config: BackendConfig) -> TcpBackend:
        """Connect to all other ranks; every rank calls it."""
        engine = ProgressEngine(connect_mesh(config) if config.world_size > 1 else {})
        return cls(engine, range(config.world_size), config.rank, config.choice)

    def subset(self, members: Sequence[int]) -> TcpBackend:
        """Make a group of some of this group's ranks, of which this rank is one.

        The subset uses this group's tags, so two subsets with two ranks in common must not be
        used at the same time, and aborting one aborts all.
        """
        return TcpBackend(
            self._engine,
            [self.ranks[member] for member in members],
            tuple(members).index(self.rank),
            self.choice,
            self._context,
            self._name_of,
        )

    def check_peers(self, peers: Iterable[int]) -> None:
        """Raise if the group was aborted or one of these ranks was lost; never wait.

        A rank that waits on shared memory calls it repeatedly.
        """
        try:
            self._engine.check(self._context, [self.ranks[peer] for peer in peers])
        except EngineError as error:
            raise self._translate(error) from error

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`; one thread moves all of it, in both directions."""
        if is_collective(tag):
            self.move(sends, recvs, repeat(self._label), tag, deadline)
            return
        for step in self.steps(sends, recvs, tag):
            self.move(*step, deadline)

    def steps(self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], tag: int) -> Iterator[Step]:
        """Plan a user's transfers: what `move` moves, step after step.

        The first frame of a long transfer is sent eagerly. The others wait until the receiver,
        having posted its memory, has sent "clear to send".
        """
        labels = [transfer_call(buffer).label() for _, buffer in (*sends, *recvs)]
        first = slice(None, MAX_BODY)
        yield _slice_each(sends, first), _slice_each(recvs, first), labels, tag
        long_sends = [item for item in sends if item[1].nbytes > MAX_BODY]
        long_recvs = [item for item in recvs if item[1].nbytes > MAX_BODY]
        if long_sends or long_recvs:
            ready = [(peer, _EMPTY) for peer, _ in long_recvs]
            awaited = [(peer, _EMPTY) for peer, _ in long_sends]
            label = repeat(_CLEAR_TO_SEND_LABEL)
            yield ready, awaited, label, tag | _CLEAR_TO_SEND_TAG
            rest = slice(MAX_BODY, None)
            yield _slice_each(long_sends, rest), _slice_each(long_recvs, rest), label, tag

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
            sends: (peer, buffer) of each send.
            recvs: (peer, buffer) of each receive; the buffer has the size of the sent one.
            labels: the labels of the sends, then of the receives.
            tag: the tag of all of them.
            deadline: absolute `time.monotonic()` second.
        """
        try:
            self._engine.exchange(*self._frames(sends, recvs, labels, tag), deadline)
        except EngineError as error:
            raise with_awaited(self._translate(error), self._awaited(sends, recvs)) from error
        except DeadlinePassedError as error:
            raise with_awaited(self.timeout(), self._awaited(sends, recvs)) from error

    def _awaited(self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]]) -> list[int]:
        return [self.names[peer] for peer, _ in recvs or sends]

    def _post(self, step: Step, make_batch: Callable[[int], PostedBatch]) -> None:
        """Begin to move what a step says; `make_batch` is given the number of its frames."""
        outgoing, incoming, tag = self._frames(*step)
        self._engine.post(outgoing, incoming, tag, make_batch(len(outgoing) + len(incoming)))

    def posted_transfers(self, plan: Plan | None = None) -> PostedTcpTransfers:
        """See `Backend.posted_transfers`; `plan` takes the place of `steps`."""
        return PostedTcpTransfers(self._engine, self._context, plan or self.steps, self._post, self._translate)

    def _frames(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], labels: Iterable[bytes], tag: int
    ) -> tuple[list[tuple[int, bytes, memoryview]], list[tuple[int, bytes, memoryview]], int]:
        """Cut buffers into the frames that the engine moves."""
        tag = in_context(tag, self._context)
        outgoing, incoming = [], []
        headers: dict[tuple[int, bytes], bytes] = {}
        label_of_next = iter(labels)
        for peer, buffer in sends:
            label = next(label_of_next)
            for body in _frame_bodies(buffer):
                key = (body.nbytes, label)
                header = headers.get(key)
                if header is None:
                    header = headers[key] = pack(body.nbytes, DATA, tag, label)
                outgoing.append((self.ranks[peer], header, body))
        for peer, buffer in recvs:
            label = next(label_of_next)
            incoming += [(self.ranks[peer], label, body) for body in _frame_bodies(buffer)]
        return outgoing, incoming, tag

    def timeout(self) -> TimeoutError:
        """Make the error for a passed deadline; it names the limit of kept messages if one was reached."""
        mine, names = self.names[self.rank], self._name_of
        slow, waiting = self._engine.at_limit()
        late = [f"rank {names[peer]} has not received what rank {mine} sent" for peer in slow if peer in names]
        late += [f"rank {mine} has not received what rank {names[peer]} sent" for peer in waiting if peer in names]
        if not late:
            return TimeoutError("the deadline passed")
        return TimeoutError(
            f"the deadline passed. {' and '.join(late)}: a rank keeps up to {KEPT_LIMIT_BYTES >> 20} MiB of such "
            "messages from all others, and further sends wait for their receive. Receive earlier, or send with "
            "async_op=True"
        )

    def begin(self, call: Call) -> None:
        """Begin a collective: frames must carry this call's label from now on."""
        self.call = call
        self._label = call.label()
        try:
            self._engine.begin_collective(in_context(self.tag, self._context), self._label)
        except EngineError as error:
            raise self._translate(error) from error

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`."""
        self.begin(call)
        super().agree(call, deadline=deadline)

    def subgroup(self, ranks: Sequence[int], context: int) -> TcpBackend:
        """Make a group over the same connections, with a context number of its own."""
        members = [self.ranks[rank] for rank in ranks]
        index = tuple(ranks).index(self.rank)
        return TcpBackend(self._engine, members, index, self.choice, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the survivors' group, over the connections that they have."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's transfers on all its ranks; other groups go on."""
        others = [rank for index, rank in enumerate(self.ranks) if index != self.rank]
        self._engine.abort(self._context, others)

    def close(self) -> None:
        """Close the connections; a subgroup owns none, and closes nothing."""
        if self._context == 0:
            self._engine.close()

    def _translate(self, error: Exception) -> FerroError:
        """Translate an error of the engine into ferro's, with ranks of this group."""
        if isinstance(error, ConnectionLostError):
            return PeerLost(str(error), peer=self._name_of[error.peer])
        if isinstance(error, LabelMismatchError):
            mine = Call.from_label(error.expected)
            return mismatch(self.names[self.rank], mine, self._name_of[error.peer], error.got)
        if isinstance(error, LengthMismatchError):
            peer = self._name_of[error.peer]
            text = f"rank {self.names[self.rank]} called {self.call}, rank {peer} too, but {error}"
            return CollectiveMismatch(text, peer=peer)
        return GroupClosed(str(error))


def _slice_each(items: Sequence[tuple[int, Array]], part: slice) -> list[tuple[int, Array]]:
    """Slice the bytes of every buffer."""
    return [(peer, buffer.view(np.uint8)[part]) for peer, buffer in items]


def _frame_bodies(buffer: Array) -> list[memoryview]:
    """Split the bytes of a buffer into bodies of frames; an empty buffer gives an empty body."""
    if buffer.nbytes == 0:
        return [memoryview(bytearray())]
    whole = buffer.view(np.uint8).data
    if whole.nbytes <= MAX_BODY:
        return [whole]
    return [whole[start : start + MAX_BODY] for start in range(0, whole.nbytes, MAX_BODY)]
