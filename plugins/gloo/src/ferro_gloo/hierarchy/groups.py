"""HierarchyGroups: the groups that a hierarchical collective uses, and its pipeline.

A rank has a local group, the ranks on its host, and in most cases a rail, one rank of every host.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from ferro import Work
from ferro.collectives.label import Call
from ferro.collectives.partition import near_equal
from ferro.group.serial_executor import SerialExecutor
from ferro.types import Array
from ferro_gloo.hierarchy.topology import Topology
from ferro_gloo.shm.backend import ShmBackend
from ferro_gloo.tcp.backend import TcpBackend

LocalBackend: TypeAlias = ShmBackend | TcpBackend

# One phase of a pipeline, called with the index of a block.
Phase: TypeAlias = Callable[[int], None]

# While one block is on the network, the hosts prepare the next, so both need memory of their own.
BLOCKS_IN_FLIGHT = 2


def no_phase(index: int) -> None:
    """Do nothing, in place of a phase in which this rank takes no part."""


class HierarchyGroups:
    """The groups of one rank.

    Args:
        flat: the group of all ranks.
        hosts: the group's ranks by host.
        local: the group of the ranks on this rank's host.

    Attributes:
        topology: which ranks are on which host.
        flat: see above.
        local: see above; ranks in it are local ranks.
        rail: the group of this rank's rail, None if it has none; ranks in it are host indices.
    """

    def __init__(self, flat: TcpBackend, hosts: Sequence[Sequence[int]], local: LocalBackend) -> None:
        self.topology = Topology.of(hosts, flat.rank)
        self.flat = flat
        self.local = local
        self.rail: TcpBackend | None = None
        local_rank = self.topology.local_rank
        if local_rank < self.topology.rails:
            self.rail = flat.subset([host[local_rank] for host in self.topology.hosts])
        self._network_thread = SerialExecutor("ferro-gloo-rail")

    @property
    def is_alone(self) -> bool:
        """True if no other rank is on this host."""
        return len(self.topology.host_ranks) == 1

    def begin(self, call: Call) -> None:
        """Begin a collective on the local group and the rail."""
        self.local.begin(call)
        if self.rail is not None:
            self.rail.begin(call)

    def slices(self, block: Array) -> list[Array]:
        """Cut a block into near equal slices by local rank; ranks without a rail get nothing."""
        without_rail = len(self.topology.host_ranks) - self.topology.rails
        return near_equal(block, self.topology.rails) + [block[:0]] * without_rail

    def own_slice(self, block: Array) -> Array:
        """Cut this rank's slice from a block."""
        return self.slices(block)[self.topology.local_rank]

    def exchange_on_rail(self, sends: Sequence[Array], recvs: Sequence[Array], deadline: float) -> None:
        """Exchange an array with every other host; `sends` and `recvs` are indexed by host."""
        rail = self.rail
        assert rail is not None, "only ranks on a rail exchange with other hosts"
        others = self.topology.other_hosts
        rail.exchange(
            [(host, sends[host]) for host in others],
            [(host, recvs[host]) for host in others],
            tag=rail.tag,
            deadline=deadline,
        )

    def run_pipeline(self, count: int, before: Phase, network: Phase, after: Phase) -> None:
        """Run `count` blocks through three phases; the network phase runs in a thread of its own.

            caller   before 0   before 1   after 0   before 2   after 1   …
            thread              network 0            network 1            …

        All ranks of a host have the same order of phases, with or without a rail, and all ranks of
        a rail the same order of blocks. The caller raises the errors of both threads.
        """
        if count == 1:
            before(0)
            self._run_on_rail(network, 0)
            after(0)
            return
        moving: list[Work[None]] = []
        for index in range(count + 1):
            if index < count:
                before(index)
                moving.append(self.start_on_network_thread(partial(self._run_on_rail, network, index)))
            if index > 0:
                moving[index - 1].wait()
                after(index - 1)

    def start_on_network_thread(self, task: Callable[[], None]) -> Work[None]:
        """Queue a task for the network thread; return its handle.

        It runs in a copy of the caller's context, which holds NumPy's handling of floating-point
        errors.
        """
        context = contextvars.copy_context()
        return self._network_thread.start("network", lambda _: context.run(task))

    def close(self) -> None:
        """End the network thread; close the local group."""
        self._network_thread.close(time.monotonic())
        self.local.close()

    def _run_on_rail(self, network: Phase, index: int) -> None:
        if self.rail is not None:
            network(index)


def counts_of(parts: Sequence[Array]) -> list[int]:
    """Count the elements of each part."""
    return [part.size for part in parts]
