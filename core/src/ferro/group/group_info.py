"""GroupInfo: the name, ranks, hosts, stores and settings of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ferro.errors import FerroError
from ferro.observers import Observer
from ferro.types import Device

if TYPE_CHECKING:
    from ferro.rendezvous.store.interface import Store


def get_in_time(store: Store, key: str, deadline: float) -> bytes:
    """Return the value that another rank stores, or b"" if there is none at the deadline."""
    try:
        return store.get(key, deadline=deadline)
    except TimeoutError as error:
        if not isinstance(error, FerroError):
            raise  # it is the program's own, from a signal handler
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
    failures: list[tuple[str, int | None]] = field(default_factory=list)  # of this rank's groups; shared by all of them

    def describe(self, rank: int) -> str:
        """Name a rank with its host, for messages, and with its rank in the world where that is another."""
        world = self.global_ranks[rank]
        return f"rank {rank} ({f'rank {world} of the world, ' if world != rank else ''}host {self.hosts[rank]})"

    def log_of(self, rank: int) -> str:
        """Name the log of a rank: logs have the ranks of the world."""
        world = self.global_ranks[rank]
        return f"rank {rank}'s log" if world == rank else f"the log of rank {world} of the world"

    def subgroup(self, ranks: Sequence[int], name: str, context: int) -> GroupInfo:
        """Make the info of the group numbered `context` of these ranks."""
        return replace(
            self,
            name=name,
            global_ranks=tuple(self.global_ranks[rank] for rank in ranks),
            hosts=tuple(self.hosts[rank] for rank in ranks),
            store=self.job_store.prefix(f"group/{context}"),
        )
