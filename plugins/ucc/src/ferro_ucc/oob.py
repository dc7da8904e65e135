"""All-gathers out of band: how the ranks of a group find each other before UCC connects them.

Rank 0 collects what the others set in the store and sets it joined, so that n ranks need about 4n
requests. `OutOfBand` is that in Python; `Callbacks` is the same as functions that libucc calls,
which must neither raise nor wait for long.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import c_void_p
from typing import TYPE_CHECKING, TypeAlias

from ferro_ucc.abi import AllGatherFunction, OobColl, RequestFunction, Status

if TYPE_CHECKING:
    from ctypes import _Pointer

    from ferro.rendezvous import Store

    _Request: TypeAlias = "_Pointer[c_void_p]"


class OutOfBand:
    """All-gathers of small values through a store; all ranks make the same ones in one order.

    Args:
        store: the group's own part of it.
        rank: this rank in the group.
        world_size: number of ranks.
        deadline: absolute `time.monotonic()` second by which each must end; may be moved.
    """

    def __init__(self, store: Store, rank: int, world_size: int, deadline: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline = deadline
        self._store = store
        self._number = 0

    def start(self, mine: bytes) -> Gathering:
        """Begin the next all-gather, with this rank's value, which is as long on all ranks."""
        store = self._store.prefix(f"oob/{self._number}")
        self._number += 1
        return Gathering(store, self, mine)

    def gather(self, mine: bytes) -> list[bytes]:
        """Return every rank's value, in order of rank.

        Raises:
            TimeoutError: some rank did not come by the deadline.
        """
        gathering = self.start(mine)
        while not gathering.poll(max(0.0, self.deadline - time.monotonic())):
            continue
        size = len(mine)
        return [gathering.joined[i * size :][:size] for i in range(self.world_size)]


class Gathering:
    """One all-gather under way.

    Attributes:
        joined: all values, in order of rank, once `poll` has returned True.
    """

    def __init__(self, store: Store, ranks: OutOfBand, mine: bytes) -> None:
        self.joined = b""
        self._store = store
        self._ranks = ranks
        self._parts = [mine]
        if ranks.rank != 0:
            store.set(str(ranks.rank), mine)

    def poll(self, patience_s: float) -> bool:
        """Say whether it has ended, waiting at most about `patience_s` seconds for that.

        Raises:
            TimeoutError: it has not, and the deadline has passed.
        """
        if self.joined:
            return True
        ranks = self._ranks
        until = min(ranks.deadline, time.monotonic() + patience_s)
        try:
            if ranks.rank == 0:
                self._collect(until)
            else:
                self.joined = self._store.get("all", deadline=until)
        except TimeoutError as error:
            if time.monotonic() < ranks.deadline:
                return False
            waited = f"rank {len(self._parts)}" if ranks.rank == 0 else "rank 0, which collects"
            raise TimeoutError(f"rank {ranks.rank} waited for {waited} to exchange addresses") from error
        if self._store.add("read", 1) == ranks.world_size:  # the last one cleans up
            self._store.delete("all")
            self._store.delete("read")
        return True

    def _collect(self, until: float) -> None:
        while (rank := len(self._parts)) < self._ranks.world_size:
            self._parts.append(self._store.get(str(rank), deadline=until))
            self._store.delete(str(rank))
        self.joined = b"".join(self._parts)
        self._store.set("all", self.joined)


class Callbacks:
    """An `OutOfBand` as functions that libucc calls, from the thread that called it.

    Must live as long as the context or team that was made with its `table`.

    Args:
        ranks: the all-gathers.
        patience_s: how long asking for the end of one may take, in seconds.

    Attributes:
        table: what the library is given.
        error: what went wrong first, for the library is told a number only.
    """

    def __init__(self, ranks: OutOfBand, patience_s: float) -> None:
        self.error: BaseException | None = None
        self._ranks = ranks
        self._patience_s = patience_s
        self._running: dict[int, tuple[Gathering, int]] = {}
        self._started = 0
        self.table = OobColl(
            allgather=AllGatherFunction(self._all_gather),
            req_test=RequestFunction(self._test),
            req_free=RequestFunction(self._free),
            n_oob_eps=ranks.world_size,
            oob_ep=ranks.rank,
        )

    def _all_gather(self, source: int, target: int, size: int, _info: int, request: _Request) -> int:
        def begin() -> int:
            mine = ctypes.string_at(source, size)
            self._started += 1
            self._running[self._started] = (self._ranks.start(mine), target)
            request[0] = c_void_p(self._started)
            return Status.OK

        return self._guarded(begin)

    def _test(self, request: int) -> int:
        def look() -> int:
            gathering, target = self._running[request]
            if not gathering.poll(self._patience_s):
                return Status.IN_PROGRESS
            ctypes.memmove(target, gathering.joined, len(gathering.joined))
            return Status.OK

        return self._guarded(look)

    def _free(self, request: int) -> int:
        self._running.pop(request, None)
        return Status.OK

    def _guarded(self, act: Callable[[], int]) -> int:
        """Return what `act` does, or an error's number: nothing may be raised through C."""
        try:
            return act()
        except BaseException as error:  # noqa: BLE001 - raised by whoever called the library
            self.error = self.error or error
            return Status.TIMED_OUT if isinstance(error, TimeoutError) else Status.NO_MESSAGE
