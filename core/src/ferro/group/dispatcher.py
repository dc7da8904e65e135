"""Dispatcher: runs a group's operations in order, within their deadlines, and fails the group on all ranks.

`ProcessGroup` checks the arguments, and a backend moves the bytes. In between, the dispatcher gives each
operation its number and deadline, notifies observers, and turns a failure into the one cause that every rank reports.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from ferro.backend import Backend
from ferro.collectives.fast_path import BUSY, EvenCollective, FastPath, Turn
from ferro.collectives.label import Call
from ferro.errors import (
    CollectiveMismatch,
    FerroError,
    GroupClosed,
    PeerLost,
    RankKilled,
    ThreadLimitError,
    UnsupportedError,
    UsageError,
)
from ferro.group.arguments import checked_timeout
from ferro.group.failure_agreement import FailureAgreement
from ferro.group.failure_report import CallSite, find_user_call
from ferro.group.group_info import GroupInfo
from ferro.group.group_state import GroupState
from ferro.group.observer_notifier import ObserverNotifier
from ferro.group.serial_executor import ExecutorClosed, SerialExecutor, issuing_thread
from ferro.group.transfers import Messages, Transfer, TransferQueue
from ferro.group.work import LaunchedWork
from ferro.types import Device

# The part of an operation that moves the data; it is called with `deadline=`. A `partial` of a backend's method costs
# no Python call of its own.
Action: TypeAlias = Callable[..., None]
Finish: TypeAlias = Callable[[], object]

_CPU = Device.CPU  # a global, since each call looks it up
_MIN_TIMEOUT_S = 1e-3  # what a passed deadline leaves to the next operation, which then reports the timeout
# The backend's errors whose text is in the cause that all ranks report: their tracebacks would hide the user's line.
_TOLD = (CollectiveMismatch, GroupClosed, PeerLost, TimeoutError)


class Dispatcher:
    """Runs the operations of one group on one rank."""

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self.backend = backend
        self._info = info
        self.observed = bool(info.observers)
        self._notifier = ObserverNotifier(info, backend.rank)
        self._streams = backend.streams
        self._agreement = FailureAgreement(info, backend.rank)
        self._collectives = SerialExecutor(f"ferro-{info.name}-collectives")
        self.start_at_once, self.end_started = self._collectives.start_at_once, self._collectives.end_started
        self._transfers = TransferQueue(backend, info.name)
        self._lock = threading.Lock()
        self._word = self._collectives.state
        self._state = GroupState(info, backend.rank, self._word)
        self._timeout_s = info.timeout_s

    def __del__(self) -> None:
        if hasattr(self, "_transfers"):
            self._collectives.stop()
            self._transfers.close(0.0)

    @property
    def state(self) -> str:
        """The group's state: "open", "dead" or "closed"."""
        return self._state.name

    def checked_timeout(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else checked_timeout(timeout_s)

    @contextmanager
    def sequence(self, op: str, timeout_s: float | None) -> Iterator[Callable[[], float]]:
        """Make a call of several operations; the function given to the block gives the time left for each.

        An interrupt between two of them would leave the other ranks in the middle, so it ends the group.
        """
        allowed_s, started = self.checked_timeout(timeout_s), time.monotonic()
        issued = 0

        def time_left_s() -> float:
            nonlocal issued
            issued += 1
            return max(_MIN_TIMEOUT_S, started + allowed_s - time.monotonic())

        try:
            yield time_left_s
        except BaseException as error:
            if issued and not isinstance(error, UsageError | UnsupportedError | GroupClosed):
                self._fail(error, CallSite(Call(op), (), allowed_s, time.monotonic() - started))
            raise

    def collective(
        self,
        call: Call,
        action: Action,
        finish: Finish,
        nbytes: int,
        device: Device,
        async_op: bool,
        timeout_s: float | None,
    ) -> Any:
        """Run a collective after all that were issued before it.

        `call` is the call that every rank must make, without its number; `action` moves the data and `finish` makes the
        caller's result of it; `nbytes` is the size of this rank's data, for observers. The time of `timeout_s`, the
        group's when None, begins when the operation does.
        """
        allowed_s = self._timeout_s if timeout_s is None else self.checked_timeout(timeout_s)
        if self._word[BUSY]:
            self._state.raise_closed(call.op)
        launches = device in self._streams
        executor = self._collectives
        if async_op and not launches:
            # A closure would slow down every call: its variables would be cells.
            operation = partial(self._perform, call.numbered, action, finish, nbytes, allowed_s, False, None)
            try:
                return executor.start(call.op, operation)
            except ExecutorClosed:
                self._state.raise_closed(call.op)
            except ThreadLimitError:  # the call has no number
                raise
            except BaseException as error:
                self._fail(error, CallSite(call, (), allowed_s, 0.0))
                raise
        if executor.pending:
            executor.wait_for_pending()
        executor.entering.append(None)
        # An exception that leaves the block after the number was taken ends the group: the caller cannot know whether
        # the call took effect, and its next calls would meet other calls of the other ranks.
        begun = False
        try:
            if executor.started:
                begun = True
                executor.finish_started()
                begun = False
            with executor.lock:
                executor.entering.pop()
                if executor.closed:
                    self._state.raise_closed(call.op)
                begun = True
                seq = executor.next_number()
                if not launches and not self.observed:
                    self._execute(call.numbered(seq), action, allowed_s)
                    return finish()
                result = self._perform(call.numbered, action, finish, nbytes, allowed_s, launches, None, seq)
        except UnsupportedError:
            raise
        except BaseException as error:
            if begun:
                self._fail(error, CallSite(call, (), allowed_s, 0.0))
            raise
        return result.wait() if launches and not async_op else result

    def turn(self, timeout_s: float | None = None) -> Turn:
        """Describe the order of the collectives to a backend's own way to run one, within `timeout_s` each time."""
        executor = self._collectives
        late = partial(self.run_late, self.checked_timeout(timeout_s))
        return Turn(lock=executor.lock, pending=executor.pending, state=executor.state, late=late)

    def fast_path(self, collective: EvenCollective, timeout_s: float | None = None) -> FastPath | None:
        """Make the backend's own way to run a collective at once; None without one."""
        return None if self.is_indirect() else self.backend.fast_path(collective, self.turn(timeout_s))

    def is_indirect(self) -> bool:
        """Say whether all collectives take the longer way: observers watch, they run on a stream, or may not begin."""
        return self.observed or _CPU in self._streams or self._word[BUSY] != 0

    def run_late(self, timeout_s: float, call: Call, wait: Action, transfer: Transfer | None = None) -> None:
        """Wait for the others in an operation that the backend has begun in its own way; see `Turn.late`."""
        if transfer is None and not call.seq:
            call = call.numbered(self._collectives.latest_number())
        try:
            self._execute(call, wait, timeout_s, transfer, agreed=True)
        except BaseException as error:
            self._fail(error, self._site(call, timeout_s, 0.0, transfer))
            raise

    def check_process(self, op: str) -> None:
        """Raise UsageError in a forked child, for which its parent's operations do not go on."""
        if self._state.forked:
            self._state.raise_closed(op)

    def interrupted(self, op: str, error: BaseException) -> None:
        """End the group: an exception of the program's has left one of its operations in the middle."""
        self._fail(error, CallSite(Call(op, self._collectives.latest_number()), (), self._timeout_s, 0.0))

    def transfer(
        self,
        op: str,
        sends: Messages,
        recvs: Messages,
        tag: int,
        finish: Finish,
        async_op: bool,
        timeout_s: float | None,
        device: Device,
    ) -> Any:
        """Send to a peer, receive from a peer, or both, after the transfers issued before on the same channels."""
        allowed_s = self.checked_timeout(timeout_s)
        self.check_open(op)
        launches = device in self._streams
        end = partial(self._end_transfer, finish)
        transfer = Transfer(op, sends, recvs, tag, allowed_s, self._begin_transfer, end)
        try:
            if async_op and not launches:
                return self._transfers.start(transfer)
            action = partial(transfer.move, self.backend)
            operation = partial(
                self._perform, transfer.numbered, action, finish, transfer.nbytes, allowed_s, launches, transfer
            )
            result = self._transfers.run(transfer, operation, in_this_thread=launches)
            transfer.release()
        except BaseException as error:
            withdrawn = False
            try:
                withdrawn = self._transfers.withdraw(transfer)  # as if the call had never been made
            finally:
                if not withdrawn and not isinstance(error, UnsupportedError):
                    self._fail(error, self._site(transfer.call, allowed_s, 0.0, transfer))
            if isinstance(error, ExecutorClosed):
                self._state.raise_closed(op)
            raise
        return result.wait() if launches and not async_op else result

    def _begin_transfer(self, transfer: Transfer) -> None:
        """Begin a transfer in the group's thread."""
        if self._state.failure is not None:
            self._state.raise_dead(transfer.call.op)
        if self.observed:
            transfer.event = self._notifier.started(transfer.call, transfer.nbytes)

    def _end_transfer(self, finish: Finish, transfer: Transfer, error: BaseException | None) -> object:
        """End a transfer in the group's thread: return its result, or raise its error."""
        raised, seconds = error, time.monotonic() - transfer.started
        if error is not None and not isinstance(error, UnsupportedError):
            raised = self._raised(error, self._site(transfer.call, transfer.timeout_s, seconds, transfer))
        if transfer.event is not None:
            name = type(raised).__name__ if raised else ""
            self._notifier.finished(transfer.event, seconds, name)
        if raised is None:
            return finish()
        raise raised from (None if raised is error or isinstance(error, _TOLD) else error)

    def check_open(self, op: str) -> None:
        """Raise an error when no operation can be issued any more."""
        if self._word[BUSY]:
            self._state.raise_closed(op)

    def failure(self, op: str) -> FerroError:
        """Return the error that ended the group, for a call that makes sense only afterwards."""
        state = self._state
        if state.closed or state.failure is None:
            name = self._info.name
            raise UsageError(f"{op} on group {name!r}: the group is {state.name}", op=op, group=name)
        return state.failure

    def abort(self) -> None:
        """End everything at once: blocked calls raise, here and on the other ranks. A forked child ends nothing."""
        if self._state.forked:
            return
        if self._state.failure is None and not self._state.closed:
            name = self._info.name
            self._state.fail(GroupClosed(f"group {name!r} was aborted", group=name))
            self._agreement.report(GroupClosed, "was aborted")
        self.backend.abort()

    def close(self, timeout_s: float, *, leaving: bool = False) -> None:
        """Let pending operations end, within `timeout_s` seconds; then release the backend.

        The other ranks are told how a rank that is `leaving` the world leaves each of its groups.
        """
        if self._state.forked:
            self._state.close()  # the connections are the parent's, and a thread of its own may hold the lock
            return
        with self._lock:
            if self._state.closed:
                return
            self._state.close()
        deadline = time.monotonic() + (0.0 if self._state.failure else timeout_s)
        drained = [self._collectives.close(deadline), self._transfers.close(deadline)]
        if not all(drained):
            if self._state.failure is None:
                self._agreement.report(PeerLost, "was left, with operations under way,")
            self.backend.abort()
        elif leaving and self._state.failure is None and self.backend.world_size > 1:
            error = None if timeout_s > 0 else sys.exc_info()[1] or getattr(sys, "last_value", None)
            self._agreement.report_leaving(self._collectives.next_number(), error)
        self.backend.close()

    def _perform(
        self,
        numbered: Callable[[int], Call],
        action: Action,
        finish: Finish,
        nbytes: int,
        timeout_s: float,
        launches: bool,
        transfer: Transfer | None,
        seq: int,
    ) -> Any:
        """Execute operation number `seq` and notify observers; return its result, or the Work of a launched one.

        A launched operation goes into the device's queue of the thread that calls this.
        """
        call = numbered(seq)
        if not self.observed:
            self._execute(call, action, timeout_s, transfer, agreed=transfer is not None)
        else:
            event = self._notifier.started(call, nbytes)
            started, error = time.monotonic(), ""
            try:
                self._execute(call, action, timeout_s, transfer, agreed=transfer is not None)
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                self._notifier.finished(event, time.monotonic() - started, error)
        if not launches:
            return finish()
        site = self._site(call, timeout_s, timeout_s, transfer)
        completion = self.backend.launched()
        return LaunchedWork(call.op, call.seq, finish(), completion, lambda error: self._fail(error, site))

    def _execute(
        self, call: Call, action: Action, timeout_s: float, transfer: Transfer | None = None, agreed: bool = False
    ) -> None:
        """Run an operation by its deadline; a failure ends the group with the cause that all ranks report.

        An operation that is no `transfer` is a collective, on which the ranks agree, unless they have.
        """
        if self._state.failure is not None:  # the group died while this operation waited for earlier ones
            self._state.raise_dead(call.op)
        started = time.monotonic()
        deadline = started + timeout_s
        try:
            if not agreed:
                self.backend.agree(call, deadline=deadline)
            action(deadline=deadline)
        except UnsupportedError:  # raised by the backend, on all ranks
            raise
        except BaseException as error:
            raised = self._raised(error, self._site(call, timeout_s, time.monotonic() - started, transfer))
            if raised is error:
                raise
            raise raised from (None if isinstance(error, _TOLD) else error)

    def _site(self, call: Call, timeout_s: float, elapsed_s: float, transfer: Transfer | None) -> CallSite:
        if transfer is None:
            return CallSite(call, (), timeout_s, elapsed_s)
        return CallSite(call, transfer.peers, timeout_s, elapsed_s, transfer.describe())

    def _raised(self, error: BaseException, site: CallSite) -> BaseException:
        """End the group because of an error; return the error that the caller gets.

        That is the cause that all ranks report if the error is the backend's or the system's, and otherwise the
        error itself: an interrupt, or an exception of the program's own in a signal handler or a reduction.
        """
        cause = self._fail(error, site)
        if isinstance(error, FerroError) or site.missed_deadline(error):
            return cause
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, TimeoutError):
            return cause
        error.add_note(f"(in {site.describe(self._info.name)}, which can no longer be used)")
        return error

    def _fail(self, error: BaseException, site: CallSite) -> FerroError:
        """Find the cause that all ranks report, and let no further operation begin."""
        if self._state.failure is not None:
            return self._state.failure
        # The group makes no collective after this one, so a number may be taken to learn how many there were.
        user_call = find_user_call(issuing_thread())
        site = replace(site, user_call=user_call, collectives=self._collectives.next_number())
        cause: FerroError = GroupClosed(f"{site.describe(self._info.name)} was interrupted by {type(error).__name__}")
        aborted = isinstance(error, RankKilled)  # as a killed process, this rank tells nobody
        try:
            if not aborted:
                cause = self._agreement.agree(error, site, self.backend.abort)
                aborted = True
        finally:  # a second interrupt may end the agreement
            with self._lock:
                self._state.fail(cause)
            self._transfers.fail()
            if not aborted:
                self.backend.abort()
        lost = self._info.global_ranks[cause.peer] if isinstance(cause, PeerLost) and cause.peer is not None else None
        self._info.failures.append((f"{type(cause).__name__}: {cause}", lost))
        return cause
