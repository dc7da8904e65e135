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
from ferro.collectives.label import context_of, in_context
from ferro.collectives.network import Network
from ferro.errors import CollectiveMismatch, GroupClosed, PeerLost, RankKilled, UsageError
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
        self._queues: dict[tuple[int, int, int], deque[tuple[Array, float]]] = {}
        self._awaited: dict[tuple[int, int, int], SimulatedPostedTransfers] = {}
        # Ranks enter the lock itself, since an interrupt inside Condition.__enter__ would leave it locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def send(self, source: int, target: int, tag: int, message: Array) -> bool:
        """Queue a copy of a message for another rank; False when that rank is gone."""
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
            key = (source, target, tag)
            self._queues.setdefault(key, deque()).append((message.copy(), arrival))
            if key in self._awaited:
                self._awaited.pop(key).arrived.append(key)
            self._changed.notify_all()
            return True

    def recv(self, source: int, target: int, tag: int, deadline: float) -> Array | None:
        """Wait for the next message from `source` with this tag; None when that rank is gone."""
        key = (source, target, tag)
        with self._lock:
            while not self._queues.get(key):
                if context_of(tag) in self._aborted:
                    raise GroupClosed("the group was aborted")
                if source in self._gone:
                    return None
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"nothing came from rank {source}")
                self._changed.wait(left)
            queue = self._queues[key]
            message, arrival = queue.popleft()
            if not queue:  # every collective has a tag of its own: an empty queue is never used again
                del self._queues[key]
            self.clocks[target] = max(self.clocks[target], arrival)
            return message

    def wait_any(self, posted: SimulatedPostedTransfers, context: int, until: float) -> list[tuple[int, int, int]]:
        """Wait until messages have come, ranks have gone, or the wait is to end; return the keys to receive now."""
        with self._lock:
            left = max(0.0, min(until - time.monotonic(), threading.TIMEOUT_MAX))
            self._changed.wait_for(
                lambda: posted.arrived or posted.woken or context in self._aborted or len(self._gone) > posted.gone,
                left,
            )
            posted.woken = False
            arrived, posted.arrived = posted.arrived, []
            if context in self._aborted or len(self._gone) > posted.gone:
                posted.gone = len(self._gone)
                arrived = [
                    key
                    for key in posted.pending
                    if context in self._aborted or self._queues.get(key) or key[0] in self._gone
                ]
                for key in arrived:
                    self._awaited.pop(key, None)
            return arrived

    def expect(self, key: tuple[int, int, int], posted: SimulatedPostedTransfers) -> None:
        """Tell `posted` when a message with this key has come, which may be now."""
        with self._lock:
            if self._queues.get(key) or key[0] in self._gone:
                posted.arrived.append(key)
            else:
                self._awaited[key] = posted

    def wake(self, posted: SimulatedPostedTransfers) -> None:
        """End a wait in `wait_any`, or the next one."""
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

    def __init__(
        self, backend: SimulatedBackend, transport: SimulatedTransport, ranks: Sequence[int], context: int
    ) -> None:
        self.pending: dict[tuple[int, int, int], tuple[object, Array, int, int]] = {}
        self.arrived: list[tuple[int, int, int]] = []  # this and the next two belong to the transport
        self.woken = False
        self.gone = 0
        self._backend, self._transport, self._ranks, self._context = backend, transport, ranks, context
        self._sent: list[tuple[object, BaseException | None]] = []

    def isend(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        self._backend.send(buffer, peer, tag=tag, deadline=deadline)
        self._sent.append((handle, None))

    def irecv(self, handle: object, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        key = (self._ranks[peer], self._ranks[self._backend.rank], in_context(tag, self._context))
        self.pending[key] = (handle, buffer, peer, tag)
        self._transport.expect(key, self)

    def wait_any(self, until: float) -> list[tuple[object, BaseException | None]]:
        ended, self._sent = self._sent, []
        for key in self._transport.wait_any(self, self._context, 0.0 if ended else until):
            handle, buffer, peer, tag = self.pending.pop(key)
            error: BaseException | None = None
            try:
                self._backend.recv(buffer, peer, tag=tag, deadline=0.0)
            except BaseException as raised:  # noqa: BLE001 - the group raises it
                error = raised
            ended.append((handle, error))
        return ended

    def wake(self) -> None:
        self._transport.wake(self)


class SimulatedBackend(Backend):
    """One simulated rank of a group, whose members are `ranks` of the world; `context` is the group's number."""

    def __init__(
        self, transport: SimulatedTransport, ranks: Sequence[int], rank: int, choice: Choice | None, context: int
    ) -> None:
        super().__init__(rank, len(ranks), choice)
        self._transport = transport
        self._ranks = tuple(ranks)
        self._context = context

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
        return self._transport.clocks[self._ranks[self.rank]]

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        source, target = self._ranks[self.rank], self._ranks[peer]
        if not self._transport.send(source, target, in_context(tag, self._context), buffer):
            raise PeerLost("it has left the simulation", peer=peer)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        source, target = self._ranks[peer], self._ranks[self.rank]
        message = self._transport.recv(source, target, in_context(tag, self._context), deadline)
        if message is None:
            raise PeerLost("it has left the simulation", peer=peer)
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

    def posted_transfers(self) -> SimulatedPostedTransfers:
        return SimulatedPostedTransfers(self, self._transport, self._ranks, self._context)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the group with a context of its own, so that it can be aborted by itself."""
        members = [self._ranks[rank] for rank in ranks]
        return SimulatedBackend(self._transport, members, tuple(ranks).index(self.rank), self.choice, context)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the survivors' group: messages between them do not depend on the dead group."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        self._transport.abort(self._context)

    def close(self) -> None:
        """Leave the world; closing a subgroup does not leave it."""
        if self._context == 0:
            self._transport.remove(self._ranks[self.rank])
