"""The objects that all groups of one process share: the user's options, the GPU, the store."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ferro.collectives import Choice
from ferro.errors import UsageError
from ferro.rendezvous import Store
from ferro_nccl.bootstrap import connect
from ferro_nccl.library import Communicator, Gpu, NcclLibrary
from ferro_nccl.placement import RankPlacement, gpu_name, sharing_allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclOptions:
    """The `backend_options` of `ferro.init("nccl")`.

    Attributes:
        device: number of the GPU to take; None for that of the local rank.
        check_calls: compare the ranks' calls before each collective, on the host: a difference raises
            CollectiveMismatch at once. With it, the host waits in every collective.
    """

    device: int | None = None
    check_calls: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> NcclOptions:
        """Check options and their values.

        Raises:
            UsageError: there is no such option, or no such value.
        """
        unknown = sorted(set(options) - {"device", "check_calls"})
        if unknown:
            raise UsageError(
                f"nccl has no option {', '.join(unknown)}: backend_options may hold device and check_calls"
            )
        device, check = options.get("device"), options.get("check_calls", False)
        number = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if device is not None and not number:
            raise UsageError(f"nccl's option device is the number of a GPU, not {device!r}")
        if not isinstance(check, bool):
            raise UsageError(f"nccl's option check_calls is True or False, not {check!r}")
        return cls(device=device if isinstance(device, int) else None, check_calls=check)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessContext:
    """The objects that all groups of one process share.

    Attributes:
        library: CuPy and NCCL.
        gpu: the process's GPU.
        store: the world's store, of which each group uses a part of its own.
        choice: the user's choice of algorithms.
        options: the user's options.
        timeout_s: how long making a group may take.
        lost: see `BackendConfig.lost`.
    """

    library: NcclLibrary
    gpu: Gpu
    store: Store
    choice: Choice
    options: NcclOptions
    timeout_s: float
    lost: Callable[[], frozenset[int]]

    def group_store(self, context: int) -> Store:
        """Get the part of the store that belongs to a group."""
        return self.store.prefix(f"nccl/{context}")

    def lost_ranks(self, members: Sequence[int]) -> list[int]:
        """List the dead ranks of a group, whose `members` are ranks of the world. It asks the store."""
        dead = self.lost()
        return [rank for rank, member in enumerate(members) if member in dead]

    def connect(self, rank: int, world_size: int, context: int) -> Communicator:
        """Make the communicator of a new group; every rank of the group calls this."""
        placement = RankPlacement(
            rank=rank,
            host=socket.gethostname(),
            gpu=gpu_name(self.gpu.uuid),
            version=self.library.version(),
            sharing=sharing_allowed(),
        )
        deadline = time.monotonic() + self.timeout_s
        store = self.group_store(context)
        return connect(self.library, self.gpu, store, placement, world_size, deadline)
