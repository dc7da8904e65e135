"""Context: this process's UCC connections to the other ranks, which all groups share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from ctypes import byref, c_void_p

from ferro import BackendError
from ferro_ucc import abi
from ferro_ucc.library import UccLibrary, is_running
from ferro_ucc.oob import OobAllGather, OobCallbacks

_PATIENCE_S = 0.02  # how long one test of an out-of-band all-gather may take
_GRACE_S = 1.0  # how long the library may take to return after a callback reported a passed deadline
_CLOSE_S = 2.0  # how long the other ranks may take to close, too
_DESTROY_S = 1.0  # how long the destruction of a team may take

# libucc may still write to the memory of these objects, so they live until the process ends.
_abandoned: list[object] = []


class Context:
    """UCC's connections to the other ranks of the world.

    One lock is held in all calls of the library, which are short: some builds are not thread-safe.

    Args:
        library: libucc.
        oob: the world's out-of-band all-gathers.
        lost: returns the ranks that died; see `BackendConfig.lost`.

    Attributes:
        library: libucc.
        lost: as given.
        lock: held in every call of the library.
        handle: the `ucc_context_h`.
    """

    def __init__(self, library: UccLibrary, oob: OobAllGather, lost: Callable[[], frozenset[int]]) -> None:
        self.library = library
        self.lost = lost
        self.lock = threading.Lock()
        self.handle = c_void_p()
        self._oob = oob
        self._callbacks = OobCallbacks(oob, _PATIENCE_S)
        self._lib = c_void_p()
        self._teams: dict[int, object] = {}
        self._broken = False

    @classmethod
    def create(cls, library: UccLibrary, oob: OobAllGather, lost: Callable[[], frozenset[int]]) -> Context:
        """Connect to the other ranks. Every rank calls it.

        Raises:
            BackendError: the library failed.
            RendezvousError: the store is gone.
            TimeoutError: a rank did not connect by the deadline of `oob`.
        """
        context = cls(library, oob, lost)
        errors = _run_in_thread(context._open, oob.deadline - time.monotonic())
        if errors is None:
            context.abandon(context)
            raise TimeoutError(f"UCC did not connect rank {oob.rank} in time")
        if errors:
            context.abandon(context)
            raise context._callbacks.error or errors[0]
        return context

    def progress(self) -> None:
        """Let the library make progress with all operations that have begun."""
        with self.lock:
            status = self.library.progress(self.handle)
        if status < 0:
            raise self.library.error(status, "ucc_context_progress")

    def keep(self, team: c_void_p, used: object) -> None:
        """Keep a team and the callbacks that it uses until it is released or the context is closed."""
        assert team.value is not None
        self._teams[team.value] = used

    def release(self, team: int) -> None:
        """Destroy a team on this rank; none of its operations may be running."""
        used = self._teams.pop(team, None)
        deadline = time.monotonic() + _DESTROY_S
        while True:
            with self.lock:
                status = self.library.status("ucc_team_destroy", c_void_p(team))
            if not is_running(status):
                return
            if time.monotonic() > deadline:
                self.abandon(team, used)
                return
            self.progress()

    def abandon(self, *used: object) -> None:
        """Keep objects until the process ends: after a failed operation the library may still use their memory."""
        self._broken = True
        _abandoned.append((self, used))

    def close(self) -> None:
        """Disconnect, if all ranks close within a short time.

        Otherwise the connections stay until the process ends: UCC would wait forever for a rank that is gone.
        """
        if self._broken or not self._all_close():
            self.abandon(self)
            return
        self._oob.deadline = time.monotonic() + _CLOSE_S
        if _run_in_thread(self._destroy, _CLOSE_S) != []:
            self.abandon(self)

    def _open(self) -> None:
        library = self.library
        config = c_void_p()
        library.status("ucc_lib_config_read", None, None, byref(config))
        params = abi.LibParams(mask=abi.LIB_FIELD_THREAD_MODE, thread_mode=abi.THREAD_SINGLE)
        major, minor, _ = library.version
        library.status("ucc_init_version", major, minor, byref(params), config, byref(self._lib))
        library.release("ucc_lib_config_release", config)
        library.status("ucc_context_config_read", self._lib, None, byref(config))
        wanted = abi.ContextParams(
            mask=abi.CONTEXT_FIELD_TYPE | abi.CONTEXT_FIELD_OOB, type=abi.CONTEXT_SHARED, oob=self._callbacks.table
        )
        library.status("ucc_context_create", self._lib, byref(wanted), config, byref(self.handle))
        library.release("ucc_context_config_release", config)

    def _all_close(self) -> bool:
        """Make progress until all ranks close or time is up, since other ranks may still wait for messages."""
        self._oob.deadline = time.monotonic() + _CLOSE_S
        try:
            closing = self._oob.start(b"c")
            while not closing.poll(_PATIENCE_S):
                self.progress()
        except Exception:  # noqa: BLE001 - closing must not fail
            return False
        return True

    def _destroy(self) -> None:
        for team in tuple(self._teams):  # their groups were not closed
            self.release(team)
        with self.lock:
            self.library.status("ucc_context_destroy", self.handle)
            self.library.status("ucc_finalize", self._lib)


def _run_in_thread(action: Callable[[], None], seconds: float) -> list[BaseException] | None:
    """Run an action that may block in C; return its errors, or None if it has not ended in time."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - returned to the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, name="ferro-ucc", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # at the limit of threads, or in an exit handler from Python 3.12 on
        limits = "raise the limit of processes (ulimit -u) or of the container's threads (pids.max)"
        return [BackendError(f"UCC needs a thread, and none can be started ({error}): {limits}")]
    thread.join(max(0.0, seconds) + _GRACE_S)
    return None if thread.is_alive() else errors
