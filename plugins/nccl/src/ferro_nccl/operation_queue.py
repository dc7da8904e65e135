"""OperationQueue: the stream of one communicator, and the operations that are under way on it.

    caller's stream   … produce x ─┐ event                    ┌─ use the result …
    this stream                    └→ all_reduce … ─ event ───┘ (after `wait()`)

Both arrows are events on the GPU: the host waits for neither. Until the second event has happened the queue keeps
references to the buffers: CuPy would reuse the memory of a deleted array at once, in the order of CuPy's own stream,
which is not this one.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from ferro.errors import BackendError, FerroError, GroupClosed, PeerLost
from ferro.group.serial_executor import on_executor_thread
from ferro.rendezvous import Store
from ferro.types import Array
from ferro_nccl.library import Communicator, Gpu
from ferro_nccl.operation import LaunchedOperation
from ferro_nccl.watchdog import OperationWatchdog, call_with_deadline

_IN_PROGRESS = 7  # NCCL's code for "not an error"
_STORE_POLL_S = 0.5  # between queries of the store for other ranks' deaths and failures
_LAUNCH_S = 0.2  # a launch takes microseconds; one that takes longer is stuck inside NCCL
_STORE_DELAY_S = 0.3  # the store may notice a death this much later than NCCL
_STORE_DELAY_POLL_S = 0.05  # between queries of the store in this time
_NATIVE_S = 5.0  # limit for aborting or destroying a communicator
_SPINS = 100  # queries of an event before the host sleeps between queries
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 20e-6, 1e-3


class OperationQueue:
    """The operations of one communicator on one rank, in order.

    One thread at a time launches an operation. Meanwhile any other thread may abort the communicator, which frees a
    thread that is stuck in a launch.

    Args:
        gpu: this rank's GPU.
        communicator: this rank's end of the communicator, which the queue aborts or destroys.
        store: the group's store, by which a rank tells the others that it has failed.
        lost_ranks: returns the dead ranks of this group, which NCCL cannot tell.
        name: names this rank in the other ranks' messages.

    Attributes:
        gpu: the GPU given.
        communicator: the communicator given.
        stream: the stream on which operations are launched.
    """

    def __init__(
        self, gpu: Gpu, communicator: Communicator, store: Store, lost_ranks: Callable[[], Sequence[int]], name: str
    ) -> None:
        self.gpu = gpu
        self.communicator = communicator
        self.stream = gpu.new_stream()
        self._store = store
        self._lost_ranks = lost_ranks
        self._name = name
        self._launch_lock = threading.Lock()
        self._native_lock = threading.Lock()  # communicator.async_error, .abort and .destroy
        self._state_lock = threading.Lock()  # the attributes that follow
        self._outstanding: deque[LaunchedOperation] = deque()
        # Failed operations keep their buffers: an aborted kernel may still write into them.
        self._failed: list[LaunchedOperation] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._polled_store_s = 0.0
        self._last = threading.local()
        with gpu.current():
            self._caller_event = gpu.new_event()
        self._watchdog = OperationWatchdog(self.poll)

    def launch(self, deadline: float, holds: tuple[Array | None, ...], *, ordered: bool) -> LaunchedOperation:
        """Make an operation, to be launched in its `with` block.

        Args:
            deadline: absolute `time.monotonic()` second by which it must have ended.
            holds: the arrays that it reads and writes.
            ordered: it begins after the earlier work on this thread's current stream.
        """
        return LaunchedOperation(self, deadline, holds, ordered)

    @property
    def last(self) -> LaunchedOperation:
        """The operation that this thread launched last."""
        operation: LaunchedOperation = self._last.operation
        return operation

    def begin(self, operation: LaunchedOperation, *, ordered: bool) -> None:
        """See `LaunchQueue.begin`."""
        self._launch_lock.acquire()
        try:
            self._add(operation)
            self._watchdog.notice_launch()  # before the launch, which may get stuck
            if ordered:
                # The event is reused: a stream that waits for it keeps the moment of the wait.
                self.gpu.current_stream().record(self._caller_event)
                self.stream.wait_event(self._caller_event)
        except BaseException:
            self._launch_lock.release()
            raise

    def end(self, operation: LaunchedOperation) -> None:
        """See `LaunchQueue.end`; it records an event even if the launch failed, because a part may be under way."""
        try:
            event = self.gpu.new_event()
            self.stream.record(event)
            operation.event = event
            self._last.operation = operation
        finally:
            self._launch_lock.release()

    def finish(self, operation: LaunchedOperation) -> None:
        """Wait, on the host, for the end of an operation.

        Raises:
            TimeoutError: its deadline passed; the communicator is aborted.
            FerroError: it failed.
        """
        spins, sleep_s = _SPINS if on_executor_thread() else 0, _FIRST_SLEEP_S
        while not operation.done():
            if time.monotonic() > operation.deadline:
                self._time_out()
            elif spins < _SPINS:
                spins += 1
            else:
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        if operation.error is not None:
            raise operation.error

    def drain(self, deadline: float) -> bool:
        """Wait, on the host, for all operations; return True if they have ended by `deadline`."""
        while (busy := self._any_outstanding()) and time.monotonic() < deadline:
            time.sleep(_LONGEST_SLEEP_S)
        return not busy

    def split(self, color: int, key: int, deadline: float) -> Communicator | None:
        """Split the communicator, on which no operation may be outstanding meanwhile.

        Raises:
            TimeoutError: not all ranks came by the deadline; the communicator is aborted.
        """
        with self._launch_lock:
            if not self.drain(deadline):
                raise TimeoutError("what was launched before a split did not end by its deadline")
            self._check_alive()  # again, because an operation may have failed meanwhile

            def split() -> Communicator | None:
                with self.gpu.current():
                    return self.communicator.split(color, key)

            return call_with_deadline(split, deadline, "split")

    def poll(self) -> bool:
        """Look for failed or overdue operations; return True if any operation is outstanding.

        The watchdog's thread calls this repeatedly.
        """
        with self._state_lock:
            self._forget_ended()
            operations = tuple(self._outstanding)
        if not operations:
            return False
        now = time.monotonic()
        if any(now > operation.deadline for operation in operations):
            self._time_out()
        elif code := self._async_error():
            self._fail_by_code(code)
        elif now - max(operations[0].started_s, self._polled_store_s) > _STORE_POLL_S:
            self._polled_store_s = now
            self._check_other_ranks()
        return True

    def fail(self, error: BaseException, kind: str = "error", *, tell: bool = True) -> None:
        """End all outstanding operations with this error, and with `tell` those on the other ranks, too."""
        with self._state_lock:
            if self._failure is not None or self._closed:
                return
            self._failure = error
            for operation in self._outstanding:
                if not operation.done():
                    operation.error = error
        if tell:
            message = json.dumps([kind, f"{self._name}: {error}"]).encode()
            with suppress(FerroError, OSError):  # the others have deadlines of their own
                self._store.set("failed", message)
        # A launch that is stuck in NCCL, with a rank that does not come, returns when aborted.
        locked = self._launch_lock.acquire(timeout=_LAUNCH_S)
        try:
            self._end_communicator(self.communicator.abort, "abort")
        finally:
            if locked:
                self._launch_lock.release()

    def abort(self) -> None:
        """End all outstanding operations at the request of this rank."""
        self.fail(GroupClosed("the group was aborted"), "aborted")

    def close(self, deadline: float) -> None:
        """Let outstanding operations end, until the deadline; then release all. Idempotent."""
        if not self.drain(deadline):
            self.fail(GroupClosed("the group was closed with operations under way"), "aborted")
        with self._state_lock:
            closed, self._closed = self._closed, True
            failed = self._failure is not None
        self._watchdog.close()
        if not closed and not failed:
            self._end_communicator(self.communicator.destroy, "destroy")

    def _add(self, operation: LaunchedOperation) -> None:
        """Count an operation as outstanding, unless the queue has failed or was closed."""
        with self._state_lock:
            self._forget_ended()
            self._check_alive()
            self._outstanding.append(operation)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise GroupClosed("the group was closed")

    def _any_outstanding(self) -> bool:
        with self._state_lock:
            self._forget_ended()
            return bool(self._outstanding)

    def _forget_ended(self) -> None:
        """Forget operations that have ended, and with them their buffers."""
        while self._outstanding and self._outstanding[0].done():
            operation = self._outstanding.popleft()
            if operation.error is None:
                operation.release()
            else:
                self._failed.append(operation)

    def _time_out(self) -> None:
        self.fail(TimeoutError("an operation did not end by its deadline"), "timeout")

    def _async_error(self) -> int:
        if not self._native_lock.acquire(blocking=False):
            return 0  # it is being aborted
        try:
            code = 0 if self._failure is not None else self.communicator.async_error()
        finally:
            self._native_lock.release()
        return 0 if code == _IN_PROGRESS else code

    def _fail_by_code(self, code: int) -> None:
        """Fail with PeerLost if a rank died, which NCCL reports as some connection error; else with NCCL's code."""
        until = time.monotonic() + _STORE_DELAY_S
        while not self._fail_if_rank_died():
            if time.monotonic() > until:
                error = BackendError(f"NCCL reports error {code} ({_code_meaning(code)})", code=code)
                self.fail(error)
                return
            time.sleep(_STORE_DELAY_POLL_S)

    def _fail_if_rank_died(self) -> bool:
        """Fail if a rank of this group died; return True if one has."""
        dead = self._lost_ranks()
        if dead:
            error = PeerLost("it ended without a farewell, as the job's store noticed", peer=dead[0])
            self.fail(error, tell=False)  # the other ranks query the store as well
        return bool(dead)

    def _check_other_ranks(self) -> None:
        """Fail if another rank died, or has told through the store that it failed."""
        if self._fail_if_rank_died():
            return
        try:
            kind, text = json.loads(self._store.get("failed", deadline=0.0))
        except (TimeoutError, FerroError, OSError, ValueError):
            return  # no rank has failed; or the store is gone, and only deadlines can end operations
        error = TimeoutError(text) if kind == "timeout" else GroupClosed(f"ended by {text}")
        self.fail(error, tell=False)

    def _end_communicator(self, end: Callable[[], None], name: str) -> None:
        """Abort or destroy the communicator in a thread, which is abandoned if it gets stuck."""

        def run() -> None:
            with self._native_lock, self.gpu.current():
                end()

        with suppress(Exception):  # nothing more can be done with it
            call_with_deadline(run, time.monotonic() + _NATIVE_S, name)


def _code_meaning(code: int) -> str:
    meanings = {
        1: "a CUDA call failed",
        2: "a system call failed",
        3: "an internal check failed, or memory was corrupted",
        4: "an argument was wrong",
        5: "it was used wrongly",
        6: "another rank ended, or the network failed",
        8: "it waited too long",
    }
    return f"{meanings.get(code, 'unknown')}; NCCL_DEBUG=WARN tells more"
