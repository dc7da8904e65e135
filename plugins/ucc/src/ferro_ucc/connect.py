"""Connecting: from a `BackendConfig` to the backend of the world."""

from __future__ import annotations

import time

from ferro import Backend, BackendConfig
from ferro.errors import RendezvousError, UnsupportedError, UsageError
from ferro_ucc.backend import SingleRankBackend, UccBackend
from ferro_ucc.context import Context
from ferro_ucc.library import VARIABLE, UccLibrary, dotted
from ferro_ucc.oob import OobAllGather


def connect(config: BackendConfig, library: UccLibrary) -> Backend:
    """Connect this rank to all others. Every rank calls it.

    Raises:
        BackendError: UCC failed to connect.
        RendezvousError: a rank did not connect in time, or has another version of UCC.
        UsageError: the user gave backend options; ucc has none.
        UnsupportedError: the user chose algorithms; UCC has its own.
    """
    _check(config)
    if config.world_size == 1:
        return SingleRankBackend(config.choice)
    store = config.store.prefix("ucc")
    deadline = time.monotonic() + config.timeout_s
    oob = OobAllGather(store, config.rank, config.world_size, deadline)
    try:
        _compare_versions(library, oob)
        context = Context.create(library, oob, config.lost)
    except TimeoutError as error:
        raise RendezvousError(
            f"rank {config.rank} of {config.world_size} could not connect through UCC within "
            f"{config.timeout_s:.3g} s: {error}. Read the others' logs first; UCX_TLS and "
            "UCX_NET_DEVICES choose the transport, UCC_LOG_LEVEL=info says more",
            rank=config.rank,
        ) from error
    return UccBackend(context, store, range(config.world_size), config.rank, config.choice)


def _check(config: BackendConfig) -> None:
    if config.options:
        raise UsageError(f"ucc has no options, but backend_options has {sorted(config.options)}")
    if config.choice.fixed:
        raise UnsupportedError(
            f"ucc cannot run the algorithms {sorted(config.choice.fixed.values(), key=str)}: UCC "
            "has its own; its variable UCC_TL_UCP_TUNE chooses among them"
        )


def _compare_versions(library: UccLibrary, oob: OobAllGather) -> None:
    """Check that all ranks have the same version of UCC, on which the functions that they call depend."""
    mine = bytes(min(number, 255) for number in library.version)
    versions = [tuple(value) for value in oob.gather(mine)]
    for rank, version in enumerate(versions):
        if version != tuple(mine):
            raise RendezvousError(
                f"rank {oob.rank} has UCC {dotted(library.version)}, rank {rank} has UCC "
                f"{dotted(version)}: install the same on all hosts, or set {VARIABLE}",
                rank=oob.rank,
                peer=rank,
            )
