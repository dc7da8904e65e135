"""The hooks of this distribution, which offer the pipes backend. Importing it opens nothing."""

import os

from ferro import Availability, Backend, BackendConfig, BackendInfo, hookimpl


def _probe() -> Availability:
    hint = "" if os.name == "posix" else "Use Linux or macOS."
    return Availability(ok=not hint, reason="Unix sockets", hint=hint)


def _create(config: BackendConfig) -> Backend:
    from ferro_pipes.backend import PipesBackend  # only the chosen backend is imported

    return PipesBackend(config)


@hookimpl
def ferro_backends() -> list[BackendInfo]:
    """Offer the pipes backend."""
    return [BackendInfo(name="pipes", summary="pipes on one host", probe=_probe, create=_create)]
