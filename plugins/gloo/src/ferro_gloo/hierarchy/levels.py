"""Levels: the two networks of a rank, its neighbours on the host and its rail between hosts."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from ferro.collectives.partition import near_equal
from ferro.group.serial_executor import SerialExecutor
from ferro.group.work import Work
from ferro.types import Array
from ferro_gloo.hierarchy.topology import Topology
from ferro_gloo.tcp.backend import TcpBackend

if TYPE_CHECKING:
    from ferro.collectives.label import Call
    from ferro_gloo.shm.backend import ShmBackend

    Local: TypeAlias = ShmBackend | TcpBackend

# Something that is done to block number so-and-so.
Phase: TypeAlias = Callable[[int], None]

# A block is on the network while the one after it is prepared; so two are under way.
SLOTS = 2


def nothing(number: int) -> None:
    """The phase of a rank that has nothing to do in it."""


class Levels:
    """What the collectives of several hosts are made of.

    Attributes:
        topology: who lives where.
        local: the group of this rank's host; ranks in it are places.
        rail: the group of this rank's rail, where it has one; ranks in it are numbers of hosts.
        flat: the group of all ranks.
    """

    def __init__(self, flat: TcpBackend, hosts: Sequence[Sequence[int]], local: Local) -> None:
        self.topology = Topology.of(hosts, flat.rank)
        self.flat = flat
        self.local = local
        self.rail: TcpBackend | None = None
        place = self.topology.place
        if place < self.topology.rails:
            self.rail = flat.part([host[place] for host in self.topology.hosts])
        self._lane = SerialExecutor("ferro-gloo-rail")

    @property
    def alone(self) -> bool:
        """Whether this rank has its host for itself."""
        return len(self.topology.neighbours) == 1

    def begin(self, call: Call) -> None:
        """Begin a collective on both levels."""
        self.local.begin(call)
        if self.rail is not None:
            self.rail.begin(call)

    def slices(self, block: Array) -> list[Array]:
        """Cut what a host has into what each place moves: near equal, nothing off the rails."""
        spare = len(self.topology.neighbours) - self.topology.rails
        return near_equal(block, self.topology.rails) + [block[:0]] * spare

    def pipeline(self, count: int, before: Phase, network: Phase, after: Phase) -> None:
        """Put `count` blocks through three phases, the network's in a thread of its own.

            caller   before 0   before 1   after 0   before 2   after 1   …
            thread              network 0            network 1            …

        The caller's order is the same on all ranks of a host, on a rail or not, and so is the
        order of blocks on a rail. An error in either thread is raised here.
        """
        if count == 1:
            before(0)
            self._on_rail(network, 0)
            after(0)
            return
        moving: list[Work[None]] = []
        for number in range(count + 1):
            if number < count:
                before(number)
                moving.append(self.beside(partial(self._on_rail, network, number)))
            if number > 0:
                moving[number - 1].wait()
                after(number - 1)

    def beside(self, task: Callable[[], None]) -> Work[None]:
        """Do something in the thread beside, after what it does already; return its handle.

        NumPy's treatment of floating-point errors goes along, as the caller set it.
        """
        context = contextvars.copy_context()
        return self._lane.start("network", lambda _: context.run(task))

    def close(self) -> None:
        """Let the thread end."""
        self._lane.close(time.monotonic())

    def _on_rail(self, network: Phase, number: int) -> None:
        if self.rail is not None:
            network(number)


def counts_of(parts: Sequence[Array]) -> list[int]:
    """Return how many elements each part has."""
    return [part.size for part in parts]
