"""Connecting: create the parts of a hybrid backend, each with a prefix of its own in the store."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from ferro import Backend, BackendConfig, RendezvousError, backends

from .backend import HybridBackend
from .composition import Composition


def connect(config: BackendConfig) -> HybridBackend:
    """Create every part, one after the other, on all ranks in the same order.

    Raises:
        UsageError: the options make no sense.
        BackendUnavailable: a part is not installed or cannot be used here, or a device has no default.
        RendezvousError: ranks would use different parts, or a part could not connect.
    """
    deadline = time.monotonic() + config.timeout_s
    composition = Composition.from_config(config)
    _compare(composition, config, deadline)
    created: dict[str, Backend] = {}
    with ExitStack() as undo:
        for name in composition.names:
            own = replace(
                config,
                store=config.store.prefix(f"hybrid/{name}"),
                timeout_s=max(1.0, deadline - time.monotonic()),
                requested=name,
                options=composition.options.get(name, {}),
            )
            created[name] = backends.create(backends.get(name), own)
            undo.callback(created[name].close)
        named, p2p = composition.collectives, created[composition.p2p]
        if isinstance(named, str):
            hybrid = HybridBackend(collectives=created[named], p2p=p2p)
        else:
            by_device = {device: created[name] for device, name in named.items()}
            hybrid = HybridBackend(collectives=by_device, p2p=p2p)
        undo.pop_all()
    return hybrid


def _compare(composition: Composition, config: BackendConfig, deadline: float) -> None:
    """Compare this rank's composition with rank 0's: the backends that can be used on their hosts may differ."""
    key = "hybrid/composition"
    if config.rank == 0:
        config.store.set(key, str(composition).encode())
        return
    theirs = config.store.get(key, deadline=deadline).decode()
    if theirs != str(composition):
        raise RendezvousError(
            f"rank {config.rank} would use hybrid with {composition}; rank 0 with {theirs}. Give all "
            "ranks the same backend_options, or name the backends: ferro.init('cpu:…,cuda:…')",
            rank=config.rank,
            peer=0,
        )
