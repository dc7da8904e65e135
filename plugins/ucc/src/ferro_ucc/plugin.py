"""What this distribution offers: the UCC backend. Importing it starts nothing."""

from collections.abc import Sequence

from ferro import BackendInfo, hookimpl


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer ucc."""
    return ()
