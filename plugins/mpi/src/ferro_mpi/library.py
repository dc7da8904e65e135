"""MpiLibrary: the MPI of this process, which ferro starts and finalizes unless the program does.

MPI can be started and finalized only once in a process. ferro starts it when the first group is made, and finalizes it
when the interpreter exits; a program that has started MPI itself also finalizes it.
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
_LEAST_TAG_LIMIT = 32767  # of every MPI, by the standard
_FINALIZE_S = 15.0  # for finalizing MPI after a failure; other ranks may still be leaving

_lock = threading.Lock()
_library: MpiLibrary | None = None


class MpiLibrary:
    """The MPI of this process, in use.

    Attributes:
        name: the library's name and version.
        recovers: True if ranks can go on after one has died (ULFM).
        oversubscribed: this host has more ranks than cores.
        tag_limit: the largest tag of a message.
        watchdog: ends blocking calls that are overdue.
        broken: True if a group has died, so that finalizing MPI may hang.
    """

    def __init__(self) -> None:
        self.broken = False
        host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.oversubscribed = host.Get_size() > usable_cores()
        host.Free()
        self.name = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
        # Open MPI's mpiexec sets this for --with-ft ulfm; no call of the library tells it.
        recovery = variable("OMPI_MCA_mpi_ft_enable") or ""
        self.recovers = "Open MPI" in self.name and recovery.lower() in ("1", "true", "ulfm")
        self.tag_limit = int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or _LEAST_TAG_LIMIT)
        self.watchdog = Watchdog(recovers=self.recovers)
        self._pid = os.getpid()

    def finalize(self) -> None:
        """Finalize MPI at exit, after `ferro` has closed all groups.

        MPI then waits for all ranks; after a failure of this process or of a group it may wait for ever.
        """
        if os.getpid() != self._pid or MPI.Is_finalized():
            return
        if self.broken or hasattr(sys, "last_value"):
            self.watchdog.exit_within(_FINALIZE_S)
        MPI.Finalize()


def load() -> MpiLibrary:
    """Return this process's MPI, and start it if necessary; all processes of its world call this.

    Raises:
        BackendUnavailable: MPI has been finalized, or does not let several threads call it.
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
            level = MPI.Init_thread(MPI.THREAD_MULTIPLE) if ours else MPI.Query_thread()
            _check_thread_level(level, ours)
            _library = MpiLibrary()
            if ours:
                atexit.register(_library.finalize)
        return _library


def _check_thread_level(level: int, ours: bool) -> None:
    """Refuse an MPI that only one thread may call, because asynchronous operations run in another thread."""
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
