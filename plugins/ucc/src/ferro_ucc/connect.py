"""Connecting: from a configuration to the backend of the world, or the reason why not."""

from __future__ import annotations

import time

from ferro import Backend, BackendConfig
from ferro.errors import RendezvousError, UnsupportedError, UsageError
from ferro_ucc.backend import UccBackend
from ferro_ucc.context import Context
from ferro_ucc.library import VARIABLE, Library, dotted
from ferro_ucc.oob import OutOfBand
from ferro_ucc.sole import SoleBackend


def connect(config: BackendConfig, library: Library) -> Backend:
    """Connect to all other ranks; every rank does.

    Raises:
        BackendError: it could not connect.
        RendezvousError: a rank did not come, or has another version.
        UsageError: there is no such option.
        UnsupportedError: algorithms were fixed.
    """
    _check(config)
    if config.world_size == 1:
        return SoleBackend(config.choice)
    store = config.store.prefix("ucc")
    deadline = time.monotonic() + config.timeout_s
    ranks = OutOfBand(store, config.rank, config.world_size, deadline)
    try:
        _compare_versions(library, ranks)
        context = Context.create(library, ranks, config.lost)
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


def _compare_versions(library: Library, ranks: OutOfBand) -> None:
    """Make sure that all ranks have one version, which decides what they call."""
    mine = bytes(min(number, 255) for number in library.version)
    versions = [tuple(told) for told in ranks.gather(mine)]
    for rank, version in enumerate(versions):
        if version != tuple(mine):
            raise RendezvousError(
                f"rank {ranks.rank} has UCC {dotted(library.version)}, rank {rank} has UCC "
                f"{dotted(version)}: install the same on all hosts, or set {VARIABLE}",
                rank=ranks.rank,
                peer=rank,
            )
