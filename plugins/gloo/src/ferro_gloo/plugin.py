"""The hook implementation that offers the gloo backend; importing it opens nothing."""

from collections.abc import Sequence

from ferro import Availability, Backend, BackendConfig, BackendInfo, hookimpl


def _probe() -> Availability:
    return Availability(ok=True, reason="TCP, shared memory on Linux; needs no library")


def _create(config: BackendConfig) -> Backend:
    from ferro_gloo.backend import GlooBackend

    return GlooBackend.connect(config)


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer gloo, as the default under every launcher that no other backend claims."""
    return (
        BackendInfo(
            name="gloo",
            summary="collectives on NumPy arrays through shared memory and authenticated TCP",
            probe=_probe,
            create=_create,
            default_under=("*",),
        ),
    )
