"""Team: the ranks of one group in UCC, and how an operation is posted and waited for."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING

from ferro.errors import GroupClosed
from ferro_ucc import abi
from ferro_ucc.context import Context
from ferro_ucc.library import is_running, request_status
from ferro_ucc.oob import Callbacks, OutOfBand
from ferro_ucc.operations import Operation
from ferro_ucc.waiting import Abort, Lost, Patience

if TYPE_CHECKING:
    from ferro.rendezvous import Store


class Team:
    """One group, made together by its ranks when its first operation begins.

    Until then nothing is needed of the others, so ranks may ask for groups in any order.

    Args:
        context: the connections.
        store: the group's own part of the store.
        rank: this rank in the group.
        members: the ranks in the world of its ranks, which are at least 2.
        number: the group's number, unique in the job.

    Attributes:
        abort: whether the group was aborted.
    """

    def __init__(self, context: Context, store: Store, rank: int, members: Sequence[int], number: int) -> None:
        self.abort = Abort(store)
        self._lost = Lost(context.lost, members)
        self._context = context
        self._library = context.library
        self._handle = c_void_p()
        self._number = number
        self._broken = False
        self._ranks = OutOfBand(store, rank, len(members), 0.0)
        self._callbacks = Callbacks(self._ranks, 0.0)  # the lock is held: no time for waiting

    def create(self, deadline: float) -> None:
        """Make the team together with its other ranks; once made, do nothing.

        Raises:
            TimeoutError: they did not come.
            GroupClosed: the group was aborted, or did not come about earlier.
            PeerLost: one of them died.
            BackendError: the library could not.
        """
        if self._broken:
            raise GroupClosed("the group is broken: an operation did not end")
        if self._handle:
            return
        self._ranks.deadline = deadline
        ranks, library = self._ranks, self._library
        params = abi.TeamParams(
            mask=abi.TEAM_FIELD_EP | abi.TEAM_FIELD_EP_RANGE | abi.TEAM_FIELD_OOB | abi.TEAM_FIELD_ID,
            ep=ranks.rank,
            ep_range=abi.EP_RANGE_CONTIGUOUS,
            oob=self._callbacks.table,
            id=self._number,
        )
        handle, patience = c_void_p(), Patience(deadline, self.abort, self._lost)
        try:
            with self._context.lock:
                status = library.status(
                    "ucc_team_create_post",
                    byref(self._context.handle), 1, byref(params), byref(handle),
                )  # fmt: skip
            while True:
                with self._context.lock:
                    status = library.status("ucc_team_create_test", handle)
                if not is_running(status):
                    break
                self._context.progress()
                patience.pause()
        except BaseException as error:
            self._break(handle, params)
            if self._callbacks.error is not None:
                self._lost.check()  # a store that is gone is but the symptom
                raise self._callbacks.error from error
            raise
        self._handle = handle
        self._context.keep(handle, self._callbacks)

    def run(self, operation: Operation, deadline: float) -> None:
        """Carry out an operation by a deadline, an absolute `time.monotonic()` second.

        Raises:
            TimeoutError: it did not end; UCC may still write to its buffers, which are kept.
            GroupClosed: the group was aborted meanwhile.
            PeerLost: one of its ranks died.
            BackendError: the library failed.
        """
        library, context = self._library, self._context
        args, request = operation.args, c_void_p()
        ended = False
        try:
            with context.lock:
                library.status("ucc_collective_init", byref(args), byref(request), self._handle)
                library.status("ucc_collective_post", request)
            assert request.value is not None
            status = request_status(request.value)
            patience = Patience(deadline, self.abort, self._lost)
            while is_running(status.value):
                context.progress()
                patience.pause()
            if status.value < 0:
                self._lost.check()  # a broken connection is but the symptom
                raise library.error(status.value, abi.CollType(args.coll_type).name.lower())
            ended = True
        finally:
            if not ended:
                self._break(operation, request)
        with context.lock:
            library.status("ucc_collective_finalize", request)

    def close(self) -> None:
        """Release the team, unless the library may still be at work for it."""
        if self._broken or self._handle.value is None:
            return
        self._broken = True
        self._context.release(self._handle.value)

    def _break(self, *used: object) -> None:
        self._broken = True
        self._context.abandon(self, *used)
