"""Team: UCC's side of one group, which posts the group's operations and waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING

from ferro.errors import GroupClosed
from ferro_ucc import abi
from ferro_ucc.context import Context
from ferro_ucc.library import is_running, request_status
from ferro_ucc.oob import OobAllGather, OobCallbacks
from ferro_ucc.operations import Operation
from ferro_ucc.waiting import AbortFlag, PeerLiveness, PollBackoff

if TYPE_CHECKING:
    from ferro.rendezvous import Store


class Team:
    """A UCC team of at least two ranks, which creates itself when its first operation begins.

    Before that a rank needs no other rank, so ranks may make groups in any order.

    Args:
        context: the connections.
        store: the store, with a prefix for the group.
        rank: this rank in the group.
        members: the members' ranks in the world, by rank in the group.
        number: the team's number, unique in the job.

    Attributes:
        abort: the group's abort flag.
    """

    def __init__(self, context: Context, store: Store, rank: int, members: Sequence[int], number: int) -> None:
        self.abort = AbortFlag(store)
        self._liveness = PeerLiveness(context.lost, members)
        self._context = context
        self._library = context.library
        self._handle = c_void_p()
        self._number = number
        self._broken = False
        self._oob = OobAllGather(store, rank, len(members), 0.0)
        self._callbacks = OobCallbacks(self._oob, 0.0)  # never waits, since the lock is held

    def create(self, deadline: float) -> None:
        """Create the team together with the other members, unless it exists.

        Raises:
            TimeoutError: a member did not take part by the deadline.
            GroupClosed: the group was aborted, or an earlier operation failed.
            PeerLost: a member died.
            BackendError: the library failed.
        """
        if self._broken:
            raise GroupClosed("the group is broken: an operation did not end")
        if self._handle:
            return
        self._oob.deadline = deadline
        library = self._library
        params = abi.TeamParams(
            mask=abi.TEAM_FIELD_EP | abi.TEAM_FIELD_EP_RANGE | abi.TEAM_FIELD_OOB | abi.TEAM_FIELD_ID,
            ep=self._oob.rank,
            ep_range=abi.EP_RANGE_CONTIGUOUS,
            oob=self._callbacks.table,
            id=self._number,
        )
        handle, backoff = c_void_p(), PollBackoff(deadline, self.abort, self._liveness)
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
                backoff.pause()
        except BaseException as error:
            self._abandon(handle, params)
            if self._callbacks.error is not None:
                self._liveness.check()  # a dead rank 0 is the cause of a store that is gone
                raise self._callbacks.error from error
            raise
        self._handle = handle
        self._context.keep(handle, self._callbacks)

    def run(self, operation: Operation, deadline: float) -> None:
        """Carry out an operation by a deadline, an absolute `time.monotonic()` second.

        Raises:
            TimeoutError: the operation did not end; its buffers are kept, since UCC may still write to them.
            GroupClosed: the group was aborted meanwhile.
            PeerLost: a member died.
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
            backoff = PollBackoff(deadline, self.abort, self._liveness)
            while is_running(status.value):
                context.progress()
                backoff.pause()
            if status.value < 0:
                self._liveness.check()  # a dead rank is the cause of a broken connection
                raise library.error(status.value, abi.CollType(args.coll_type).name.lower())
            ended = True
        finally:
            if not ended:
                self._abandon(operation, request)
        with context.lock:
            library.status("ucc_collective_finalize", request)

    def close(self) -> None:
        """Release the team, unless one of its operations may still be running."""
        if self._broken or self._handle.value is None:
            return
        self._broken = True
        self._context.release(self._handle.value)

    def _abandon(self, *used: object) -> None:
        self._broken = True
        self._context.abandon(self, *used)
