"""Bootstrap of shared memory: which ranks share a host, and the memory that they map together.

Host names prove nothing: two containers may have one name and no memory in common. So each rank creates a segment,
tells the others its name over TCP, and tries to open theirs.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from ferro.hookspecs import BackendConfig
from ferro.runtime.environment import usable_cores
from ferro_gloo.shm.arena import HostArenas, arena_bytes
from ferro_gloo.shm.counters import NATIVE_IS_AVAILABLE, pure_python_is_safe
from ferro_gloo.shm.exchange.memory import ExchangeMemory
from ferro_gloo.shm.mapping import is_used_by_other_threads
from ferro_gloo.shm.region import RegionLayout, ShmRegion
from ferro_gloo.shm.segment import NAME_BYTES, ShmSegment, remove_stale_names, unlink_name
from ferro_gloo.tcp.backend import TcpBackend

_TAG = 1 << 33  # a bit above every user's tag, and above those of `TcpBackend`
_NO_NAME = bytes(NAME_BYTES)

# The message about a rank's arena: size and name, zeros if it has none, digest of FERRO_HOST_ID.
_ARENA_OFFER = struct.Struct(f"<Q{NAME_BYTES}s16s")
# The lowest rank's message about the region: name, zeros if it has none, size, size of a slot.
_REGION_OFFER = struct.Struct(f"<{NAME_BYTES}sQQ")
# Each rank's answer: whether it has mapped the region, has the native helper, and is safe without it.
_REGION_ANSWER = struct.Struct("<???")


def bootstrap_all_gather(group: TcpBackend, data: bytes, deadline: float, tag: int = _TAG) -> list[bytes]:
    """Gather every rank's `data`, of the same length on all of them, on all ranks."""
    peers = [rank for rank in range(group.world_size) if rank != group.rank]
    sent = np.frombuffer(data, np.uint8)
    received = {rank: np.empty(len(data), np.uint8) for rank in peers}
    group.exchange([(rank, sent) for rank in peers], list(received.items()), tag=tag, deadline=deadline)
    return [data if rank == group.rank else received[rank].tobytes() for rank in range(group.world_size)]


class _ArenaOffer(NamedTuple):
    nbytes: int
    name: bytes
    host_id_digest: bytes


class LocalHost:
    """The ranks on this rank's host, and the memory that they share.

    Args:
        rank: this rank in the world.
        lowest_ranks: for every rank of the world the lowest rank on its host.
        arenas: the memory of `ProcessGroup.empty`.
        native: use the native helper where all ranks of a group on the host have it.

    Attributes:
        arenas: see above.
        exchange_memory: the memory of persistent exchanges.
        native: see above.
        spin: True where each rank of the host has a core.
    """

    def __init__(self, rank: int, lowest_ranks: Sequence[int], arenas: HostArenas, *, native: bool) -> None:
        self.native = native
        self._lowest_ranks = tuple(lowest_ranks)
        _hosts.add(self)
        self._regions: weakref.WeakSet[ShmSegment] = weakref.WeakSet()
        self.spin = self._lowest_ranks.count(self._lowest_ranks[rank]) <= usable_cores()
        self.arenas = arenas
        self.exchange_memory = ExchangeMemory(arenas)

    @classmethod
    def of_single_rank(cls) -> LocalHost:
        """Make the host of a rank that shares no memory."""
        return cls(0, [0], HostArenas(0, None, {}), native=False)

    @classmethod
    def discover(cls, group: TcpBackend, config: BackendConfig, deadline: float) -> LocalHost:
        """Find the ranks that share this host; every rank of the world calls it.

        Ranks that could open the same arenas, each other's among them, are on one host. Ranks
        with different FERRO_HOST_ID do not try.
        """
        n, me = group.world_size, group.rank
        native = bool(config.options.get("native_helper", True))
        if n == 1:
            return cls.of_single_rank()
        own, name, reason = None, _NO_NAME, ""
        if bool(config.options.get("shared_memory", True)):
            own, name, reason = _create_arena(n)
        digest = hashlib.sha256(config.host_id.encode()).digest()[:16]
        opened: dict[int, ShmSegment] = {}
        try:
            offer = _ARENA_OFFER.pack(0 if own is None else own.nbytes, name, digest)
            gathered = bootstrap_all_gather(group, offer, deadline)
            offers = [_ArenaOffer(*_ARENA_OFFER.unpack(raw)) for raw in gathered]
            if own is not None:
                opened = _open_arenas(offers, me)
            masks = bootstrap_all_gather(group, _bitmask(n, [me, *opened]), deadline)
        except BaseException:
            for segment in (own, *opened.values()):
                if segment is not None:
                    segment.close()
            raise
        if own is not None:
            own.unlink()
        without = [rank for rank, offer in enumerate(offers) if offer.nbytes == 0]
        if reason and _is_first_to_warn(me, without, config.addresses):
            _warn_of_tcp(reason)
        lowest = [masks.index(mask) for mask in masks]
        peers = {rank: segment for rank, segment in opened.items() if lowest[rank] == lowest[me]}
        return cls(me, lowest, HostArenas(me, own if peers else None, peers), native=native)

    def group_by_host(self, ranks: Sequence[int]) -> list[list[int]]:
        """Group the members of a group by host, given their ranks in the world; lists ascend."""
        hosts: dict[int, list[int]] = {}
        for member, rank in enumerate(ranks):
            hosts.setdefault(self._lowest_ranks[rank], []).append(member)
        return list(hosts.values())

    def open_region(self, group: TcpBackend, deadline: float) -> ShmRegion | None:
        """Map a region together with all ranks of `group`, which are on this host.

        The lowest rank creates the region and gives it a name, all ranks open it and tell each other, and the name is
        removed. Where one rank cannot map it, all return None.
        """
        layout, segment, reason = RegionLayout.of(group.world_size), None, ""
        name = _NO_NAME
        try:
            if group.rank == 0:
                segment, name, reason = _create_region(layout)
            offer = _REGION_OFFER.pack(name, layout.nbytes, layout.slot_bytes)
            gathered = bootstrap_all_gather(group, offer, deadline)
            name, nbytes, slot_bytes = _REGION_OFFER.unpack(gathered[0])
            if group.rank != 0 and any(name):
                layout = RegionLayout(group.world_size, slot_bytes)
                segment, reason = _map_region(name, nbytes, layout)
            has_native = self.native and NATIVE_IS_AVAILABLE
            answer = _REGION_ANSWER.pack(segment is not None, has_native, pure_python_is_safe())
            answers = bootstrap_all_gather(group, answer, deadline)
        except BaseException:
            if segment is not None:
                segment.close()
            raise
        finally:
            if any(name):
                unlink_name(name)  # every rank does it, because the owner may have died meanwhile
        unpacked = [_REGION_ANSWER.unpack(raw) for raw in answers]
        all_mapped, native, safe = (all(column) for column in zip(*unpacked, strict=True))
        if reason:
            _warn_of_tcp(
                f"gloo, rank {group.names[group.rank]}: {reason}. Give /dev/shm at least "
                f"{-(-layout.nbytes >> 20)} MiB for each group (in a container: --shm-size)"
            )
        if all_mapped and not (native or safe) and group.rank == 0:
            _warn_of_tcp(
                "gloo: shared memory on this processor needs ferro-gloo's native helper: install a "
                "C compiler, then ferro-gloo again"
            )
        if segment is None or not all_mapped or not (native or safe):
            return None
        self._regions.add(segment)
        return ShmRegion(segment, layout, group.rank, native=native, spin=self.spin)

    def close(self) -> None:
        """Give back the memory of all groups on the host, and that of `arenas` except for this rank's arrays.

        While another thread is in a collective, the memory is given back when no object refers to it.
        """
        if not is_used_by_other_threads():
            self.give_back()

    def give_back(self) -> None:
        """Give back the memory, whoever uses it."""
        self.exchange_memory.close()
        self.arenas.close()
        for segment in list(self._regions):
            segment.close()


_hosts: weakref.WeakSet[LocalHost] = weakref.WeakSet()


def _give_back_in_child() -> None:
    """Keep in a forked child only the arrays that it shares with its parent: it may outlive the parent for long."""
    for host in list(_hosts):
        host.give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_back_in_child)


def _create_arena(ranks: int) -> tuple[ShmSegment | None, bytes, str]:
    """Create and expose an arena; return it, its name, and the reason if there is none."""
    if not sys.platform.startswith("linux"):
        return None, _NO_NAME, f"gloo uses shared memory on Linux only, not on {sys.platform}"
    try:
        remove_stale_names()
        segment = ShmSegment.create(arena_bytes(ranks))
        return segment, segment.expose(), ""
    except OSError as error:
        remedy = "give it a tmpfs with room at /dev/shm (in a container: --shm-size)"
        return None, _NO_NAME, f"gloo: this process can share no memory ({error}): {remedy}"


def _open_arenas(offers: Sequence[_ArenaOffer], me: int) -> dict[int, ShmSegment]:
    """Open those of the other ranks' arenas that this process can open."""
    opened = {}
    for rank, offer in enumerate(offers):
        if rank != me and offer.nbytes and offer.host_id_digest == offers[me].host_id_digest:
            with suppress(OSError):
                opened[rank] = ShmSegment.open(offer.name, offer.nbytes)
    return opened


def _bitmask(ranks: int, chosen: Sequence[int]) -> bytes:
    return sum(1 << rank for rank in chosen).to_bytes(-(-ranks // 8), "little")


def _is_first_to_warn(me: int, without: Sequence[int], addresses: Sequence[str]) -> bool:
    """Return True if this rank is the first of several on its host that are `without` an arena.

    Where no memory is shared, only addresses tell which ranks may be on one host.
    """
    peers = [rank for rank, address in enumerate(addresses) if address == addresses[me]]
    return len(peers) > 1 and me == next(rank for rank in peers if rank in without)


def _create_region(layout: RegionLayout) -> tuple[ShmSegment | None, bytes, str]:
    """Create and expose a region; return it, its name, and the reason if there is none."""
    try:
        segment = ShmSegment.create(layout.nbytes)
        segment.reserve(0, layout.nbytes)
        return segment, segment.expose(), ""
    except OSError as error:
        return None, _NO_NAME, str(error)


def _map_region(name: bytes, nbytes: int, layout: RegionLayout) -> tuple[ShmSegment | None, str]:
    """Map the exposed region; return it, and the reason if this fails."""
    if nbytes != layout.nbytes:
        return None, "the offered region has an unexpected size"
    try:
        segment = ShmSegment.open(name, nbytes)
    except OSError as error:
        return None, str(error)
    segment.prefault(0, nbytes)
    return segment, ""


def _warn_of_tcp(reason: str) -> None:
    """Warn that a group or host uses TCP for this reason."""
    import logging  # its import is slow, and seldom needed

    logging.getLogger("ferro").warning("%s; collectives go over TCP", reason)
