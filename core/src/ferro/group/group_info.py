"""GroupInfo: who belongs to a group and what its operations are carried out with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ferro.observers import Observer
from ferro.types import Device

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """What a group knows besides its backend.

    Attributes:
        name: the group's name.
        backend_name: the backend's name.
        global_ranks: ranks in the world, by rank in the group.
        hosts: host names, by rank in the group.
        local_rank: number of this process on its host.
        timeout_s: deadline of calls that give none, in seconds.
        devices: where the backend takes buffers.
        host_copies: a CPU backend copies GPU arrays through the host instead of refusing them.
        job: the store of the whole job.
        store: the part of it that belongs to this group.
        observers: told of each operation.
    """

    name: str
    backend_name: str
    global_ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    job: Store
    store: Store
    local_rank: int = 0
    timeout_s: float = 60.0
    devices: tuple[Device, ...] = (Device.CPU,)
    host_copies: bool = False
    observers: tuple[Observer, ...] = ()

    def who(self, rank: int) -> str:
        """Return a rank with its host, for messages."""
        return f"rank {rank} (host {self.hosts[rank]})"

    def some(self, ranks: Sequence[int], name: str, store: Store) -> GroupInfo:
        """Return the members of a group of some of these ranks."""
        return replace(
            self,
            name=name,
            global_ranks=tuple(self.global_ranks[rank] for rank in ranks),
            hosts=tuple(self.hosts[rank] for rank in ranks),
            store=store,
        )
