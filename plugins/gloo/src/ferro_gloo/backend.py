"""GlooBackend: a group's transfers over TCP, its collectives the way its ranks lie on hosts."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ferro.backend import Backend
from ferro.collectives.label import MAX_CONTEXT, Call
from ferro.collectives.reduction import Reduction
from ferro.errors import PeerLost, RendezvousError, UsageError
from ferro.hookspecs import BackendConfig
from ferro.types import Array
from ferro_gloo.hierarchy import Hierarchy
from ferro_gloo.shm.backend import ShmBackend
from ferro_gloo.shm.handover import Handover
from ferro_gloo.shm.host import Host
from ferro_gloo.shm.talk import swap
from ferro_gloo.tcp.backend import TcpBackend

# What `backend_options` may hold, each True unless said otherwise: ranks of one host share memory,
# and use the native helper for it where it is built.
_OPTIONS = ("shared_memory", "native_helper")


class GlooBackend(Backend):
    """One rank of a group.

    Ranks on one host move collectives through shared memory, several hosts through shared memory
    inside and TCP between; where nobody shares a host, or shared memory cannot be had, all goes
    over TCP. The members find out which it is together: the world's when they connect, those of
    other groups when their first collective begins.

    Args:
        flat: the group over TCP.
        host: this rank's host and the memory that it shares there.
    """

    labels_frames = True

    def __init__(self, flat: TcpBackend, host: Host) -> None:
        super().__init__(flat.rank, flat.world_size, flat.choice)
        self._flat = flat
        self._host = host
        self._transfers = Handover(flat, host)
        self._way: Backend | None = None
        self._current: Backend = flat

    @classmethod
    def connect(cls, config: BackendConfig) -> GlooBackend:
        """Connect to all other ranks; every rank does.

        Raises:
            UsageError: there is no such option.
            RendezvousError: a rank could not be reached, did not come, or died meanwhile.
        """
        _check_options(config)
        deadline = time.monotonic() + config.timeout_s
        flat = TcpBackend.connect(config)
        # A group of its own: an early failure of the world is told by the world's first operation.
        talk = flat.subgroup(range(config.world_size), MAX_CONTEXT)
        try:
            world = cls(flat, Host.find(talk, config, deadline))
            world._way = world._find_way(talk, deadline)
        except BaseException as error:
            flat.close()
            if isinstance(error, TimeoutError | PeerLost):
                raise _not_found(error, config) from error
            raise
        return world

    def send(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.send`."""
        self._transfers.exchange([(peer, buffer)], [], tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, *, tag: int, deadline: float) -> None:
        """See `Backend.recv`."""
        self._transfers.exchange([], [(peer, buffer)], tag=tag, deadline=deadline)

    def exchange(
        self,
        sends: Sequence[tuple[int, Array]],
        recvs: Sequence[tuple[int, Array]],
        *,
        tag: int,
        deadline: float,
    ) -> None:
        """See `Backend.exchange`."""
        self._transfers.exchange(sends, recvs, tag=tag, deadline=deadline)

    def agree(self, call: Call, *, deadline: float) -> None:
        """See `Backend.agree`."""
        self.call = call
        if self._way is None:
            self._way = self._find_way(self._flat, deadline)
        self._current = self._way
        if self.choice.fixed:  # an algorithm that the user asked for runs over TCP
            self._flat.begin(call)  # where a rank that calls something else waits for this one
            self._current = self._flat if call.op in self.choice.fixed else self._way
        self._current.agree(call, deadline=deadline)

    def barrier(self, *, deadline: float) -> None:
        """See `Backend.barrier`."""
        self._current.barrier(deadline=deadline)

    def all_reduce(self, buffer: Array, reduction: Reduction, *, deadline: float) -> None:
        """See `Backend.all_reduce`."""
        self._current.all_reduce(buffer, reduction, deadline=deadline)

    def reduce(self, buffer: Array, reduction: Reduction, root: int, *, deadline: float) -> None:
        """See `Backend.reduce`."""
        self._current.reduce(buffer, reduction, root, deadline=deadline)

    def broadcast(self, buffer: Array, root: int, *, deadline: float) -> None:
        """See `Backend.broadcast`."""
        self._current.broadcast(buffer, root, deadline=deadline)

    def all_gather(self, buffer: Array, counts: Sequence[int], *, deadline: float) -> None:
        """See `Backend.all_gather`."""
        self._current.all_gather(buffer, counts, deadline=deadline)

    def gather(
        self, block: Array, out: Array | None, counts: Sequence[int], root: int, *, deadline: float
    ) -> None:
        """See `Backend.gather`."""
        self._current.gather(block, out, counts, root, deadline=deadline)

    def scatter(
        self,
        block: Array,
        source: Array | None,
        counts: Sequence[int],
        root: int,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.scatter`."""
        self._current.scatter(block, source, counts, root, deadline=deadline)

    def reduce_scatter(
        self,
        source: Array,
        out: Array,
        counts: Sequence[int],
        reduction: Reduction,
        *,
        deadline: float,
    ) -> None:
        """See `Backend.reduce_scatter`."""
        self._current.reduce_scatter(source, out, counts, reduction, deadline=deadline)

    def all_to_all(
        self,
        source: Array,
        out: Array,
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        *,
        deadline: float,
    ) -> None:
        """See `Backend.all_to_all`."""
        self._current.all_to_all(source, out, send_counts, recv_counts, deadline=deadline)

    def allocate(self, nbytes: int) -> Array:
        """Return memory that other ranks on this host can reduce and read in place."""
        return self._host.allocate(nbytes)

    def subgroup(self, ranks: Sequence[int], context: int) -> Backend:
        """Return a group over the same connections and the same hosts."""
        return GlooBackend(self._flat.subgroup(ranks, context), self._host)

    def shrink(self, ranks: Sequence[int], context: int) -> Backend:
        """Return the survivors' group: what connects the living outlasts a group."""
        return self.subgroup(ranks, context)

    def abort(self) -> None:
        """End this group's operations on all its ranks; other groups go on."""
        if self._way is not None:
            self._way.abort()
        self._flat.abort()

    def close(self) -> None:
        """Close the connections; of a subgroup, which owns none, only what is its own.

        Nothing refers to shared memory any more afterwards but the user's arrays.
        """
        if self._way is not None:
            self._way.close()
        self._way = self._current = self._flat
        self._host = Host.alone()
        self._transfers = Handover(self._flat, self._host)
        self._flat.close()

    def _find_way(self, talk: TcpBackend, deadline: float) -> Backend:
        """Find out, together with all members, how this group's collectives move.

        Args:
            talk: a group of the same members, to do so.
            deadline: absolute `time.monotonic()` second.
        """
        hosts = self._host.members_by_host(self._flat.ranks)
        mine = next(members for members in hosts if self.rank in members)
        region = self._host.open_region(talk.part(mine), deadline) if len(mine) > 1 else None
        if len(hosts) > 1:
            hosts = self._that_share(hosts, region is not None, talk, deadline)
        if len(hosts) == self.world_size or (region is None and len(hosts) == 1):
            return self._flat
        if region is None:
            return Hierarchy(self._flat, hosts, self._flat.part([self.rank]))
        local = ShmBackend(region, self._flat.part(mine), self._host.arenas)
        return local if len(hosts) == 1 else Hierarchy(self._flat, hosts, local)

    def _that_share(
        self, hosts: list[list[int]], shares: bool, talk: TcpBackend, deadline: float
    ) -> list[list[int]]:
        """Tell all whether this rank's host shares memory; where it does not, ranks are alone."""
        told = swap(talk, bytes([shares]), deadline)
        found: list[list[int]] = []
        for members in hosts:
            found += [members] if told[members[0]] == b"\1" else [[rank] for rank in members]
        return sorted(found)


def _not_found(error: TimeoutError | PeerLost, config: BackendConfig) -> RendezvousError:
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
        raise UsageError(
            f"gloo has no option {', '.join(unknown)}: backend_options may hold "
            f"{', '.join(_OPTIONS)}"
        )
    for name, value in config.options.items():
        if not isinstance(value, bool):
            raise UsageError(f"gloo's option {name} is True or False, not {value!r}")
