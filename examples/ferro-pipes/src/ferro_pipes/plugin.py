"""What this distribution offers: the pipes backend. Importing it opens nothing."""

import os

from ferro import Availability, Backend, BackendConfig, BackendInfo, hookimpl


def _probe() -> Availability:
    return Availability(ok=os.name == "posix", reason="Unix sockets", hint="Use Linux or macOS.")


def _create(config: BackendConfig) -> Backend:
    from ferro_pipes.backend import PipesBackend  # here, so that who only looks does not pay

    return PipesBackend(config)


@hookimpl
def ferro_backends() -> list[BackendInfo]:
    """Offer pipes."""
    return [BackendInfo(name="pipes", summary="pipes on one host", probe=_probe, create=_create)]
