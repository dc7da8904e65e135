"""The world's group: MPI is started, and its world has to be the one that was launched."""

from __future__ import annotations

import time
from typing import cast

import numpy as np

from ferro import BackendConfig, BackendUnavailable, RendezvousError, UsageError
from ferro_mpi.backend import MpiBackend
from ferro_mpi.endpoint import Endpoint
from ferro_mpi.library import load
from ferro_mpi.mpi import MPI


def connect(config: BackendConfig) -> MpiBackend:
    """Return the backend of the world, after starting MPI if nobody has; every rank calls it.

    Raises:
        UsageError: mpi has no options.
        RendezvousError: a rank did not come.
        BackendUnavailable: MPI cannot be used, or its world has another size.
    """
    if config.options:
        raise UsageError(f"mpi has no options: {', '.join(sorted(config.options))}")
    _line_up(config)
    return MpiBackend(_world(config.rank, config.world_size, config.timeout_s), config.choice)


def introduce(rank: int, world_size: int, message: bytes | None, deadline: float) -> bytes:
    """Return rank 0's message on all ranks; see `BackendInfo.introduce`."""
    endpoint = _world(rank, world_size, max(1.0, deadline - time.monotonic()))
    comm = endpoint.comm
    length = np.array([len(message or b"")], np.int64)
    endpoint.run(comm.Bcast, comm.Ibcast, (length, 0), deadline)
    told = np.frombuffer(bytearray(message or bytes(length[0])), np.uint8)
    endpoint.run(comm.Bcast, comm.Ibcast, (told, 0), deadline)
    endpoint.close()
    return told.tobytes()


def _line_up(config: BackendConfig) -> None:
    """Wait until no rank needs the store any more, where this process may host it.

    Starting MPI holds the interpreter lock until all ranks do the same. Rank 0, whose threads could
    not answer the others' requests meanwhile, starts last.
    """
    if config.rank:
        config.store.set(f"mpi/starts/{config.rank}", b"1")
        return
    deadline = time.monotonic() + config.timeout_s
    for rank in range(1, config.world_size):
        try:
            config.store.get(f"mpi/starts/{rank}", deadline=deadline)
        except TimeoutError as error:
            raise RendezvousError(
                f"rank {rank} did not start MPI within {config.timeout_s:.3g} s: read its log",
                rank=0,
                peer=rank,
            ) from error


def _world(rank: int, world_size: int, timeout_s: float) -> Endpoint:
    """Return communicators of our own of all ranks, in our order."""
    library = load()
    size = MPI.COMM_WORLD.Get_size()
    if size != world_size:
        raise BackendUnavailable(
            "mpi",
            f"MPI's world has {size} {'process' if size == 1 else 'processes'}, but {world_size} "
            f"ranks were launched, with {library.name}",
            "Start the program with the mpiexec that belongs to this MPI, the one beside this "
            "Python where MPI came as a wheel: another one gives worlds of one.",
        )
    comm = cast(MPI.Intracomm, MPI.COMM_WORLD.Split(0, rank))
    return Endpoint(library, comm, timeout_s)
