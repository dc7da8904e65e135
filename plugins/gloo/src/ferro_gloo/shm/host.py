"""Host: which ranks share this one's memory, found out by trying, and what they share."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Sequence

import numpy as np

from ferro.backend import BackendConfig
from ferro.calls import MAX_CONTEXT
from ferro.environment import usable_cores
from ferro.types import Array
from ferro_gloo.shm.arena import Arenas
from ferro_gloo.shm.region import Region, open_region
from ferro_gloo.shm.segment import NAME_BYTES, Segment, sweep
from ferro_gloo.shm.talk import swap, warn
from ferro_gloo.tcp.backend import TcpBackend

# Whether this rank can share memory, a digest of its FERRO_HOST_ID, the name of its probe.
_OFFER = struct.Struct(f"<?16s{NAME_BYTES}s")
_ANSWER = struct.Struct("<I")
_PROBE_BYTES = 4096


class Host:
    """This rank's host.

    Args:
        rank: this rank in the world.
        leaders: for every rank of the world the lowest rank on its host.
        native: use the native helper where all have it.

    Attributes:
        arenas: the memory that `ProcessGroup.empty` gives out, shared with the host's ranks.
    """

    def __init__(self, rank: int, leaders: Sequence[int], *, native: bool) -> None:
        self._native = native
        self._leaders = tuple(leaders)
        neighbours = self._leaders.count(self._leaders[rank])
        self._alone = neighbours == 1
        self._spin = neighbours <= usable_cores()
        self.arenas = Arenas(rank)

    @classmethod
    def find(cls, flat: TcpBackend, config: BackendConfig, deadline: float) -> Host:
        """Find out which ranks can open each other's memory; every rank of the world calls it.

        Host names prove nothing: two containers may share one and no memory. Every rank offers a
        probe and tries the others' until one opens. Ranks whose FERRO_HOST_ID differs do not try.
        """
        n, me = flat.world_size, flat.rank
        native = bool(config.options.get("native_helper", True))
        if n == 1:
            return cls(0, [0], native=native)
        # A group of its own: an early failure of the world is told by the world's first operation.
        flat = flat.subgroup(range(n), MAX_CONTEXT)
        probe, name, reason = None, bytes(NAME_BYTES), ""
        if bool(config.options.get("shared_memory", True)):
            probe, name, reason = _make_probe()
        identity = hashlib.sha256(config.host_id.encode()).digest()[:16]
        try:
            mine = _OFFER.pack(probe is not None, identity, name)
            offers = [_OFFER.unpack(raw) for raw in swap(flat, mine, deadline)]
            leader = me
            for rank in range(me if probe is not None else 0):
                can, theirs, probed = offers[rank]
                if can and theirs == identity and _opens(probed):
                    leader = rank
                    break
            answers = swap(flat, _ANSWER.pack(leader), deadline)
        finally:
            if probe is not None:
                probe.withdraw()
        unable = [rank for rank, (can, _, _) in enumerate(offers) if not can]
        if reason and _speaks(me, unable, config.addresses):
            warn(reason)
        leaders = [_ANSWER.unpack(raw)[0] for raw in answers]
        # Who follows a rank that follows another is alone: sharing must be mutual.
        leaders = [lead if leaders[lead] == lead else r for r, lead in enumerate(leaders)]
        return cls(me, leaders, native=native)

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
        if self._alone:
            return np.empty(nbytes, np.uint8)
        return self.arenas.allocate(nbytes)


def _make_probe() -> tuple[Segment | None, bytes, str]:
    """Return a probe and the name that is offered; or none, with zeros and the reason."""
    nothing = bytes(NAME_BYTES)
    if not sys.platform.startswith("linux"):
        return None, nothing, f"gloo uses shared memory on Linux only, not on {sys.platform}"
    try:
        sweep()
        probe = Segment.create(_PROBE_BYTES)
        return probe, probe.offer(), ""
    except OSError as error:
        remedy = "give it a tmpfs with room at /dev/shm (in a container: --shm-size)"
        return None, nothing, f"gloo: this process can share no memory ({error}): {remedy}"


def _speaks(me: int, unable: Sequence[int], addresses: Sequence[str]) -> bool:
    """Say whether this rank is the one to warn its host's others, if there are any.

    Where no memory is shared, only addresses tell who may be on one host.
    """
    neighbours = [rank for rank, address in enumerate(addresses) if address == addresses[me]]
    return len(neighbours) > 1 and me == next(rank for rank in neighbours if rank in unable)


def _opens(name: bytes) -> bool:
    try:
        Segment.open(name, _PROBE_BYTES)
    except OSError:
        return False
    return True
