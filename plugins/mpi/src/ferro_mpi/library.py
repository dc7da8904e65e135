"""MpiLibrary: the MPI of this process, which ferro starts and finalizes unless the program does.

MPI can be started and finalized only once in a process. ferro starts it when the first group is made, and finalizes it
when the interpreter exits; a program that has started MPI itself also finalizes it.

MPI_Finalize waits for all ranks, and holds the interpreter lock meanwhile. So ferro calls it only once all ranks are at
their exit, and waits for them in Python before. If a rank has died, or does not come in time after a failure, the
process ends without MPI_Finalize: mpiexec takes that for a failure, and may end the other ranks, so they get time.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress

from ferro import BackendUnavailable
from ferro.runtime.environment import usable_cores, variable
from ferro_mpi.mpi import MPI
from ferro_mpi.requests import PersistentRequests
from ferro_mpi.shared_memory import GroupMemory
from ferro_mpi.waiting import WaitMonitor
from ferro_mpi.watchdog import Watchdog

_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}
_LEAST_TAG_LIMIT = 32767  # of every MPI, by the standard
_EXCEPTION_S = 15.0  # after an uncaught exception, for the other ranks to save their work and to come to their exit
_FAILED_S = 30.0  # after another failure
_SHRINK_S = 5.0  # for threads that make groups of survivors, when all ranks are at their exit
_FINALIZE_S = 15.0  # for MPI_Finalize after a failure
_POLL_S = 2e-3
_MOST_POLL_S = 0.05
_COLLECT_AT = 200  # communicators; garbage that holds some is looked for from then on

_lock = threading.Lock()
_library: MpiLibrary | None = None


class MpiLibrary:
    """The MPI of this process, in use.

    Attributes:
        name: the library's name and version.
        recovers: True if ranks can go on after one has died (ULFM).
        oversubscribed: this host has more ranks than cores.
        blocks: True if collectives use MPI's blocking calls, because its nonblocking ones are much slower.
        tag_limit: the largest tag of a message.
        lock: held while a group begins to shrink.
        watchdog: ends blocking calls that are overdue.
        broken: True if a group has died, so that finalizing MPI may hang.
        shrinking: MPI's calls that make groups of survivors, in threads of their own.
        world_memory: the memory that all ranks share, where they are on one host.
    """

    def __init__(self) -> None:
        self.broken = False
        self.shrinking: list[Future[MPI.Intracomm]] = []
        self.world_memory: GroupMemory | None = None
        self._dropped: deque[tuple[tuple[MPI.Intracomm, ...], WaitMonitor]] = deque()
        self._open = 0
        self._collect_at = _COLLECT_AT
        host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.oversubscribed = host.Get_size() > usable_cores()
        host.Free()
        self.name = " ".join(MPI.Get_library_version().splitlines()[0].partition(",")[0].split())
        # Open MPI's mpiexec sets this for --with-ft ulfm; no call of the library tells it.
        recovery = variable("OMPI_MCA_mpi_ft_enable") or ""
        self.recovers = "Open MPI" in self.name and recovery.lower() in ("1", "true", "ulfm")
        self.blocks = "Open MPI" in self.name
        self.tag_limit = int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or _LEAST_TAG_LIMIT)
        self.watchdog = Watchdog(recovers=self.recovers)
        self._pid = os.getpid()
        self.lock = threading.Lock()
        self._at_exit = MPI.COMM_WORLD.Dup()  # for a barrier at exit of ranks on several hosts

    @property
    def forked(self) -> bool:
        """True in a forked child, which must not call MPI."""
        return os.getpid() != self._pid

    def opened(self) -> None:
        """Count a group's communicators."""
        self._open += 1

    def drop(self, comms: tuple[MPI.Intracomm, ...], monitor: WaitMonitor) -> None:
        """Free a garbage group's communicators when the next group is made; garbage is collected in any thread."""
        self._dropped.append((comms, monitor))

    def free_dropped(self) -> None:
        """Free the communicators of groups that the program dropped without closing them.

        MPI frees a communicator without messages to other ranks, so that ranks may do so at different times.
        """
        if self._open >= self._collect_at:
            gc.collect()
        while self._dropped:
            self.free(*self._dropped.popleft())
        self._collect_at = max(_COLLECT_AT, 2 * self._open) if self._open >= self._collect_at else self._collect_at

    def free(self, comms: tuple[MPI.Intracomm, ...], monitor: WaitMonitor) -> None:
        """Free a group's communicators, unless it was aborted: then MPI may still use them."""
        self._open -= 1
        if not monitor.aborted and not MPI.Is_finalized():
            with suppress(MPI.Exception):
                for comm in comms:
                    comm.Free()

    def finalize(self) -> None:
        """Finalize MPI at exit, after `ferro` has closed all groups."""
        if self.forked or MPI.Is_finalized():
            return
        failed = self.broken or _ended_by_exception()
        if not self._await_exits() or wait(self.shrinking, _SHRINK_S).not_done:
            return  # a thread in MPI would call it again after MPI_Finalize, which ends the whole job
        if failed:
            # The function's thread in C needs no interpreter lock, which MPI_Finalize holds.
            faulthandler.dump_traceback_later(_FINALIZE_S, exit=True, file=2)
        else:
            PersistentRequests.free_all()
        MPI.Finalize()
        if failed:
            faulthandler.cancel_dump_traceback_later()

    def _await_exits(self) -> bool:
        """Wait until all other ranks are at their exit, too; return False if one has died, or does not come."""
        memory, began, pause_s = self.world_memory, time.monotonic(), _POLL_S
        all_here: Callable[[], bool]
        if memory is not None:
            memory.end()
            all_here = memory.all_at_exit
        else:
            all_here = self._at_exit.Ibarrier().Test
        while not all_here():
            failed = self.broken or (memory is not None and bool(memory.died_ranks()))
            allowed_s = _EXCEPTION_S if _ended_by_exception() else _FAILED_S if failed else math.inf
            if time.monotonic() > began + allowed_s:
                awaited = "another rank" if memory is None else f"rank {', '.join(map(str, memory.awaited_ranks()))}"
                late = f"{awaited} has not ended {allowed_s:g} s after a failure here"
                sys.stderr.write(f"ferro: {late}; this process ends without it\n")
                return False
            time.sleep(pause_s)
            pause_s = min(1.1 * pause_s, _MOST_POLL_S)
        return memory is None or not memory.died_ranks()


def _ended_by_exception() -> bool:
    """Say whether an exception ended the program; interactive sessions keep those after which they went on."""
    return hasattr(sys, "last_value") and not (hasattr(sys, "ps1") or sys.flags.interactive)


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
            try:
                _library = MpiLibrary()
            except RuntimeError as error:  # of the watchdog's thread
                limits = "Raise the limit of processes (ulimit -u) or of the container's threads (pids.max)."
                raise BackendUnavailable("mpi", f"a thread cannot be started: {error}", limits) from error
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
