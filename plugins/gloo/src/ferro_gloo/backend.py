"""GlooBackend: chooses shared memory, TCP or both for a group, by the hosts of its ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ferro.backend import Backend
from ferro.collectives.fast_path import BoundFastPath, EvenCollective, FastPath, FastScatter, PersistentExchange, Turn
from ferro.collectives.label import MAX_CONTEXT, Call
from ferro.collectives.posted_transfers import PostedTransfers
from ferro.collectives.reduction import Reduction
from ferro.errors import PeerLost, RendezvousError, UsageError
from ferro.hookspecs import BackendConfig
from ferro.types import Array
from ferro_gloo.hierarchy.backend import HierarchicalBackend
from ferro_gloo.shm.backend import ShmBackend
from ferro_gloo.shm.bootstrap import LocalHost, bootstrap_all_gather
from ferro_gloo.shm.exchange.setup import make_exchange
from ferro_gloo.shm.transfer import ShmTransfers
from ferro_gloo.tcp.backend import TcpBackend

# The names that `backend_options` may hold, each True by default: "shared_memory" lets the ranks of one host share
# memory; "native_helper" lets them use the native helper where it is built.
_OPTIONS = ("shared_memory", "native_helper")


class GlooBackend(Backend):
    """One rank of a group.

    The collectives of ranks on one host use shared memory. Those of several hosts use shared memory within a host and
    TCP between hosts, or TCP alone where no two ranks share memory. All ranks of a group make this choice together: for
    the world when they connect, for another group when its first collective begins.

    Args:
        flat: the group over TCP.
        host: this rank's host, and the memory of its ranks.
        is_world: True for the group of all ranks, with which the host's memory is closed.
    """

    labels_frames = True

    def __init__(self, flat: TcpBackend, host: LocalHost, *, is_world: bool = False) -> None:
        super().__init__(flat.rank, flat.world_size, flat.choice)
        self._flat = flat
        self._host = host
        self._transfers = ShmTransfers(flat, host)
        self._collectives: Backend | None = None
        self._selected: Backend = flat
        self._is_world = is_world
        self._pid = os.getpid()

    @classmethod
    def connect(cls, config: BackendConfig) -> GlooBackend:
        """Connect to all other ranks; every rank calls it.

        Raises:
            UsageError: there is no such option.
            RendezvousError: a rank could not be reached, did not connect, or died meanwhile.
        """
        _check_options(config)
        deadline = time.monotonic() + config.timeout_s
        flat = TcpBackend.connect(config)
        # The bootstrap has a group of its own, so that only the world's first operation reports a
        # failure of the world.
        bootstrap = flat.subgroup(range(config.world_size), MAX_CONTEXT)
        world: GlooBackend | None = None
        try:
            world = cls(flat, LocalHost.discover(bootstrap, config, deadline), is_world=True)
            world._collectives = world._choose_collectives(bootstrap, deadline)
        except BaseException as error:
            if world is not None:
                world.close()
            flat.close()
            if isinstance(error, TimeoutError | PeerLost):
                raise _bootstrap_error(error, config) from error
            raise
        return world

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._transfers.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._transfers.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, tag: int, deadline: float
    ) -> None:
        """See `Backend.exchange`."""
        self._transfers.exchange(sends, recvs, tag=tag, deadline=deadline)

    def posted_transfers(self) -> PostedTransfers:
        """See `Backend.posted_transfers`."""
        return self._transfers.posted()

    def persistent_exchange(
        self, sends: Sequence[tuple[int, Array]], recvs: Sequence[tuple[int, Array]], *, number: int, deadline: float
    ) -> PersistentExchange | None:
        """See `Backend.persistent_exchange`; it is there where all messages stay within hosts."""
        return make_exchange(self._flat, self._host, sends, recvs, number=number, deadline=deadline)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`."""
        self.call = call
        if self._collectives is None:
            self._collectives = self._choose_collectives(self._flat, deadline)
        self._selected = self._collectives
        if not self.choice.fixed:
            self._selected.agree(call, deadline=deadline)
            return
        # The algorithms that the user asked for run over TCP. A rank that makes another call may wait for this one
        # there, or in shared memory.
        self._flat.begin(call)
        self._selected.agree(call, deadline=deadline)
        if call.op in self.choice.fixed and self._selected is not self._flat:
            self._selected.barrier(deadline=deadline)
            self._selected = self._flat
            self._flat.agree(call, deadline=deadline)

    def fast_path(self, collective: EvenCollective, turn: Turn) -> FastPath | None:
        """See `Backend.fast_path`: that of shared memory, once the group has chosen it."""
        if self.choice.fixed or self._collectives is None:
            return None
        return self._collectives.fast_path(collective, turn)

    def persistent_collective(
        self,
        collective: EvenCollective | None,
        buffers: Sequence[Array | None],
        turn: Turn,
        *,
        number: int,
        deadline: float,
    ) -> BoundFastPath | None:
        """See `Backend.persistent_collective`: it is there where all ranks share memory."""
        if not isinstance(self._collectives, ShmBackend):  # which all ranks have chosen together
            return None
        fixed = collective is None or self.choice.fixed
        return self._collectives.persistent_collective(
            None if fixed else collective, buffers, turn, number=number, deadline=deadline
        )

    def fast_scatter(self, header: EvenCollective, told: bytes, data: EvenCollective, turn: Turn) -> FastScatter | None:
        """See `Backend.fast_scatter`: that of shared memory, once the group has chosen it."""
        if self.choice.fixed or self._collectives is None:
            return None
        return self._collectives.fast_scatter(header, told, data, turn)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._selected.barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        self._selected.all_reduce(buffer, reduction, deadline=deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        self._selected.reduce(buffer, reduction, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        self._selected.broadcast(buffer, root, deadline=deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        self._selected.all_gather(buffer, counts, deadline=deadline)

    def gather(self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.gather`."""
        self._selected.gather(block, out, counts, root, deadline=deadline)

    def scatter(self, block: Array, source: Array | None, counts: Sequence[int], root: int, *, deadline: float) -> None:
        """See `Backend.scatter`."""
        self._selected.scatter(block, source, counts, root, deadline=deadline)

    def reduce_scatter(
        self, source: Array, out: Array, counts: Sequence[int], reduction: Reduction, *, deadline: float
    ) -> None:
        """See `Backend.reduce_scatter`."""
        self._selected.reduce_scatter(source, out, counts, reduction, deadline=deadline)

    def all_to_all(
        self, source: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int], *, deadline: float
    ) -> None:
        """See `Backend.all_to_all`."""
        self._selected.all_to_all(source, out, send_counts, recv_counts, deadline=deadline)

    def allocate(self, nbytes: int) -> Array:
        """Allocate memory that other ranks on this host can reduce and read in place."""
        return self._host.arenas.allocate(nbytes)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Make a group over the same connections and on the same hosts."""
        return GlooBackend(self._flat.subgroup(ranks, context), self._host)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Make the survivors' group, over the connections that they have."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's operations on all its ranks, while other groups go on; a forked child ends nothing."""
        if os.getpid() != self._pid:
            return
        if self._collectives is not None:
            self._collectives.abort()
        self._flat.abort()

    def close(self) -> None:
        """Close the connections, unless this is a subgroup, which owns none.

        Afterwards only the user's arrays refer to shared memory. A forked child leaves all that to its parent.
        """
        if os.getpid() != self._pid:
            return
        if self._collectives is not None:
            self._collectives.close()
        self._collectives = self._selected = self._flat
        if self._is_world:
            self._host.close()
        self._host = LocalHost.of_single_rank()
        self._transfers = ShmTransfers(self._flat, self._host)
        self._flat.close()

    def _choose_collectives(self, bootstrap: TcpBackend, deadline: float) -> Backend:
        """Choose the backend of this group's collectives; all ranks of the group call this together.

        Args:
            bootstrap: a group of the same ranks, which carries the messages of the choice.
            deadline: absolute `time.monotonic()` second.
        """
        hosts = self._host.group_by_host(self._flat.ranks)
        own_host = next(members for members in hosts if self.rank in members)
        region = None
        if len(own_host) > 1:
            region = self._host.open_region(bootstrap.subset(own_host), deadline)
        if len(hosts) > 1:
            hosts = self._split_hosts_without_memory(hosts, region is not None, bootstrap, deadline)
        if len(hosts) == self.world_size or (region is None and len(hosts) == 1):
            return self._flat
        if region is None:
            return HierarchicalBackend(self._flat, hosts, self._flat.subset([self.rank]))
        local = ShmBackend(region, self._flat.subset(own_host), self._host.exchange_memory)
        return local if len(hosts) == 1 else HierarchicalBackend(self._flat, hosts, local)

    def _split_hosts_without_memory(
        self, hosts: list[list[int]], shares: bool, bootstrap: TcpBackend, deadline: float
    ) -> list[list[int]]:
        """Make single-rank hosts of the ranks whose host has no region; all ranks of the group call it."""
        answers = bootstrap_all_gather(bootstrap, bytes([shares]), deadline)
        found: list[list[int]] = []
        for members in hosts:
            found += [members] if answers[members[0]] == b"\1" else [[rank] for rank in members]
        return sorted(found)


def _bootstrap_error(error: TimeoutError | PeerLost, config: BackendConfig) -> RendezvousError:
    peer = error.peer if isinstance(error, PeerLost) else None
    who = "the others" if peer is None else f"rank {peer}"
    return RendezvousError(
        f"rank {config.rank} of {config.world_size} was connected, but could not find out who "
        f"shares its memory within {config.timeout_s:.3g} s: {error}. Read the log of {who} first",
        rank=config.rank,
        peer=peer,
    )


def _check_options(config: BackendConfig) -> None:
    unknown = sorted(set(config.options) - set(_OPTIONS))
    if unknown:
        raise UsageError(f"gloo has no option {', '.join(unknown)}: backend_options may hold {', '.join(_OPTIONS)}")
    for name, value in config.options.items():
        if not isinstance(value, bool):
            raise UsageError(f"gloo's option {name} is True or False, not {value!r}")
