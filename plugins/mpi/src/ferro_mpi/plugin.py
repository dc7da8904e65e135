"""What this distribution offers: the MPI backend. Importing it starts nothing."""

from collections.abc import Sequence

from ferro import BackendInfo, hookimpl


@hookimpl
def ferro_backends() -> Sequence[BackendInfo]:
    """Offer mpi."""
    return ()
