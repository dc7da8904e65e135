"""BackendConfig: what a backend is created with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ferro.collectives.choose import Choice

if TYPE_CHECKING:
    from ferro.rendezvous.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """What a backend is created with.

    Attributes:
        rank: this process's rank.
        world_size: number of ranks.
        store: all that the ranks share before they are connected; keys are this group's own.
        group_name: name of the group, for messages.
        secret: the job's secret, with which every connection is authenticated.
        addresses: for every rank the address of its own by which it reached the store.
        store_host: address of the store as this rank reached it: where ranks live that reached
            it over loopback.
        timeout_s: seconds that connecting may take.
        choice: which algorithm serves which call.
        host_id: what the user calls this rank's host, "" for nothing: ranks with different ones
            share no memory.
        local_rank: number of this process on its host.
        launcher: what started it; see `BackendInfo.default_under`.
        requested: the backend as the user named it, such as "gloo" or "cpu:gloo,cuda:nccl".
        lost: returns the world ranks whose process ended without a farewell, or that left by an
            exception, as the job's store has noticed: for backends whose library never does. A
            round trip, for slow paths; never raises.
        options: the backend's own options, by name.
    """

    rank: int
    world_size: int
    store: Store
    group_name: str = "world"
    secret: bytes = field(default=b"", repr=False)
    addresses: tuple[str, ...] = ()
    store_host: str = "127.0.0.1"
    timeout_s: float = 60.0
    choice: Choice = field(default_factory=Choice)
    host_id: str = ""
    local_rank: int = 0
    launcher: str = "single"
    requested: str = ""
    lost: Callable[[], frozenset[int]] = frozenset
    options: Mapping[str, object] = field(default_factory=dict)
