"""Place: what the groups of one process share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ferro.collectives import Choice
from ferro.rendezvous import Store
from ferro_nccl.connect import connect
from ferro_nccl.library import Communicator, Gpu, Library
from ferro_nccl.placement import Card, gpu_name, sharing_allowed
from ferro_nccl.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the groups of one process share.

    Attributes:
        library: CuPy and NCCL.
        gpu: the process's.
        store: the world's store, where groups meet by their numbers.
        choice: what the user chose of algorithms.
        settings: what the user chose besides.
        timeout_s: how long making a group may take.
        lost: see `BackendConfig.lost`.
    """

    library: Library
    gpu: Gpu
    store: Store
    choice: Choice
    settings: Settings
    timeout_s: float
    lost: Callable[[], frozenset[int]]

    def part(self, context: int) -> Store:
        """Return the part of the store that belongs to a group."""
        return self.store.prefix(f"nccl/{context}")

    def lost_of(self, members: Sequence[int]) -> list[int]:
        """Return who of a group died, by rank in it, of ranks in the world. A round trip."""
        gone = self.lost()
        return [rank for rank, member in enumerate(members) if member in gone]

    def connect(self, rank: int, world_size: int, context: int) -> Communicator:
        """Make the communicator of a new group; every rank of it does."""
        card = Card(
            rank=rank,
            host=socket.gethostname(),
            gpu=gpu_name(self.gpu.uuid),
            version=self.library.version(),
            sharing=sharing_allowed(),
        )
        deadline = time.monotonic() + self.timeout_s
        store = self.part(context)
        return connect(self.library, self.gpu, store, card, world_size, deadline)
