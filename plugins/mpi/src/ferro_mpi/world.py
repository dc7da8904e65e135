"""The group of all ranks: starting MPI, and checking the size of its world."""

from __future__ import annotations

import time
from typing import cast

import numpy as np

from ferro import BackendConfig, BackendUnavailable, RendezvousError, UsageError
from ferro_mpi.backend import MpiBackend
from ferro_mpi.communicator import LostRanks, MpiCommunicator
from ferro_mpi.library import load
from ferro_mpi.mpi import MPI


def connect(config: BackendConfig) -> MpiBackend:
    """Make the backend of all ranks, and start MPI if necessary; every rank calls this.

    Raises:
        UsageError: mpi has no options.
        RendezvousError: a rank did not come.
        BackendUnavailable: MPI cannot be used, or its world has another size.
    """
    if config.options:
        raise UsageError(f"mpi has no options: {', '.join(sorted(config.options))}")
    _await_other_starts(config)
    communicator = _world_communicator(config.rank, config.world_size, config.timeout_s, config.lost)
    return MpiBackend(communicator, config.choice)


def broadcast_bootstrap(rank: int, world_size: int, message: bytes | None, deadline: float) -> bytes:
    """Broadcast rank 0's message before any group exists; see `BackendInfo.bootstrap_broadcast`."""
    communicator = _world_communicator(rank, world_size, max(1.0, deadline - time.monotonic()), frozenset)
    comm = communicator.comm
    length = np.array([len(message or b"")], np.int64)
    communicator.run(comm.Ibcast, (length, 0), deadline)
    received = np.frombuffer(bytearray(message or bytes(length[0])), np.uint8)
    communicator.run(comm.Ibcast, (received, 0), deadline)
    communicator.close()
    return received.tobytes()


def _await_other_starts(config: BackendConfig) -> None:
    """Make rank 0, which may host the store, start MPI last, when the other ranks need the store no more.

    Starting MPI holds the interpreter lock until all ranks start it, so the store's threads on rank 0 could not answer
    the others.
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
                f"rank {rank} did not start MPI within {config.timeout_s:.3g} s: read its log", rank=0, peer=rank
            ) from error


def _world_communicator(rank: int, world_size: int, timeout_s: float, lost: LostRanks) -> MpiCommunicator:
    """Make ferro's own communicators of all ranks, in the order of ferro's ranks."""
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
    communicator = MpiCommunicator(library, comm, timeout_s, lost)
    library.world_memory = communicator.memory
    return communicator
