"""Library: the MPI of this process: started once, or taken as the program left it, and ended once.

MPI can be started and ended once in a process. We start it when the first group is made, and end it
when the interpreter exits; a program that started it itself also ends it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading

from ferro import BackendUnavailable
from ferro.runtime.environment import usable_cores, variable
from ferro_mpi.mpi import MPI
from ferro_mpi.watchdog import Watchdog

_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}
_LEAST_TAG_LIMIT = 32767  # of any MPI
_END_S = 15.0  # how long ending MPI may take after a failure; others may still say goodbye

_lock = threading.Lock()
_library: Library | None = None


class Library:
    """The MPI of this process, in use.

    Attributes:
        name: the library's name and version.
        recovers: whether ranks can go on after one has died (ULFM).
        crowded: the ranks on this host are more than its cores.
        tag_limit: the largest tag of a message.
        watchdog: bounds calls that cannot be interrupted.
        broken: a group has died: ending MPI may hang.
    """

    def __init__(self) -> None:
        self.broken = False
        here = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.crowded = here.Get_size() > usable_cores()
        here.Free()
        self.name = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
        # What Open MPI's mpiexec sets for --with-ft ulfm; libraries tell it in no other way.
        recovery = variable("OMPI_MCA_mpi_ft_enable") or ""
        self.recovers = "Open MPI" in self.name and recovery.lower() in ("1", "true", "ulfm")
        self.tag_limit = int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or _LEAST_TAG_LIMIT)
        self.watchdog = Watchdog(recovers=self.recovers)
        self._pid = os.getpid()

    def finalize(self) -> None:
        """End MPI, after all groups were closed: `ferro` was asked to do so at exit after us.

        MPI waits for all ranks there. After a failure, here or of a group, that may be for ever.
        """
        if os.getpid() != self._pid or MPI.Is_finalized():
            return
        if self.broken or hasattr(sys, "last_value"):
            self.watchdog.bound_the_end(_END_S)
        MPI.Finalize()


def load() -> Library:
    """Return this process's MPI, starting it if nobody has; all processes of its world call it.

    Raises:
        BackendUnavailable: MPI has ended already, or does not let several threads call it.
    """
    global _library
    with _lock:
        if MPI.Is_finalized():
            raise BackendUnavailable(
                "mpi",
                "MPI has been finalized in this process, and cannot be started again",
                "Make groups before the program calls MPI.Finalize().",
            )
        if _library is None:
            ours = not MPI.Is_initialized()
            _check(MPI.Init_thread(MPI.THREAD_MULTIPLE) if ours else MPI.Query_thread(), ours)
            _library = Library()
            if ours:
                atexit.register(_library.finalize)
        return _library


def _check(level: int, ours: bool) -> None:
    """Refuse an MPI that one thread only may call: asynchronous operations have their own."""
    if level >= MPI.THREAD_MULTIPLE:
        return
    if ours:
        MPI.Finalize()
        reason = f"this MPI offers {_LEVELS[level]} only"
        remedy = "Use one that was built with MPI_THREAD_MULTIPLE."
    else:
        reason = f"the program started MPI with {_LEVELS[level]}"
        remedy = "Start it with MPI.Init_thread(MPI.THREAD_MULTIPLE), or let ferro start it."
    raise BackendUnavailable("mpi", f"{reason}, and ferro needs MPI_THREAD_MULTIPLE", remedy)
