"""Dispatcher: carries out a group's operations, in order, by a deadline, and once it fails, ends.

`ProcessGroup` has checked the arguments before; a backend moves the bytes after. Between the
two, this gives each operation its number and deadline, tells observers, and turns a failure
into the one cause that every rank reports.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from ferro.backend import Backend
from ferro.collectives.label import LABEL_BYTES, Call, compare_labels, transfer_call
from ferro.errors import FerroError, GroupClosed, UnsupportedError, UsageError
from ferro.group.failure_agreement import CallSite, FailureAgreement
from ferro.group.group_info import GroupInfo
from ferro.group.serial_executor import ExecutorClosed, SerialExecutor
from ferro.group.work import LaunchedWork, Work
from ferro.observers import Event
from ferro.types import Array, Device

_CPU = Device.CPU  # looked up in each call
_MOST_LANES = 256
_LEAST_S = 1e-3  # what is left of a deadline that has passed: enough to fail properly


_forks = 0  # how often this process was forked since ferro was imported


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class ChannelKey(NamedTuple):
    """What orders transfers: those with one peer, in one direction, with one tag."""

    direction: str
    peer: int
    tag: int


class Dispatcher:
    """Carries out the operations of one group on one rank."""

    def __init__(self, backend: Backend, members: GroupInfo) -> None:
        self.backend = backend
        self._members = members
        self._observed = bool(members.observers)
        self._streams = backend.streams
        self._postmortem = FailureAgreement(members, backend.rank)
        self._collectives = SerialExecutor(f"ferro-{members.name}-collectives")
        self._transfers: dict[ChannelKey, SerialExecutor] = {}
        self._lock = threading.Lock()
        self._dead: FerroError | None = None
        self._closed = False
        self._pid = os.getpid()
        self._forks = _forks
        self._timeout_s = members.timeout_s

    @property
    def state(self) -> str:
        """What can be done with the group: it is "open", "dead" or "closed"."""
        return "closed" if self._closed else "dead" if self._dead else "open"

    def seconds(self, timeout_s: float | None) -> float:
        """Return the time that an operation is given."""
        if timeout_s is None:
            return self._members.timeout_s
        number = isinstance(timeout_s, int | float | np.number)
        if not number or not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise UsageError(
                f"timeout_s must be a positive number of seconds, at most "
                f"{threading.TIMEOUT_MAX:.0f}, not {timeout_s!r}"
            )
        return float(timeout_s)

    def countdown(self, timeout_s: float | None) -> Callable[[], float]:
        """Return what tells the time left of a call that is made of several operations."""
        deadline = time.monotonic() + self.seconds(timeout_s)
        return lambda: max(_LEAST_S, deadline - time.monotonic())

    def collective(
        self,
        call: Call,
        action: Callable[[float], None],
        finish: Callable[[], object],
        nbytes: int,
        async_op: bool,
        timeout_s: float | None,
        device: Device = _CPU,
    ) -> Any:
        """Carry out a collective after all that were issued before it.

        Args:
            call: what every rank must call; its number is filled in here.
            action: moves the data, given the deadline.
            finish: makes the caller's result of it.
            nbytes: size of this rank's data, for observers.
            async_op: return a Work at once.
            timeout_s: deadline in seconds from when it begins, None for the group's.
            device: where the data is.
        """
        allowed = self._timeout_s if timeout_s is None else self.seconds(timeout_s)
        if self._closed or self._dead is not None or self._forks is not _forks:
            self._refuse(call.op)
        launched = device in self._streams
        lane = self._collectives
        if async_op and not launched:
            return self._start(lane, call.op, partial(self._collective, call, action, finish, nbytes, allowed))
        # What `lane.run` does, written out: it is on the path of every collective.
        if lane.pending:
            lane.let_pending_begin()
        with lane.turn:
            if lane.closed:
                self._refuse(call.op)
            numbered = call.numbered(lane.number())
            if not launched:
                if self._observed:
                    self._carry_out(numbered, action, nbytes, allowed)
                else:
                    self._attempt(numbered, action, allowed)
                return finish()
            work = self._launch(numbered, action, finish, nbytes, allowed)
        return work if async_op else work.wait()

    def _collective(
        self,
        call: Call,
        action: Callable[[float], None],
        finish: Callable[[], object],
        nbytes: int,
        allowed: float,
        seq: int,
    ) -> object:
        """Carry out an asynchronous collective when its turn has come."""
        self._carry_out(call.numbered(seq), action, nbytes, allowed)
        return finish()

    def transfer(
        self,
        op: str,
        ways: tuple[ChannelKey, ...],
        action: Callable[[float], None],
        finish: Callable[[], object],
        *,
        nbytes: int,
        async_op: bool,
        timeout_s: float | None,
        device: Device = _CPU,
    ) -> Any:
        """Carry out a transfer after those issued before it on the same ways."""
        allowed = self.seconds(timeout_s)
        self.check_open(op)
        peers = tuple(dict.fromkeys([way.peer for way in ways]))
        launched = device in self._streams

        def move(seq: int) -> object:
            call = Call(op, seq=seq)
            if launched:
                return self._launch(call, action, finish, nbytes, allowed, peers)
            self._carry_out(call, action, nbytes, allowed, peers)
            return finish()

        operation: Callable[[int], object] = move
        for way in ways[1:]:
            operation = partial(_run_in, self._lane(way), op, operation)
        lane = self._lane(ways[0])
        if launched:
            work: LaunchedWork[object] = self._in_turn(lane, op, operation)
            return work if async_op else work.wait()
        start = self._start if async_op else self._in_turn
        return start(lane, op, operation)

    def send(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Send one message, after its label where the backend's frames carry none."""
        if not self.backend.labels_frames:
            label = np.frombuffer(transfer_call(buffer).label(), np.uint8)
            self.backend.send(label, peer, tag=tag, deadline=deadline)
        self.backend.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Receive one message, comparing its label first."""
        if not self.backend.labels_frames:
            label = np.empty(LABEL_BYTES, np.uint8)
            self.backend.recv(label, peer, tag=tag, deadline=deadline)
            compare_labels(self.backend.rank, transfer_call(buffer), peer, label.tobytes())
        self.backend.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(self, source: Array, dst: int, target: Array, src: int, tag: int, deadline: float) -> None:
        """Send one message and receive another at the same time."""
        if not self.backend.labels_frames:
            mine = transfer_call(source).label()
            label = np.empty(LABEL_BYTES, np.uint8)
            self.backend.exchange([(dst, np.frombuffer(mine, np.uint8))], [(src, label)], tag=tag, deadline=deadline)
            compare_labels(self.backend.rank, transfer_call(target), src, label.tobytes())
        self.backend.exchange([(dst, source)], [(src, target)], tag=tag, deadline=deadline)

    def check_open(self, op: str) -> None:
        """Raise an error when no operation can be issued any more.

        Raises:
            GroupClosed: the group was closed, or died.
            UsageError: this process was forked from the one that made the group.
        """
        if self._closed or self._dead is not None or self._forks is not _forks:
            self._refuse(op)

    def cause_of_death(self, op: str) -> FerroError:
        """Return the error that ended the group, for a call that makes sense only afterwards."""
        if self._closed or self._dead is None:
            name = self._members.name
            raise UsageError(f"{op} on group {name!r}: the group is {self.state}", op=op, group=name)
        return self._dead

    def abort(self) -> None:
        """End everything at once: blocked calls raise, here and on the other ranks."""
        if self._dead is None and not self._closed:
            name = self._members.name
            self._dead = GroupClosed(f"group {name!r} was aborted", group=name)
            self._postmortem.aborted()
        self.backend.abort()

    def close(self, patience_s: float) -> None:
        """Let pending operations end, within `patience_s` seconds; then release the backend."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            # A sendrecv goes through its sending lane into its receiving one: close in this order.
            ways = sorted(self._transfers, key=lambda way: way.direction, reverse=True)
            lanes = [self._collectives, *(self._transfers[way] for way in ways)]
        if self._forks is not _forks:
            return  # the connections are the parent's
        deadline = time.monotonic() + (0.0 if self._dead else patience_s)
        drained = [lane.close(deadline) for lane in lanes]
        if not all(drained):
            if self._dead is None:
                self._postmortem.left()
            self.backend.abort()
        self.backend.close()

    def _refuse(self, op: str) -> NoReturn:
        """Say why no operation can be issued any more."""
        name = self._members.name
        if self._closed:
            raise GroupClosed(f"{op} on group {name!r}: the group was closed", op=op, group=name)
        if self._forks is not _forks:
            raise UsageError(
                f"{op} on group {name!r}: this process was forked from process {self._pid}, whose "
                "connections it must not use: start ranks with `ferro run`, and workers with "
                "multiprocessing's 'spawn'",
                op=op,
                group=name,
            )
        self._refuse_dead(op)

    def _refuse_dead(self, op: str) -> NoReturn:
        name = self._members.name
        raise GroupClosed(
            f"{op} on group {name!r}: the group died earlier: {self._dead}", op=op, group=name, rank=self.backend.rank
        ) from self._dead

    def _lane(self, way: ChannelKey) -> SerialExecutor:
        return self._transfers.get(way) or self._new_lane(way)

    def _new_lane(self, way: ChannelKey) -> SerialExecutor:
        with self._lock:
            if len(self._transfers) >= _MOST_LANES:  # a tag for every message makes as many
                self._transfers = {w: old for w, old in self._transfers.items() if not old.idle}
            name = f"{way.direction} {way.peer} tag {way.tag}"
            return self._transfers.setdefault(way, SerialExecutor(f"ferro-{self._members.name}-{name}"))

    def _in_turn(self, lane: SerialExecutor, op: str, operation: Callable[[int], object]) -> Any:
        try:
            return lane.run(op, operation)
        except ExecutorClosed:
            self._refuse(op)

    def _start(self, lane: SerialExecutor, op: str, operation: Callable[[int], object]) -> Work[object]:
        try:
            return lane.start(op, operation)
        except ExecutorClosed:
            self._refuse(op)

    def _launch(
        self,
        call: Call,
        action: Callable[[float], None],
        finish: Callable[[], object],
        nbytes: int,
        allowed: float,
        peers: tuple[int, ...] = (),
    ) -> LaunchedWork[object]:
        """Launch an operation on a device's queue, in this thread, whose queue it is."""
        self._carry_out(call, action, nbytes, allowed, peers)
        scene = CallSite(call, peers, allowed, allowed)
        completion = self.backend.launched()
        return LaunchedWork(call.op, call.seq, finish(), completion, lambda error: self._die(error, scene))

    def _carry_out(
        self, call: Call, action: Callable[[float], None], nbytes: int, allowed: float, peers: tuple[int, ...] = ()
    ) -> None:
        """Carry out an operation, telling observers; one without `peers` is a collective."""
        if not self._observed:
            self._attempt(call, action, allowed, peers)
            return
        event = self._event(call, nbytes)
        self._tell("started", event)
        started = time.monotonic()
        failure = ""
        try:
            self._attempt(call, action, allowed, peers)
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            seconds = time.monotonic() - started
            self._tell("finished", replace(event, seconds=seconds, error=failure))

    def _attempt(
        self, call: Call, action: Callable[[float], None], allowed: float, peers: tuple[int, ...] = ()
    ) -> None:
        """Do it by its deadline; a failure ends the group with the cause that all report."""
        if self._dead is not None:  # while this waited for its turn
            self._refuse_dead(call.op)
        started = time.monotonic()
        deadline = started + allowed
        try:
            if not peers:
                self.backend.agree(call, deadline=deadline)
            action(deadline)
        except UnsupportedError:  # by the backend, on all ranks alike
            raise
        except Exception as error:
            scene = CallSite(call, peers, allowed, time.monotonic() - started)
            raise self._die(error, scene) from error
        except (KeyboardInterrupt, SystemExit) as error:
            # The user's interrupt is told to the others; a simulated rank that is killed tells
            # nobody, as a real one could not.
            self._die(error, CallSite(call, peers, allowed, time.monotonic() - started))
            raise

    def _tell(self, what: Literal["started", "finished"], event: Event) -> None:
        """Tell all observers; one that raises must not change what the ranks do."""
        for observer in self._members.observers:
            try:
                observer.started(event) if what == "started" else observer.finished(event)
            except Exception as error:  # noqa: BLE001 - whatever a stranger's observer meets
                warnings.warn(
                    f"observer {type(observer).__name__} failed at {event.op} #{event.seq}: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _die(self, error: BaseException, scene: CallSite) -> FerroError:
        """Find the cause that all ranks report, and let no further operation begin."""
        with self._lock:
            known = self._dead
        if known is not None:
            return known
        cause = self._postmortem.cause(error, scene, self.backend.abort)
        with self._lock:
            self._dead = self._dead or cause
        return cause

    def _event(self, call: Call, nbytes: int) -> Event:
        return Event(
            op=call.op,
            seq=call.seq,
            group=self._members.name,
            rank=self.backend.rank,
            global_rank=self._members.global_ranks[self.backend.rank],
            nbytes=nbytes,
            start_s=time.time(),
            thread=threading.current_thread().name,
        )


def _run_in(lane: SerialExecutor, op: str, operation: Callable[[int], object], _: int) -> object:
    """Run an operation of one lane within another's turn, by its number there."""
    return lane.run(op, operation)
