"""Context: this process's end of UCC's connections, which all groups share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from ctypes import byref, c_void_p

from ferro_ucc import abi
from ferro_ucc.library import Library, is_running
from ferro_ucc.oob import Callbacks, OutOfBand

_PATIENCE_S = 0.02  # of a question while the library waits for the answer only
_GRACE_S = 1.0  # for the library to return once it was told that the deadline has passed
_CLOSE_S = 2.0  # how long the end waits for the other ranks to come to theirs
_DESTROY_S = 1.0  # how long a team may take to go

# What libucc may still write to, though nobody waits for it any more: kept for ever.
_abandoned: list[object] = []


class Context:
    """UCC's connections to the other ranks of the world.

    All calls of the library are made under one lock: then it needs no thread safety of its own,
    which some builds lack, and calls are short.

    Args:
        library: libucc.
        ranks: the world's all-gathers out of band.
        lost: see `BackendConfig.lost`.

    Attributes:
        library: libucc.
        lost: as given.
        lock: held in every call of the library.
        handle: the context.
    """

    def __init__(self, library: Library, ranks: OutOfBand, lost: Callable[[], frozenset[int]]) -> None:
        self.library = library
        self.lost = lost
        self.lock = threading.Lock()
        self.handle = c_void_p()
        self._ranks = ranks
        self._callbacks = Callbacks(ranks, _PATIENCE_S)
        self._lib = c_void_p()
        self._teams: dict[int, object] = {}
        self._broken = False

    @classmethod
    def create(cls, library: Library, ranks: OutOfBand, lost: Callable[[], frozenset[int]]) -> Context:
        """Connect to the other ranks; every rank does.

        Raises:
            BackendError: the library could not.
            RendezvousError: the store is gone.
            TimeoutError: a rank did not come by the deadline of `ranks`.
        """
        context = cls(library, ranks, lost)
        ended = _bounded(context._open, ranks.deadline - time.monotonic())
        if ended is None:
            context.abandon(context)
            raise TimeoutError(f"UCC did not connect rank {ranks.rank} in time")
        if ended:
            context.abandon(context)
            raise context._callbacks.error or ended[0]
        return context

    def progress(self) -> None:
        """Let the library move on with everything that is under way."""
        with self.lock:
            status = self.library.progress(self.handle)
        if status < 0:
            raise self.library.error(status, "ucc_context_progress")

    def keep(self, team: c_void_p, used: object) -> None:
        """Take a team over, with what it calls, until it is released or the context closed."""
        assert team.value is not None
        self._teams[team.value] = used

    def release(self, team: int) -> None:
        """Destroy a team, on this rank; the library must not be at work for it."""
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
        """Keep what the library may still use after an operation that did not end well."""
        self._broken = True
        _abandoned.append((self, used))

    def close(self) -> None:
        """Disconnect, if all ranks come to do so soon; never waits long for them.

        Otherwise the connections stay until the process ends: UCC would wait without end for a
        rank that is gone.
        """
        if self._broken or not self._all_come():
            self.abandon(self)
            return
        self._ranks.deadline = time.monotonic() + _CLOSE_S
        if _bounded(self._destroy, _CLOSE_S) != []:
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

    def _all_come(self) -> bool:
        """Let what others still wait for go out, until all ranks are here or time is up."""
        self._ranks.deadline = time.monotonic() + _CLOSE_S
        try:
            closing = self._ranks.start(b"c")
            while not closing.poll(_PATIENCE_S):
                self.progress()
        except Exception:  # noqa: BLE001 - whatever it is, the end must not fail
            return False
        return True

    def _destroy(self) -> None:
        for team in tuple(self._teams):  # of groups that nobody closed
            self.release(team)
        with self.lock:
            self.library.status("ucc_context_destroy", self.handle)
            self.library.status("ucc_finalize", self._lib)


def _bounded(action: Callable[[], None], seconds: float) -> list[BaseException] | None:
    """Run what may block in C in a thread; return its errors, None if it has not ended in time."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            errors.append(error)

    thread = threading.Thread(target=run, name="ferro-ucc", daemon=True)
    thread.start()
    thread.join(max(0.0, seconds) + _GRACE_S)
    return None if thread.is_alive() else errors
