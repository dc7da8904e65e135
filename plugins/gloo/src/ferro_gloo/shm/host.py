"""Host: which ranks share this one's memory, found out by trying, and what they share."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ferro.hookspecs import BackendConfig
from ferro.runtime.environment import usable_cores
from ferro.types import Array
from ferro_gloo.shm.arena import Arenas, arena_bytes
from ferro_gloo.shm.region import Region, open_region
from ferro_gloo.shm.segment import NAME_BYTES, Segment, sweep
from ferro_gloo.shm.talk import swap, warn
from ferro_gloo.tcp.backend import TcpBackend

# Size and name of a rank's arena, zeros where it has none, and a digest of its FERRO_HOST_ID.
_OFFER = struct.Struct(f"<Q{NAME_BYTES}s16s")


class _Offer(NamedTuple):
    nbytes: int
    name: bytes
    identity: bytes


class Host:
    """This rank's host.

    Args:
        rank: this rank in the world.
        leaders: for every rank of the world the lowest rank on its host.
        arenas: the memory that `ProcessGroup.empty` gives out, shared with the host's ranks.
        native: use the native helper where all have it.

    Attributes:
        arenas: see above.
    """

    def __init__(self, rank: int, leaders: Sequence[int], arenas: Arenas, *, native: bool) -> None:
        self._native = native
        self._leaders = tuple(leaders)
        self._spin = self._leaders.count(self._leaders[rank]) <= usable_cores()
        self.arenas = arenas

    @classmethod
    def alone(cls) -> Host:
        """Return the host of a rank that shares no memory."""
        return cls(0, [0], Arenas(0, None, {}), native=False)

    @classmethod
    def find(cls, flat: TcpBackend, config: BackendConfig, deadline: float) -> Host:
        """Find out which ranks can open each other's memory; every rank of the world calls it.

        Host names prove nothing: two containers may share one and no memory. Every rank offers
        its arena and tries to open the others'. Those that could open the same ones, each other's
        among them, are on one host. Ranks whose FERRO_HOST_ID differs do not try.
        """
        n, me = flat.world_size, flat.rank
        native = bool(config.options.get("native_helper", True))
        if n == 1:
            return cls.alone()
        own, name, reason = None, bytes(NAME_BYTES), ""
        if bool(config.options.get("shared_memory", True)):
            own, name, reason = _make_arena(n)
        identity = hashlib.sha256(config.host_id.encode()).digest()[:16]
        try:
            mine = _OFFER.pack(0 if own is None else own.nbytes, name, identity)
            offers = [_Offer(*_OFFER.unpack(raw)) for raw in swap(flat, mine, deadline)]
            opened = {} if own is None else _open(offers, me)
            masks = swap(flat, _mask(n, [me, *opened]), deadline)
        finally:
            if own is not None:
                own.withdraw()
        unable = [rank for rank, offer in enumerate(offers) if offer.nbytes == 0]
        if reason and _speaks(me, unable, config.addresses):
            warn(reason)
        leaders = [masks.index(mask) for mask in masks]
        others = {rank: segment for rank, segment in opened.items() if leaders[rank] == leaders[me]}
        return cls(me, leaders, Arenas(me, own if others else None, others), native=native)

    def is_neighbour(self, rank: int) -> bool:
        """Say whether a rank of the world, not this one, shares its arena with this rank."""
        return self.arenas.has(rank)

    def members_by_host(self, ranks: Sequence[int]) -> list[list[int]]:
        """Sort a group's members by host, given their ranks in the world; each list ascends."""
        hosts: dict[int, list[int]] = {}
        for member, rank in enumerate(ranks):
            hosts.setdefault(self._leaders[rank], []).append(member)
        return list(hosts.values())

    def open_region(self, part: TcpBackend, deadline: float) -> Region | None:
        """Share memory with these ranks of this host; None, on all of them, if it cannot be."""
        return open_region(part, native=self._native, spin=self._spin, deadline=deadline)

    def allocate(self, nbytes: int) -> Array:
        """Return memory that the host's ranks can read and write in place; ordinary, if alone."""
        return self.arenas.allocate(nbytes)


def _make_arena(ranks: int) -> tuple[Segment | None, bytes, str]:
    """Return an arena and the name that is offered; or none, with zeros and the reason."""
    nothing = bytes(NAME_BYTES)
    if not sys.platform.startswith("linux"):
        return None, nothing, f"gloo uses shared memory on Linux only, not on {sys.platform}"
    try:
        sweep()
        segment = Segment.create(arena_bytes(ranks))
        return segment, segment.offer(), ""
    except OSError as error:
        remedy = "give it a tmpfs with room at /dev/shm (in a container: --shm-size)"
        return None, nothing, f"gloo: this process can share no memory ({error}): {remedy}"


def _open(offers: Sequence[_Offer], me: int) -> dict[int, Segment]:
    """Open the other ranks' arenas, those that can be."""
    opened = {}
    for rank, offer in enumerate(offers):
        if rank != me and offer.nbytes and offer.identity == offers[me].identity:
            with suppress(OSError):
                opened[rank] = Segment.open(offer.name, offer.nbytes)
    return opened


def _mask(ranks: int, chosen: Sequence[int]) -> bytes:
    """Return one bit for each rank, set for the chosen ones."""
    return sum(1 << rank for rank in chosen).to_bytes(-(-ranks // 8), "little")


def _speaks(me: int, unable: Sequence[int], addresses: Sequence[str]) -> bool:
    """Say whether this rank is the one to warn its host's others, if there are any.

    Where no memory is shared, only addresses tell who may be on one host.
    """
    neighbours = [rank for rank, address in enumerate(addresses) if address == addresses[me]]
    return len(neighbours) > 1 and me == next(rank for rank in neighbours if rank in unable)
