"""Dispatcher: carries out a group's operations, in order, by a deadline, and once it fails, ends.

`ProcessGroup` has checked the arguments before; a backend moves the bytes after. Between the
two, this gives each operation its number and deadline, tells observers, and turns a failure
into the one cause that every rank reports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ferro.arrays import name_of
from ferro.backend import Backend, mismatch
from ferro.calls import LABEL_BYTES, Call, transfer_call
from ferro.errors import FerroError, GroupClosed, UnsupportedError, UsageError
from ferro.members import Members
from ferro.observers import Event
from ferro.postmortem import Postmortem, Scene
from ferro.reduction import Array
from ferro.work import Lane

_COLLECTIVES = "collectives"


class Dispatcher:
    """Carries out the operations of one group on one rank."""

    def __init__(self, backend: Backend, members: Members) -> None:
        self.backend = backend
        self._members = members
        self._postmortem = Postmortem(members.store)
        self._lanes: dict[object, Lane] = {}
        self._lock = threading.Lock()
        self._dead: FerroError | None = None
        self._closed = False

    @property
    def state(self) -> str:
        """What can be done with the group: it is "open", "dead" or "closed"."""
        return "closed" if self._closed else "dead" if self._dead else "open"

    def seconds(self, timeout_s: float | None) -> float:
        """Return the time that an operation is given."""
        if timeout_s is None:
            return self._members.timeout_s
        if not timeout_s > 0:
            raise UsageError(f"timeout_s must be positive, not {timeout_s!r}")
        return float(timeout_s)

    def collective(
        self,
        call: Call,
        action: Callable[[float], None],
        finish: Callable[[], object],
        *,
        nbytes: int,
        async_op: bool,
        timeout_s: float | None,
    ) -> Any:
        """Carry out a collective after all that were issued before it.

        Args:
            call: what every rank must call; its number is filled in here.
            action: moves the data, given the deadline.
            finish: makes the caller's result of it.
            nbytes: size of this rank's data, for observers.
            async_op: return a Work at once.
            timeout_s: deadline in seconds from when it begins, None for the group's.
        """
        allowed = self.seconds(timeout_s)
        self.check_open(call.op)

        def operation(seq: int) -> object:
            numbered = replace(call, seq=seq)

            def move(deadline: float) -> None:
                self.backend.agree(numbered, deadline=deadline)
                action(deadline)

            self._carry_out(numbered, move, nbytes, allowed)
            return finish()

        lane = self._lane(_COLLECTIVES)
        if async_op:
            return lane.start(call.op, operation)
        return lane.run(call.op, operation)

    def transfer(
        self,
        lanes: tuple[tuple[str, int], ...],
        call: Call,
        action: Callable[[float], None],
        finish: Callable[[], object],
        *,
        nbytes: int,
        async_op: bool,
        timeout_s: float | None,
    ) -> Any:
        """Carry out a transfer after those issued before it on the same (direction, peer)s."""
        allowed = self.seconds(timeout_s)
        self.check_open(call.op)

        def move(seq: int) -> object:
            self._carry_out(replace(call, seq=seq), action, nbytes, allowed)
            return finish()

        operation: Callable[[int], object] = move
        for key in lanes[1:]:
            operation = partial(_run_in, self._lane(key), call.op, operation)
        first = self._lane(lanes[0])
        if async_op:
            return first.start(call.op, operation)
        return first.run(call.op, operation)

    def send(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Send one message, after its label where the backend's frames carry none."""
        if not self.backend.labels_frames:
            label = np.frombuffer(
                transfer_call(name_of(buffer.dtype), buffer.size).label(), np.uint8
            )
            self.backend.send(label, peer, tag=tag, deadline=deadline)
        self.backend.send(buffer, peer, tag=tag, deadline=deadline)

    def recv(self, buffer: Array, peer: int, tag: int, deadline: float) -> None:
        """Receive one message, comparing its label first."""
        if not self.backend.labels_frames:
            label = np.empty(LABEL_BYTES, np.uint8)
            self.backend.recv(label, peer, tag=tag, deadline=deadline)
            expected = transfer_call(name_of(buffer.dtype), buffer.size)
            if label.tobytes() != expected.label():
                raise mismatch(self.backend.rank, expected, peer, label.tobytes())
        self.backend.recv(buffer, peer, tag=tag, deadline=deadline)

    def exchange(
        self, source: Array, dst: int, target: Array, src: int, tag: int, deadline: float
    ) -> None:
        """Send one message and receive another at the same time."""
        if not self.backend.labels_frames:
            mine = transfer_call(name_of(source.dtype), source.size).label()
            expected = transfer_call(name_of(target.dtype), target.size)
            label = np.empty(LABEL_BYTES, np.uint8)
            self.backend.exchange(
                [(dst, np.frombuffer(mine, np.uint8))], [(src, label)], tag=tag, deadline=deadline
            )
            if label.tobytes() != expected.label():
                raise mismatch(self.backend.rank, expected, src, label.tobytes())
        self.backend.exchange([(dst, source)], [(src, target)], tag=tag, deadline=deadline)

    def check_open(self, op: str) -> None:
        """Raise GroupClosed when no operation can be issued any more."""
        name = self._members.name
        if self._closed:
            raise GroupClosed(f"{op} on group {name!r}: the group was closed", op=op, group=name)
        self._check_alive(op)

    def cause_of_death(self, op: str) -> FerroError:
        """Return the error that ended the group, for a call that makes sense only afterwards."""
        if self._closed or self._dead is None:
            name = self._members.name
            raise UsageError(
                f"{op} on group {name!r}: the group is {self.state}", op=op, group=name
            )
        return self._dead

    def abort(self) -> None:
        """End everything at once: blocked calls raise, here and on the other ranks."""
        if self._dead is None and not self._closed:
            name = self._members.name
            self._dead = GroupClosed(f"group {name!r} was aborted", group=name)
            self._postmortem.aborted(self._scene(Call("barrier"), 0.0, 0.0))
        self.backend.abort()

    def close(self, patience_s: float) -> None:
        """Let pending operations end, within `patience_s` seconds; then release the backend."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            lanes = list(self._lanes.values())
        deadline = time.monotonic() + (0.0 if self._dead else patience_s)
        drained = [lane.close(deadline) for lane in lanes]
        if not all(drained):
            if self._dead is None:
                self._postmortem.left(self._scene(Call("barrier"), 0.0, 0.0))
            self.backend.abort()
        self.backend.close()

    def _check_alive(self, op: str) -> None:
        if self._dead is not None:
            name = self._members.name
            raise GroupClosed(
                f"{op} on group {name!r}: the group died earlier: {self._dead}",
                op=op,
                group=name,
                rank=self.backend.rank,
            ) from self._dead

    def _lane(self, key: object) -> Lane:
        with self._lock:
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(f"ferro-{self._members.name}-{key}")
            return lane

    def _carry_out(
        self, call: Call, action: Callable[[float], None], nbytes: int, allowed: float
    ) -> None:
        self._check_alive(call.op)
        observers = self._members.observers
        event = self._event(call, nbytes) if observers else None
        if event is not None:
            for observer in observers:
                observer.started(event)
        started = time.monotonic()
        failure = ""
        try:
            action(started + allowed)
        except (UsageError, UnsupportedError) as error:
            failure = type(error).__name__
            raise
        except Exception as error:
            died = self._die(error, self._scene(call, allowed, time.monotonic() - started))
            failure = type(died).__name__
            raise died from error
        except BaseException as error:
            failure = type(error).__name__
            # The user's interrupt is told to the others; a simulated rank that is killed tells
            # nobody, as a real one could not.
            if isinstance(error, KeyboardInterrupt | SystemExit):
                self._die(error, self._scene(call, allowed, time.monotonic() - started))
            raise
        finally:
            if event is not None:
                seconds = time.monotonic() - started
                ended = replace(event, seconds=seconds, error=failure)
                for observer in observers:
                    observer.finished(ended)

    def _die(self, error: BaseException, scene: Scene) -> FerroError:
        """Find the cause that all ranks report, and let no further operation begin."""
        with self._lock:
            known = self._dead
        if known is not None:
            return known
        cause = self._postmortem.cause(error, scene, self.backend.abort)
        with self._lock:
            self._dead = self._dead or cause
        return cause

    def _scene(self, call: Call, allowed: float, elapsed: float) -> Scene:
        return Scene(
            group=self._members.name,
            rank=self.backend.rank,
            hosts=self._members.hosts,
            call=call,
            timeout_s=allowed,
            elapsed_s=elapsed,
        )

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


def _run_in(lane: Lane, op: str, operation: Callable[[int], object], _: int) -> object:
    """Run an operation of one lane within another's turn, by its number there."""
    return lane.run(op, operation)
