"""The simulated backend: ranks are threads of one process, and messages are copies in memory.

Time is virtual. Every rank has a clock. The network model gives each message the second at which it arrives, and
receiving the message moves the receiver's clock forward to that second. Nothing sleeps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ferro.backend import Backend
from ferro.collectives.choice import Choice
from ferro.collectives.label import Call, compare_labels, context_of, in_context, is_collective
from ferro.collectives.network import Network
from ferro.errors import CollectiveMismatch, GroupClosed, PeerLost, RankKilled, UsageError, with_awaited
from ferro.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An injected fault of one rank.

    Attributes:
        rank: the rank that fails.
        after: how many messages the rank sends before.
        kind: "kill": the rank is gone from then on. "drop": that message is lost. "delay": that message arrives
            `seconds` of virtual time late.
        seconds: the delay.
    """

    rank: int
    after: int
    kind: Literal["kill", "drop", "delay"] = "kill"
    seconds: float = 0.0


class SimulatedTransport:
    """The message queues between all ranks of one simulated world, with their clocks and faults."""

    def __init__(self, world_size: int, faults: Sequence[Fault] = (), network: Network | None = None) -> None:
        if world_size < 1:
            raise UsageError(f"world_size must be at least 1, not {world_size}")
        self.clocks = [0.0] * world_size
        self._network = network
        self._faults = {(fault.rank, fault.after): fault for fault in faults}
        self._sent = [0] * world_size
        self._gone: set[int] = set()
        self._aborted: set[int] = set()
        self._queues: dict[tuple[int, int, int], deque[tuple[Array, float, bytes]]] = {}
        # Ranks enter the lock itself, since an interrupt inside Condition.__enter__ would leave it locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def send(self, source: int, target: int, tag: int, message: Array, label: bytes = b"") -> bool:
        """Queue a copy of a message, with its label, for another rank; False when that rank is gone."""
        with self._lock:
            fault = self._faults.get((source, self._sent[source]))
            self._sent[source] += 1
            if fault is not None and fault.kind == "kill":
                self._gone.add(source)
                self._changed.notify_all()
                raise RankKilled(f"rank {source} was killed by its fault")
            if target in self._gone:
                return False
            if fault is not None and fault.kind == "drop":
                return True
            arrival = self.clocks[source] + (fault.seconds if fault is not None else 0.0)
            if self._network is not None:
                latency_s, bandwidth = self._network.link(source, target)
                arrival += latency_s + message.nbytes / bandwidth
            self._queues.setdefault((source, target, tag), deque()).append((message.copy(), arrival, label))
            self._changed.notify_all()
            return True

    def recv(self, source: int, target: int, tag: int, deadline: float) -> tuple[Array, bytes] | None:
        """Wait for the next message from `source` with this tag, and its label; None when that rank is gone."""
        key = (source, target, tag)
        with self._lock:
            while not self._queues.get(key):
                if context_of(tag) in self._aborted:
                    raise GroupClosed("the group was aborted")
                if source in self._gone:
                    return None
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._changed.wait(left)
            queue = self._queues[key]
            message, arrival, label = queue.popleft()
            if not queue:  # every collective has a tag of its own: an empty queue is never used again
                del self._queues[key]
            self.clocks[target] = max(self.clocks[target], arrival)
            return message, label

    def wait_any(self, posted: SimulatedPostedTransfers, context: int, until: float) -> list[tuple[int, int, int]]:
        """Wait until awaited messages have come, ranks have gone, or the wait is to end; list what to receive now."""
        found: list[tuple[int, int, int]] = []

        def has_ended() -> bool:
            every = context in self._aborted
            found.extend(key for key in posted.pending if every or self._queues.get(key) or key[0] in self._gone)
            return bool(found) or posted.woken

        with self._lock:
            self._changed.wait_for(has_ended, max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX)))
            posted.woken = False
        return found

    def wake(self, posted: SimulatedPostedTransfers) -> None:
        with self._lock:
            posted.woken = True
            self._changed.notify_all()

    def remove(self, rank: int) -> None:
        """Mark a rank as gone, and wake the ranks that wait for it."""
        with self._lock:
            self._gone.add(rank)
            self._changed.notify_all()

    def abort(self, context: int) -> None:
        """Wake every rank that waits in a group."""
        with self._lock:
            self._aborted.add(context)
            self._changed.notify_all()


class SimulatedPostedTransfers:
    """The outstanding transfers of one rank in a group: its messages are sent at once, and received as they come."""

    def __init__(self, backend: SimulatedBackend) -> None:
        self.pending: dict[tuple[int, int, int], tuple[object, Array, int, int]] = {}
        self.woken = False
        self._backend = backend
        self._ended: list[tuple[object, BaseException | None]] = []

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._backend.send(buffer, peer, tag=tag, deadline=deadline)
        self._ended.append((handle, None))

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self.pending[self._backend.key(peer, tag)] = (handle, buffer, peer, tag)

    def wait_any(self, until: float) -> list[tuple[object, BaseException | None]]:
        ended, self._ended = self._ended, []
        for key in self._backend.transport.wait_any(self, self._backend.context, 0.0 if ended else until):
            handle, buffer, peer, tag = self.pending.pop(key)
            error: BaseException | None = None
            try:
                self._backend.recv(buffer, peer, tag=tag, deadline=0.0)
            except BaseException as raised:  # noqa: BLE001 - the group raises it
                error = raised
            ended.append((handle, error))
        return ended

    def wake(self) -> None:
        self._backend.transport.wake(self)


class SimulatedBackend(Backend):
    """One simulated rank of a group, whose members are `ranks` of the world; `context` is the group's number."""

    def __init__(
        self, transport: SimulatedTransport, ranks: Sequence[int], rank: int, choice: Choice | None, context: int
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self.transport = transport
        self._ranks = tuple(ranks)
        self.context = context

    @classmethod
    def create_group(
        cls,
        world_size: int,
        *,
        choice: Choice | None = None,
        faults: Sequence[Fault] = (),
        network: Network | None = None,
    ) -> list[SimulatedBackend]:
        """Make the backends of a whole world, one for each rank's thread."""
        transport = SimulatedTransport(world_size, faults, network)
        return [cls(transport, range(world_size), rank, choice, 0) for rank in range(world_size)]

    @property
    def clock_s(self) -> float:
        """This rank's virtual time in seconds: 0.0 at first, moved on by the network model."""
        return self.transport.clocks[self._ranks[self.rank]]

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        source, target = self._ranks[self.rank], self._ranks[peer]
        label = self.call.label() if is_collective(tag) else b""
        if not self.transport.send(source, target, in_context(tag, self.context), buffer, label):
            raise PeerLost("it has left the simulation", peer=peer)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        source, target = self._ranks[peer], self._ranks[self.rank]
        try:
            received = self.transport.recv(source, target, in_context(tag, self.context), deadline)
        except (TimeoutError, GroupClosed) as error:
            raise with_awaited(error, (peer,))  # noqa: B904 - the same error
        if received is None:
            raise PeerLost("it has left the simulation", peer=peer)
        message, label = received
        if is_collective(tag):
            compare_labels(self.rank, self.call, peer, label)
        if message.nbytes != buffer.nbytes:
            raise CollectiveMismatch(
                f"rank {self.rank} expected {buffer.nbytes} bytes; rank {peer} sent {message.nbytes}", peer=peer
            )
        buffer[...] = message.view(buffer.dtype)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """Send, then receive: sending never blocks here, so no threads are needed."""
        for peer, buffer in sends:
            self.send(buffer, peer, tag=tag, deadline=deadline)
        for peer, buffer in recvs:
            self.recv(buffer, peer, tag=tag, deadline=deadline)

    def agree(self, call: Call, *, deadline: float) -> None:
        """Compare the calls, by messages for that alone; those of a persistent operation's step carry labels enough."""
        if call.is_step and call.root < 0 and call.op != "barrier":
            self.call = call
        else:
            super().agree(call, deadline=deadline)

    def key(self, peer: int, tag: int) -> tuple[int, int, int]:
        """Name the queue of the messages that `peer` sends to this rank with a tag."""
        return self._ranks[peer], self._ranks[self.rank], in_context(tag, self.context)

    def posted_transfers(self) -> SimulatedPostedTransfers:
        return SimulatedPostedTransfers(self)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the group with a context of its own, so that it can be aborted by itself."""
        members = [self._ranks[rank] for rank in ranks]
        return SimulatedBackend(self.transport, members, tuple(ranks).index(self.rank), self.choice, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the survivors' group: messages between them do not depend on the dead group."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        self.transport.abort(self.context)

    def close(self) -> None:
        """Leave the world; closing a subgroup does not leave it."""
        if self.context == 0:
            self.transport.remove(self._ranks[self.rank])
