"""Import mpi4py's MPI without starting it, and translate its exceptions into ferro's errors.

Importing `mpi4py.MPI` starts MPI unless mpi4py is told not to, so every module of this package
imports MPI from here. A program that imported it earlier has started it; see `library`.
"""

from __future__ import annotations

import sys

import mpi4py

from ferro import BackendError, CollectiveMismatch, FerroError, GroupClosed, PeerLost

if "mpi4py.MPI" not in sys.modules:
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False

from mpi4py import MPI

__all__ = ["MPI", "to_ferro_error"]

_PROCESS_FAILURES = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)


def to_ferro_error(error: MPI.Exception, comm: MPI.Intracomm) -> FerroError:
    """Translate MPI's exception, raised in a group whose ranks are those of `comm`."""
    kind, text = error.Get_error_class(), " ".join(error.Get_error_string().split())
    if kind == MPI.ERR_TRUNCATE:
        return CollectiveMismatch("a message came that is longer than expected")
    failed = _failed_ranks(comm)  # whatever the kind: a death shows as ERR_OTHER and ERR_IN_STATUS, too
    if failed:
        return PeerLost(f"MPI says that rank {failed[0]} has failed", peer=failed[0])
    if kind in _PROCESS_FAILURES:
        return GroupClosed("the group was aborted: MPI has revoked its communicator")
    if "Too many communicators" in text:
        text += ". Every group takes two of MPI's communicators: close() the groups that you are done with"
    return BackendError(f"MPI failed: {text}", code=error.Get_error_code())


def _failed_ranks(comm: MPI.Intracomm) -> list[int]:
    """List the ranks of a communicator that MPI knows to have failed."""
    try:
        failed, group = comm.Get_failed(), comm.Get_group()
        ranks = failed.Translate_ranks(None, group)
    except (MPI.Exception, NotImplementedError):
        return []
    return sorted(int(rank) for rank in ranks if rank != MPI.UNDEFINED)
