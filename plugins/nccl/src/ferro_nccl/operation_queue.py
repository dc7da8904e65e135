"""Queue: the stream of one communicator, and what was launched on it and has not ended.

    caller's stream   … produce x ─┐ event                    ┌─ use the result …
    this stream                    └→ all_reduce … ─ event ───┘ (after `wait()`)

Both arrows are events on the device: the host waits for neither. Until the second event has
happened the buffers are held here, for CuPy gives the memory of an array that is gone to the next
array at once, in the order of its own stream, which is not this one.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from ferro.errors import BackendError, FerroError, GroupClosed, PeerLost
from ferro.rendezvous import Store
from ferro.types import Array
from ferro.work import in_lane
from ferro_nccl.bounded import bounded
from ferro_nccl.library import Communicator, Gpu
from ferro_nccl.operation import Operation
from ferro_nccl.watch import Watch

_IN_PROGRESS = 7  # NCCL's code for "not an error"
_LOOK_S = 0.5  # how often to ask the store for others' deaths and failures, and when first
_LAUNCH_S = 0.2  # a launch takes microseconds; one that takes longer is stuck inside NCCL
_NOTICE_S = 0.3  # how much later than NCCL the store may notice that a rank died
_ASK_S = 0.05  # how often to ask it meanwhile
_NATIVE_S = 5.0  # how long aborting or destroying a communicator may take
_LOOKS = 100  # at an event, before going to sleep between looks
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3


class Queue:
    """The operations of one communicator on one rank, in order.

    Launching is for one thread at a time. Failing is not: a thread that is stuck in a launch is
    got back by aborting the communicator from another.

    Args:
        gpu: where it all happens.
        communicator: aborted or destroyed here.
        store: where the ranks tell each other that they have failed.
        lost: says who died, by rank in this group: NCCL never does.
        name: of this rank, for the others' messages.

    Attributes:
        gpu: see above; so `communicator`.
        stream: where operations are launched.
    """

    def __init__(
        self,
        gpu: Gpu,
        communicator: Communicator,
        store: Store,
        lost: Callable[[], Sequence[int]],
        name: str,
    ) -> None:
        self.gpu = gpu
        self.communicator = communicator
        self.stream = gpu.new_stream()
        self._store = store
        self._lost = lost
        self._name = name
        self._launching = threading.Lock()
        self._native = threading.Lock()  # communicator.async_error, .abort and .destroy
        self._state = threading.Lock()  # what follows
        self._outstanding: deque[Operation] = deque()
        self._wrecks: list[Operation] = []  # an aborted kernel may still write into their buffers
        self._failure: BaseException | None = None
        self._closed = False
        self._looked_s = 0.0
        self._last = threading.local()
        with gpu.current():
            self._before = gpu.new_event()
        self._watch = Watch(self.check)

    def launch(
        self, deadline: float, holds: tuple[Array | None, ...], *, ordered: bool
    ) -> Operation:
        """Return an operation, to be launched in its `with` block.

        Args:
            deadline: absolute `time.monotonic()` second by which it must have ended.
            holds: the arrays that it reads and writes.
            ordered: it comes after what this thread put on its current stream before.
        """
        return Operation(self, deadline, holds, ordered)

    @property
    def last(self) -> Operation:
        """What this thread launched last."""
        operation: Operation = self._last.operation
        return operation

    def begin(self, operation: Operation, *, ordered: bool) -> None:
        """Take the turn to launch, and order this stream after the caller's."""
        self._launching.acquire()
        try:
            self._admit(operation)
            self._watch.notice()  # now: the launch itself may get stuck
            if ordered:  # a reused event: a stream that waits for it keeps the moment it meant
                self.gpu.current_stream().record(self._before)
                self.stream.wait_event(self._before)
        except BaseException:
            self._launching.release()
            raise

    def end(self, operation: Operation) -> None:
        """Mark its end, also after a failed launch, of which a part may be under way."""
        try:
            event = self.gpu.new_event()
            self.stream.record(event)
            operation.event = event
            self._last.operation = operation
        finally:
            self._launching.release()

    def finish(self, operation: Operation) -> None:
        """Wait, on the host, for the end of an operation.

        Raises:
            TimeoutError: its deadline passed; the communicator is aborted.
            FerroError: it failed.
        """
        looks, pause = 0 if not in_lane() else _LOOKS, _FIRST_PAUSE_S
        while not operation.done():
            if time.monotonic() > operation.deadline:
                self._time_out()
            elif looks < _LOOKS:
                looks += 1
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        if operation.error is not None:
            raise operation.error

    def drain(self, deadline: float) -> bool:
        """Wait, on the host, until nothing is outstanding; say whether that is so by `deadline`."""
        while (busy := self._any_outstanding()) and time.monotonic() < deadline:
            time.sleep(_LONGEST_PAUSE_S)
        return not busy

    def split(self, color: int, key: int, deadline: float) -> Communicator | None:
        """Split the communicator, on which nothing may be outstanding meanwhile.

        Raises:
            TimeoutError: not all ranks came by the deadline; the communicator is aborted.
        """
        with self._launching:
            if not self.drain(deadline):
                raise TimeoutError("what was launched before a split did not end by its deadline")
            self._check()  # now: what was launched may have ended badly

            def split() -> Communicator | None:
                with self.gpu.current():
                    return self.communicator.split(color, key)

            return bounded(split, deadline, "split")

    def check(self) -> bool:
        """Look for what has failed or is overdue; say whether anything is outstanding.

        The watch's thread calls it again and again.
        """
        with self._state:
            self._forget_ended()
            operations = tuple(self._outstanding)
        if not operations:
            return False
        now = time.monotonic()
        if any(now > operation.deadline for operation in operations):
            self._time_out()
        elif code := self._async_error():
            self._fail_by_code(code)
        elif now - max(operations[0].started_s, self._looked_s) > _LOOK_S:
            self._looked_s = now
            self._look_for_others()
        return True

    def fail(self, error: BaseException, kind: str = "error", *, tell: bool = True) -> None:
        """End all that is outstanding with this error, here and, if told, on the other ranks."""
        with self._state:
            if self._failure is not None or self._closed:
                return
            self._failure = error
            for operation in self._outstanding:
                if not operation.done():
                    operation.error = error
        if tell:
            told = json.dumps([kind, f"{self._name}: {error}"]).encode()
            with suppress(FerroError, OSError):  # the others have deadlines of their own
                self._store.set("failed", told)
        # A launch that is stuck in NCCL, with a rank that does not come, returns when aborted.
        turn = self._launching.acquire(timeout=_LAUNCH_S)
        try:
            self._end_native(self.communicator.abort, "abort")
        finally:
            if turn:
                self._launching.release()

    def abort(self) -> None:
        """End all that is outstanding because this rank says so."""
        self.fail(GroupClosed("the group was aborted"), "aborted")

    def close(self, deadline: float) -> None:
        """Let what is outstanding end, until the deadline; then release all. Idempotent."""
        if not self.drain(deadline):
            self.fail(GroupClosed("the group was closed with operations under way"), "aborted")
        with self._state:
            closed, self._closed = self._closed, True
            failed = self._failure is not None
        self._watch.close()
        if not closed and not failed:
            self._end_native(self.communicator.destroy, "destroy")

    def _admit(self, operation: Operation) -> None:
        """Count an operation as outstanding, unless there can be no more."""
        with self._state:
            self._forget_ended()
            self._check()
            self._outstanding.append(operation)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise GroupClosed("the group was closed")

    def _any_outstanding(self) -> bool:
        with self._state:
            self._forget_ended()
            return bool(self._outstanding)

    def _forget_ended(self) -> None:
        """Forget operations that have ended, and with them their buffers."""
        while self._outstanding and self._outstanding[0].done():
            operation = self._outstanding.popleft()
            if operation.error is None:
                operation.release()
            else:
                self._wrecks.append(operation)

    def _time_out(self) -> None:
        self.fail(TimeoutError("an operation did not end by its deadline"), "timeout")

    def _async_error(self) -> int:
        if not self._native.acquire(blocking=False):
            return 0  # it is being aborted
        try:
            code = 0 if self._failure is not None else self.communicator.async_error()
        finally:
            self._native.release()
        return 0 if code == _IN_PROGRESS else code

    def _fail_by_code(self, code: int) -> None:
        """End because NCCL says so: a connection that broke is but the symptom of a death."""
        until = time.monotonic() + _NOTICE_S
        while not self._fail_by_death():
            if time.monotonic() > until:
                error = BackendError(f"NCCL reports error {code} ({_meaning(code)})", code=code)
                self.fail(error)
                return
            time.sleep(_ASK_S)

    def _fail_by_death(self) -> bool:
        """End if a rank of this group died; say whether one has."""
        gone = self._lost()
        if gone:
            error = PeerLost(
                "it ended without a farewell, as the job's store noticed", peer=gone[0]
            )
            self.fail(error, tell=False)  # the others ask as well
        return bool(gone)

    def _look_for_others(self) -> None:
        """End if another rank died, or as another one ended."""
        if self._fail_by_death():
            return
        try:
            kind, text = json.loads(self._store.get("failed", deadline=0.0))
        except (TimeoutError, FerroError, OSError, ValueError):
            return  # nobody has; or the store is gone, and deadlines remain
        error = TimeoutError(text) if kind == "timeout" else GroupClosed(f"ended by {text}")
        self.fail(error, tell=False)

    def _end_native(self, end: Callable[[], None], what: str) -> None:
        """Abort or destroy the communicator; what gets stuck in it is left behind."""

        def run() -> None:
            with self._native, self.gpu.current():
                end()

        with suppress(Exception):  # there is nothing more to be done with it
            bounded(run, time.monotonic() + _NATIVE_S, what)


def _meaning(code: int) -> str:
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
