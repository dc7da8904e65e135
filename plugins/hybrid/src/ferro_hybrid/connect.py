"""Connecting the parts of a hybrid backend, each in a corner of the store of its own."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from ferro import Backend, BackendConfig, RendezvousError, backends

from .backend import HybridBackend
from .plan import Plan


def connect(config: BackendConfig) -> HybridBackend:
    """Make every part, one after the other, on all ranks in the same order.

    Raises:
        UsageError, BackendUnavailable: see `Plan.of`.
        RendezvousError: ranks are to be made of different backends; and see the parts.
    """
    deadline = time.monotonic() + config.timeout_s
    plan = Plan.of(config)
    _compare(plan, config, deadline)
    made: dict[str, Backend] = {}
    with ExitStack() as undo:
        for name in plan.names:
            own = replace(
                config,
                store=config.store.prefix(f"hybrid/{name}"),
                timeout_s=max(1.0, deadline - time.monotonic()),
                requested=name,
                options=plan.options.get(name, {}),
            )
            made[name] = backends.get(name).create(own)
            undo.callback(made[name].close)
        mapped, p2p = plan.collectives, made[plan.p2p]
        if isinstance(mapped, str):
            hybrid = HybridBackend(collectives=made[mapped], p2p=p2p)
        else:
            by_device = {device: made[name] for device, name in mapped.items()}
            hybrid = HybridBackend(collectives=by_device, p2p=p2p)
        undo.pop_all()
    return hybrid


def _compare(plan: Plan, config: BackendConfig, deadline: float) -> None:
    """Hold this rank's plan against rank 0's: what is found on their hosts may differ."""
    key = "hybrid/plan"
    if config.rank == 0:
        config.store.set(key, str(plan).encode())
        return
    theirs = config.store.get(key, deadline=deadline).decode()
    if theirs != str(plan):
        raise RendezvousError(
            f"rank {config.rank} would use hybrid with {plan}; rank 0 with {theirs}. Give all "
            "ranks the same backend_options, or name the backends: ferro.init('cpu:…,cuda:…')",
            rank=config.rank,
            peer=0,
        )
