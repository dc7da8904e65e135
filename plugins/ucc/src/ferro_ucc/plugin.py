"""The hook implementation of ferro-ucc: it offers the backend "ucc". Importing it loads no library."""

from collections.abc import Sequence

from ferro import Availability, Backend, BackendConfig, BackendInfo, hookimpl


def _probe() -> Availability:
    from ferro_ucc.library import UnusableLibrary, dotted, find_library

    found = find_library()
    if isinstance(found, UnusableLibrary):
        return Availability(ok=False, reason=found.reason, hint=found.hint)
    version = dotted(found.version)
    return Availability(ok=True, reason=f"UCC {version} in {found.path}", version=version)


def _create(config: BackendConfig) -> Backend:
    from ferro_ucc.connect import connect
    from ferro_ucc.library import UccLibrary

    return connect(config, UccLibrary.load())


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer ucc, which is never a default."""
    return (
        BackendInfo(
            name="ucc",
            summary="collectives of the machine's UCC on NumPy arrays; no send and recv",
            probe=_probe,
            create=_create,
        ),
    )
