"""GroupInfo: the name, ranks, hosts, stores and settings of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ferro.observers import Observer
from ferro.types import Device

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store


def get_in_time(store: Store, key: str, deadline: float) -> bytes:
    """Return the value that another rank stores, or b"" if there is none at the deadline."""
    try:
        return store.get(key, deadline=deadline)
    except TimeoutError:
        return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """All that a group knows besides its backend."""

    name: str
    backend_name: str
    global_ranks: tuple[int, ...]  # ranks in the world, by rank in the group
    hosts: tuple[str, ...]  # host names, by rank in the group
    job_store: Store
    store: Store  # the part of the job's store that belongs to this group
    local_rank: int = 0  # number of this process on its host
    timeout_s: float = 60.0  # deadline of calls that give none
    devices: tuple[Device, ...] = (Device.CPU,)  # the devices whose buffers the backend takes
    host_copies: bool = False  # GPU arrays are copied through the host where the backend takes none
    observers: tuple[Observer, ...] = ()

    def describe(self, rank: int) -> str:
        """Name a rank with its host, for messages."""
        return f"rank {rank} (host {self.hosts[rank]})"

    def subgroup(self, ranks: Sequence[int], name: str, context: int) -> GroupInfo:
        """Make the info of the group numbered `context` of these ranks."""
        return replace(
            self,
            name=name,
            global_ranks=tuple(self.global_ranks[rank] for rank in ranks),
            hosts=tuple(self.hosts[rank] for rank in ranks),
            store=self.job_store.prefix(f"group/{context}"),
        )
