"""MPI's exceptions become ferro's errors here, once."""

from __future__ import annotations

from ferro import BackendError, CollectiveMismatch, FerroError, GroupClosed, PeerLost
from ferro_mpi.mpi import MPI


def converted(error: MPI.Exception, comm: MPI.Intracomm) -> FerroError:
    """Return ferro's error for what a call raised in a group whose ranks are those of `comm`."""
    kind, text = error.Get_error_class(), error.Get_error_string()
    if kind in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED):
        lost = _failed_ranks(comm)
        if lost:
            return PeerLost(f"MPI says that rank {lost[0]} has failed", peer=lost[0])
        return GroupClosed("the group was aborted: MPI has revoked its communicator")
    if kind == MPI.ERR_TRUNCATE:
        return CollectiveMismatch("a message came that is longer than expected")
    return BackendError(f"MPI failed: {text}", code=error.Get_error_code())


def _failed_ranks(comm: MPI.Intracomm) -> list[int]:
    """Return the ranks of a communicator that MPI knows to have failed."""
    try:
        failed, group = comm.Get_failed(), comm.Get_group()
        ranks = failed.Translate_ranks(None, group)
    except (MPI.Exception, NotImplementedError):
        return []
    return sorted(int(rank) for rank in ranks if rank != MPI.UNDEFINED)
