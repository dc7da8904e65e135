"""Dispatcher: runs a group's operations in order, within their deadlines, and fails the group on all ranks.

`ProcessGroup` checks the arguments, and a backend moves the bytes. In between, the dispatcher gives each
operation its number and deadline, notifies observers, and turns a failure into the one cause that every rank reports.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import numpy as np

from ferro.backend import Backend
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels, transfer_call
from ferro.errors import FerroError, GroupClosed, PeerLost, UnsupportedError, UsageError
from ferro.group.failure_agreement import FailureAgreement
from ferro.group.failure_report import CallSite, find_user_call
from ferro.group.group_info import GroupInfo
from ferro.group.serial_executor import ExecutorClosed, SerialExecutor, issuing_thread
from ferro.group.work import LaunchedWork
from ferro.observers import Event
from ferro.types import Array, Device

# The part of an operation that moves the data; it is called with `deadline=`. A `partial` of a backend's method costs
# no Python call of its own.
Action: TypeAlias = Callable[..., None]
Finish: TypeAlias = Callable[[], object]
Messages: TypeAlias = Sequence[tuple[int, Array]]  # (peer, buffer)

_CPU = Device.CPU  # a global, since each call looks it up
_MAX_EXECUTORS = 256
_MIN_TIMEOUT_S = 1e-3  # what a passed deadline leaves to the next operation, which then reports the timeout


_forks = 0  # how often this process was forked since ferro was imported


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class ChannelKey(NamedTuple):
    """One peer, one direction, one tag: transfers with the same key run in the order issued."""

    direction: str  # "send" or "recv"
    peer: int
    tag: int


class Dispatcher:
    """Runs the operations of one group on one rank."""

    def __init__(self, backend: Backend, info: GroupInfo) -> None:
        self.backend = backend
        self._info = info
        self._observed = bool(info.observers)
        self._streams = backend.streams
        self._agreement = FailureAgreement(info, backend.rank)
        self._collectives = SerialExecutor(f"ferro-{info.name}-collectives")
        self._transfers: dict[ChannelKey, SerialExecutor] = {}
        self._lock = threading.Lock()
        self._failure: FerroError | None = None
        self._closed = False
        self._pid = os.getpid()
        self._forks = _forks
        self._timeout_s = info.timeout_s

    @property
    def state(self) -> str:
        """The group's state: "open", "dead" or "closed"."""
        return "closed" if self._closed else "dead" if self._failure else "open"

    def checked_timeout(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self._timeout_s
        most = threading.TIMEOUT_MAX
        if not isinstance(timeout_s, int | float | np.number) or not 0 < timeout_s <= most:
            raise UsageError(f"timeout_s must be a positive number of seconds, at most {most:.0f}, not {timeout_s!r}")
        return float(timeout_s)

    def countdown(self, timeout_s: float | None) -> Callable[[], float]:
        """Begin a call made of several operations; the returned function gives the time left for each."""
        deadline = time.monotonic() + self.checked_timeout(timeout_s)
        return lambda: max(_MIN_TIMEOUT_S, deadline - time.monotonic())

    def collective(
        self,
        call: Call,
        action: Action,
        finish: Finish,
        nbytes: int,
        async_op: bool,
        timeout_s: float | None,
        device: Device = _CPU,
    ) -> Any:
        """Run a collective after all that were issued before it.

        `call` is the call that every rank must make, without its number; `action` moves the data and `finish` makes the
        caller's result of it; `nbytes` is the size of this rank's data, for observers. The time of `timeout_s`, the
        group's when None, begins when the operation does.
        """
        allowed_s = self._timeout_s if timeout_s is None else self.checked_timeout(timeout_s)
        if self._closed or self._failure is not None or self._forks is not _forks:
            self._raise_closed(call.op)
        launches = device in self._streams
        executor = self._collectives
        if async_op and not launches:
            # A closure would slow down every call: its variables would be cells.
            operation = partial(self._perform, call.numbered, action, finish, nbytes, allowed_s, False, ())
            try:
                return executor.start(call.op, operation)
            except ExecutorClosed:
                self._raise_closed(call.op)
        # The following is `executor.run`, inlined because every collective takes this path.
        if executor.pending:
            executor.wait_for_pending()
        with executor.lock:
            if executor.closed:
                self._raise_closed(call.op)
            seq = executor.next_number()
            if not launches and not self._observed:
                self._execute(call.numbered(seq), action, allowed_s)
                return finish()
            result = self._perform(call.numbered, action, finish, nbytes, allowed_s, launches, (), seq)
        return result.wait() if launches and not async_op else result

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
        # A sendrecv holds the sending executor, and runs its operation in the receiving one.
        channels = [ChannelKey("send", peer, tag) for peer, _ in sends]
        channels += [ChannelKey("recv", peer, tag) for peer, _ in recvs]
        nbytes = sum(buffer.nbytes for _, buffer in (*sends, *recvs))
        peers = tuple(dict([*sends, *recvs]))
        launches = device in self._streams
        action = partial(self._move, sends, recvs, tag)
        operation = partial(self._perform, partial(Call, op), action, finish, nbytes, allowed_s, launches, peers)
        channel, *inner = channels
        outer = (lambda _: self._submit(inner[0], op, operation)) if inner else operation
        result = self._submit(channel, op, outer, in_background=async_op and not launches)
        return result.wait() if launches and not async_op else result

    def _move(self, sends: Messages, recvs: Messages, tag: int, *, deadline: float) -> None:
        """Move messages, each after its label where the backend's frames carry none."""
        if not self.backend.labels_frames:
            labels = [(peer, np.frombuffer(transfer_call(buffer).label(), np.uint8)) for peer, buffer in sends]
            found = [(peer, np.empty(LABEL_BYTES, np.uint8)) for peer, _ in recvs]
            self._exchange(labels, found, tag, deadline)
            for (peer, buffer), (_, label) in zip(recvs, found, strict=True):
                compare_labels(self.backend.rank, transfer_call(buffer), peer, label.tobytes())
        self._exchange(sends, recvs, tag, deadline)

    def _exchange(self, sends: Messages, recvs: Messages, tag: int, deadline: float) -> None:
        if sends and recvs:
            self.backend.exchange(sends, recvs, tag=tag, deadline=deadline)
            return
        for peer, buffer in sends:
            self.backend.send(buffer, peer, tag=tag, deadline=deadline)
        for peer, buffer in recvs:
            self.backend.recv(buffer, peer, tag=tag, deadline=deadline)

    def check_open(self, op: str) -> None:
        """Raise an error when no operation can be issued any more."""
        if self._closed or self._failure is not None or self._forks is not _forks:
            self._raise_closed(op)

    def failure(self, op: str) -> FerroError:
        """Return the error that ended the group, for a call that makes sense only afterwards."""
        if self._closed or self._failure is None:
            name = self._info.name
            raise UsageError(f"{op} on group {name!r}: the group is {self.state}", op=op, group=name)
        return self._failure

    def abort(self) -> None:
        """End everything at once: blocked calls raise, here and on the other ranks."""
        if self._failure is None and not self._closed:
            name = self._info.name
            self._failure = GroupClosed(f"group {name!r} was aborted", group=name)
            self._agreement.report(GroupClosed, "was aborted")
        self.backend.abort()

    def close(self, timeout_s: float, *, leaving: bool = False) -> None:
        """Let pending operations end, within `timeout_s` seconds; then release the backend.

        The other ranks are told how a rank that is `leaving` the world leaves each of its groups.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # A sendrecv enters its sending executor, then its receiving one: the executors close in that order.
            channels = sorted(self._transfers, key=lambda channel: channel.direction, reverse=True)
            executors = [self._collectives, *(self._transfers[channel] for channel in channels)]
        if self._forks is not _forks:
            return  # the connections are the parent's
        deadline = time.monotonic() + (0.0 if self._failure else timeout_s)
        drained = [executor.close(deadline) for executor in executors]
        if not all(drained):
            if self._failure is None:
                self._agreement.report(PeerLost, "was left, with operations under way,")
            self.backend.abort()
        elif leaving and self._failure is None and self.backend.world_size > 1:
            error = sys.exc_info()[1] or getattr(sys, "last_value", None)
            self._agreement.report_leaving(self._collectives.next_number(), None if timeout_s > 0 else error)
        self.backend.close()

    def _raise_closed(self, op: str) -> NoReturn:
        """Raise the error that says why no operation can be issued any more."""
        name = self._info.name
        if self._closed:
            raise GroupClosed(f"{op} on group {name!r}: the group was closed", op=op, group=name)
        if self._forks is not _forks:
            message = (
                f"this process was forked from process {self._pid}, whose connections it must not use: "
                "start ranks with `ferro run`, and workers with multiprocessing's 'spawn'"
            )
            raise UsageError(f"{op} on group {name!r}: {message}", op=op, group=name)
        self._raise_dead(op)

    def _raise_dead(self, op: str) -> NoReturn:
        name, rank = self._info.name, self.backend.rank
        message = f"{op} on group {name!r}: the group died earlier: {self._failure}"
        raise GroupClosed(message, op=op, group=name, rank=rank) from self._failure

    def _submit(
        self, channel: ChannelKey, op: str, operation: Callable[[int], object], *, in_background: bool = False
    ) -> Any:
        """Hand an operation to the executor of its channel, which is made where there is none."""
        while True:
            executor = self._transfers.get(channel) or self._new_executor(channel)
            try:
                return executor.start(op, operation) if in_background else executor.run(op, operation)
            except ExecutorClosed:
                with self._lock:
                    if self._transfers.get(channel) is executor:  # otherwise the channel has a new one
                        self._raise_closed(op)

    def _new_executor(self, channel: ChannelKey) -> SerialExecutor:
        with self._lock:
            if len(self._transfers) >= _MAX_EXECUTORS:  # reached by programs with a new tag for every message
                # Another thread may have looked up an idle executor; finding it closed, that thread takes a new one.
                self._transfers = {key: old for key, old in self._transfers.items() if not old.close_if_idle()}
            name = f"ferro-{self._info.name}-{channel.direction} {channel.peer} tag {channel.tag}"
            return self._transfers.setdefault(channel, SerialExecutor(name))

    def _perform(
        self,
        numbered: Callable[[int], Call],
        action: Action,
        finish: Finish,
        nbytes: int,
        timeout_s: float,
        launches: bool,
        peers: tuple[int, ...],
        seq: int,
    ) -> Any:
        """Execute operation number `seq` and notify observers; return its result, or the Work of a launched one.

        A launched operation goes into the device's queue of the thread that calls this.
        """
        call = numbered(seq)
        if not self._observed:
            self._execute(call, action, timeout_s, peers)
        else:
            rank = self.backend.rank
            event = Event(
                op=call.op,
                seq=seq,
                group=self._info.name,
                rank=rank,
                global_rank=self._info.global_ranks[rank],
                nbytes=nbytes,
                start_s=time.time(),
                thread=threading.current_thread().name,
            )
            self._notify("started", event)
            started, error = time.monotonic(), ""
            try:
                self._execute(call, action, timeout_s, peers)
            except BaseException as raised:
                error = type(raised).__name__
                raise
            finally:
                self._notify("finished", replace(event, seconds=time.monotonic() - started, error=error))
        if not launches:
            return finish()
        site = CallSite(call, peers, timeout_s, timeout_s)
        completion = self.backend.launched()
        return LaunchedWork(call.op, call.seq, finish(), completion, lambda error: self._fail(error, site))

    def _notify(self, method: Literal["started", "finished"], event: Event) -> None:
        """Notify all observers; an observer that raises must not disturb the operation."""
        for observer in self._info.observers:
            try:
                observer.started(event) if method == "started" else observer.finished(event)
            except Exception as error:  # noqa: BLE001 - whatever a stranger's observer meets
                warnings.warn(
                    f"observer {type(observer).__name__} failed at {event.op} #{event.seq}: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _execute(self, call: Call, action: Action, timeout_s: float, peers: tuple[int, ...] = ()) -> None:
        """Run an operation by its deadline; a failure ends the group with the cause that all ranks report.

        An operation without `peers` is a collective.
        """
        if self._failure is not None:  # the group died while this operation waited for earlier ones
            self._raise_dead(call.op)
        started = time.monotonic()
        deadline = started + timeout_s
        try:
            if not peers:
                self.backend.agree(call, deadline=deadline)
            action(deadline=deadline)
        except UnsupportedError:  # raised by the backend, on all ranks
            raise
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # The other ranks are told of the user's interrupt. A killed simulated rank raises no Exception and reports
            # nothing, as a killed process would.
            cause = self._fail(error, CallSite(call, peers, timeout_s, time.monotonic() - started))
            if isinstance(error, FerroError | TimeoutError):  # its text is in that of the cause
                raise cause from None
            if isinstance(error, Exception):
                raise cause from error
            raise

    def _fail(self, error: BaseException, site: CallSite) -> FerroError:
        """Find the cause that all ranks report, and let no further operation begin."""
        if self._failure is not None:
            return self._failure
        # The group makes no collective after this one, so a number may be taken to learn how many there were.
        user_call = find_user_call(issuing_thread())
        site = replace(site, user_call=user_call, collectives=self._collectives.next_number())
        cause = self._agreement.agree(error, site, self.backend.abort)
        with self._lock:
            self._failure = self._failure or cause
        lost = self._info.global_ranks[cause.peer] if isinstance(cause, PeerLost) and cause.peer is not None else None
        self._info.failures.append((f"{type(cause).__name__}: {cause}", lost))
        return cause
