"""Out-of-band all-gathers, by which the ranks of a group exchange addresses before UCC connects them.

Every rank sets its value in the store. Rank 0 collects the values and sets the whole, so that n ranks need about 4n
requests. `OobAllGather` offers this to Python, and `OobCallbacks` to libucc as C functions, which must neither raise
nor wait for long.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from ctypes import c_void_p
from typing import TYPE_CHECKING, TypeAlias

from ferro_ucc.abi import AllGatherFunction, OobColl, RequestFunction, UccStatus

if TYPE_CHECKING:
    from ctypes import _Pointer

    from ferro.rendezvous import Store

    _Request: TypeAlias = "_Pointer[c_void_p]"


class OobAllGather:
    """All-gathers of small values through the store; all ranks make the same ones in the same order.

    Args:
        store: the store, with a prefix for the group.
        rank: this rank in the group.
        world_size: number of ranks.
        deadline: absolute `time.monotonic()` second by which each all-gather must end; it may be changed.
    """

    def __init__(self, store: Store, rank: int, world_size: int, deadline: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.deadline = deadline
        self._store = store
        self._number = 0

    def start(self, mine: bytes) -> OobRequest:
        """Begin the next all-gather with this rank's value; values of all ranks have the same length."""
        store = self._store.prefix(f"oob/{self._number}")
        self._number += 1
        return OobRequest(store, self, mine)

    def gather(self, mine: bytes) -> list[bytes]:
        """Gather every rank's value, in order of rank.

        Raises:
            TimeoutError: a rank did not set its value by the deadline.
        """
        request = self.start(mine)
        while not request.poll(max(0.0, self.deadline - time.monotonic())):
            continue
        size = len(mine)
        return [request.joined[i * size :][:size] for i in range(self.world_size)]


class OobRequest:
    """One all-gather that has begun.

    Attributes:
        joined: all values, in order of rank, once `poll` has returned True.
    """

    def __init__(self, store: Store, oob: OobAllGather, mine: bytes) -> None:
        self.joined = b""
        self._store = store
        self._oob = oob
        self._values = [mine]  # rank 0 appends the values of the other ranks
        if oob.rank != 0:
            store.set(str(oob.rank), mine)

    def poll(self, patience_s: float) -> bool:
        """Wait at most about `patience_s` seconds for the end; return True when the all-gather has ended.

        Raises:
            TimeoutError: the all-gather has not ended, and the deadline has passed.
        """
        if self.joined:
            return True
        oob = self._oob
        until = min(oob.deadline, time.monotonic() + patience_s)
        try:
            if oob.rank == 0:
                self._collect(until)
            else:
                self.joined = self._store.get("all", deadline=until)
        except TimeoutError as error:
            if time.monotonic() < oob.deadline:
                return False
            missing = f"rank {len(self._values)}" if oob.rank == 0 else "rank 0, which collects"
            raise TimeoutError(f"rank {oob.rank} waited for {missing} to exchange addresses") from error
        if self._store.add("read", 1) == oob.world_size:  # the last rank deletes the keys
            self._store.delete("all")
            self._store.delete("read")
        return True

    def _collect(self, until: float) -> None:
        while (rank := len(self._values)) < self._oob.world_size:
            self._values.append(self._store.get(str(rank), deadline=until))
            self._store.delete(str(rank))
        self.joined = b"".join(self._values)
        self._store.set("all", self.joined)


class OobCallbacks:
    """An `OobAllGather` as C functions that libucc calls, in the thread that called libucc.

    The object must live as long as the context or team that was made with its `table`.

    Args:
        oob: the all-gathers.
        patience_s: how long a test for the end of one may take, in seconds.

    Attributes:
        table: the structure for libucc.
        error: the first exception; libucc itself learns only a status.
    """

    def __init__(self, oob: OobAllGather, patience_s: float) -> None:
        self.error: BaseException | None = None
        self._oob = oob
        self._patience_s = patience_s
        self._running: dict[int, tuple[OobRequest, int]] = {}
        self._started = 0
        self.table = OobColl(
            allgather=AllGatherFunction(self._all_gather),
            req_test=RequestFunction(self._test),
            req_free=RequestFunction(self._free),
            n_oob_eps=oob.world_size,
            oob_ep=oob.rank,
        )

    def _all_gather(self, source: int, target: int, size: int, _info: int, request: _Request) -> int:
        def begin() -> int:
            mine = ctypes.string_at(source, size)
            self._started += 1
            self._running[self._started] = (self._oob.start(mine), target)
            request[0] = c_void_p(self._started)
            return UccStatus.OK

        return self._guarded(begin)

    def _test(self, request: int) -> int:
        def test() -> int:
            gather, target = self._running[request]
            if not gather.poll(self._patience_s):
                return UccStatus.IN_PROGRESS
            ctypes.memmove(target, gather.joined, len(gather.joined))
            return UccStatus.OK

        return self._guarded(test)

    def _free(self, request: int) -> int:
        self._running.pop(request, None)
        return UccStatus.OK

    def _guarded(self, act: Callable[[], int]) -> int:
        """Call `act` and return its status, or an error's: no exception may pass through C."""
        try:
            return act()
        except BaseException as error:  # noqa: BLE001 - the caller of the library raises it
            self.error = self.error or error
            return UccStatus.TIMED_OUT if isinstance(error, TimeoutError) else UccStatus.NO_MESSAGE
