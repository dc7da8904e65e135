"""The board: what simulated ranks exchange messages through, with virtual time and faults.

Time is virtual: every rank has a clock, a message carries the second at which it arrives by the
network model, and receiving it moves the receiver's clock forward to that. Nothing sleeps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ferro.collectives.label import context_of
from ferro.collectives.network import Network
from ferro.errors import GroupClosed, PeerLost, UsageError
from ferro.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong on purpose.

    Attributes:
        rank: whom it befalls.
        after: how many messages the rank sends before.
        kind: "kill": the rank is gone from then on. "drop": that message is lost. "delay": that
            message arrives `seconds` of virtual time late.
        seconds: for "delay".
    """

    rank: int
    after: int
    kind: Literal["kill", "drop", "delay"] = "kill"
    seconds: float = 0.0


class RankKilled(BaseException):
    """Ends a simulated rank whose turn to die has come; no `except Exception` stops it."""


class Board:
    """The mailboxes of all simulated ranks of one world."""

    def __init__(self, world_size: int, faults: Sequence[Fault] = (), network: Network | None = None) -> None:
        if world_size < 1:
            raise UsageError(f"world_size must be at least 1, not {world_size}")
        self.world_size = world_size
        self.clocks = [0.0] * world_size
        self._network = network
        self._faults = {(fault.rank, fault.after): fault for fault in faults}
        self._sent = [0] * world_size
        self._gone: set[int] = set()
        self._aborted: set[int] = set()
        self._boxes: dict[tuple[int, int, int], deque[tuple[Array, float]]] = {}
        self._change = threading.Condition()

    def put(self, source: int, target: int, tag: int, message: Array) -> None:
        """Leave a copy of a message for another rank."""
        with self._change:
            fault = self._faults.get((source, self._sent[source]))
            self._sent[source] += 1
            if fault is not None and fault.kind == "kill":
                self._gone.add(source)
                self._change.notify_all()
                raise RankKilled(f"rank {source} was killed by its fault")
            if target in self._gone:
                raise PeerLost("it has left the simulation", peer=target)
            if fault is not None and fault.kind == "drop":
                return
            late = fault.seconds if fault is not None else 0.0
            arrival = self.clocks[source] + self._travel_s(source, target, message) + late
            box = self._boxes.setdefault((source, target, tag), deque())
            box.append((message.copy(), arrival))
            self._change.notify_all()

    def take(self, source: int, target: int, tag: int, deadline: float) -> Array:
        """Wait for the next message from `source` with this tag, and return it."""
        key = (source, target, tag)
        with self._change:
            while not self._boxes.get(key):
                if context_of(tag) in self._aborted:
                    raise GroupClosed("the group was aborted")
                if source in self._gone:
                    raise PeerLost("it has left the simulation", peer=source)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"nothing came from rank {source}")
                self._change.wait(left)
            box = self._boxes[key]
            message, arrival = box.popleft()
            if not box:  # every collective has a tag of its own: an empty box is never used again
                del self._boxes[key]
            self.clocks[target] = max(self.clocks[target], arrival)
            return message

    def leave(self, rank: int) -> None:
        """Let a rank go; who waits for it learns that it is gone."""
        with self._change:
            self._gone.add(rank)
            self._change.notify_all()

    def abort(self, context: int) -> None:
        """Wake every rank that waits in a group."""
        with self._change:
            self._aborted.add(context)
            self._change.notify_all()

    def _travel_s(self, source: int, target: int, message: Array) -> float:
        if self._network is None:
            return 0.0
        latency_s, bandwidth = self._network.link(source, target)
        return latency_s + message.nbytes / bandwidth
