"""The processes of a cluster: started, given functions, heard, interrupted and ended."""

from __future__ import annotations

import codecs
import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ferro.errors import CollectiveTimeout, FerroError, GroupClosed, PeerLost, UsageError
from ferro.launch.messages import Inbox, frame, pack_call, unpack
from ferro.launch.output import Console, RankOutput
from ferro.launch.processes import ChildProcess, Supervisor
from ferro.launch.report import describe_code
from ferro.rendezvous import StoreServer
from ferro.runtime.environment import LaunchInfo, child_environment

_TICK_S = 0.1
_PEER_ERROR_S = 3.0  # how long ranks may take to report their own error after another rank's
_INTERRUPT_S = 5.0  # how long an interrupted function may take to end
_END_S = 10.0  # how long the ranks may take to leave their group
_CONSEQUENCES = (PeerLost, GroupClosed, CollectiveTimeout)


class RankTraceback(Exception):
    """The traceback of another process, as text; it is the cause of the exception that came from there."""


class _TextStream:
    """`sys.stdout` or `sys.stderr` as it is now, which in a notebook takes text only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes, /) -> None:
        getattr(sys, self._name).write(self._decoder.decode(data))

    def flush(self) -> None:
        getattr(sys, self._name).flush()


@dataclass(slots=True)
class _ClusterRank:
    """One rank: its process, this end of the socket to it, and its last answer."""

    number: int
    process: ChildProcess
    output: RankOutput
    channel: socket.socket
    inbox: Inbox = field(default_factory=Inbox)
    answered: bool = False
    result: Any = None
    traceback: str = ""
    line: str = ""  # the last of the traceback
    error: Exception | None = None  # itself, if it could be sent

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the end of the process is noticed elsewhere
            self.channel.sendall(frame(message))

    def take_answer(self) -> None:
        for message in self.inbox.take():
            self.answered = True
            self.result, self.traceback, self.line, self.error = unpack(message)


class RankProcesses:
    """The ranks of one cluster, with their store; `run` may be called by one thread at a time."""

    def __init__(self, world_size: int, timeout_s: float | None) -> None:
        self._ranks: list[_ClusterRank] = []
        self._errors: list[_ClusterRank] = []  # in order of arrival
        self._ended = ""  # why there are no ranks any more
        self._pid = os.getpid()
        console = Console(world_size, _TextStream("stdout"), _TextStream("stderr"))
        place = partial(LaunchInfo, world_size=world_size, local_world_size=world_size, launcher="ferro")
        secret = secrets.token_bytes(32)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(StoreServer(secret=secret)).address
            self._supervisor = stack.enter_context(Supervisor())
            for rank in range(world_size):
                info = place(rank=rank, local_rank=rank, store=store, secret=secret)
                self._start(rank, RankOutput(console, rank), child_environment(info, timeout_s=timeout_s))
                stack.callback(self._ranks[-1].channel.close)
            # Also at the end of the program, and not in a forked child, whose parent goes on using the ranks.
            self._release = weakref.finalize(self, _close_in, self._pid, stack.pop_all())

    def _start(self, number: int, output: RankOutput, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        program = f"import sys; sys.path[:] = {sys.path!r}; from ferro.launch.cluster_rank import main; main()"
        with theirs:
            process = self._supervisor.start(
                [sys.executable, "-c", program],
                stdin=theirs.fileno(),
                stdout=output.out.receive,
                stderr=output.err.receive,
                env=env,
                on_end=output.finish,
            )
        self._ranks.append(_ClusterRank(number, process, output, ours))
        self._supervisor.watch(ours.fileno(), self._ranks[-1].inbox.receive)

    def run(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> list[Any]:
        if self._ended or os.getpid() != self._pid:
            raise UsageError(f"the ranks have ended: {self._ended or 'they belong to the parent process'}; make others")
        message = pack_call(function, arguments)
        self._errors.clear()
        for rank in self._ranks:
            rank.answered = False
            rank.send(message)
        try:
            self._collect()
        except BaseException:  # KeyboardInterrupt, or an exception of a signal handler
            self._interrupt()
            raise
        if self._errors:
            raise self._failure()
        return [rank.result for rank in self._ranks]

    def _collect(self) -> None:
        """Receive the answers of all ranks; once one has failed, interrupt those that take long."""
        deadline = None
        while self._missing():
            self._pump()
            if self._errors and deadline is None:
                deadline = time.monotonic() + _PEER_ERROR_S
            if deadline is not None and time.monotonic() > deadline:
                self._interrupt()
                return
        self._show_rest()

    def _missing(self) -> list[_ClusterRank]:
        return [rank for rank in self._ranks if not rank.answered]

    def _pump(self) -> None:
        """Wait a moment for output and answers; end all ranks, and raise, where one has died without an answer."""
        self._supervisor.wait(_TICK_S)
        for rank in self._ranks:
            rank.output.release_due()
        dead = [rank for rank in self._missing() if rank.process.ended_at is not None]
        if dead:
            self._show_rest()  # with the answers that came last
        for rank in self._missing():
            rank.take_answer()
            if rank.traceback and rank.answered:
                self._errors.append(rank)
        if dead := [rank for rank in dead if not rank.answered]:
            code = describe_code(dead[0].process.returncode or 0)
            self._end(f"rank {dead[0].number} died ({code})")
            if any(not isinstance(rank.error, _CONSEQUENCES) for rank in self._errors):
                raise self._failure()
            text = f"rank {dead[0].number} died while it ran the function: {code}. Read its output"
            raise PeerLost(f"{text}; the other ranks were ended", peer=dead[0].number)

    def _show_rest(self) -> None:
        """Show all that the ranks wrote before their answers, the unfinished last lines and held tracebacks too."""
        self._supervisor.wait(0)  # receives as much as a pipe holds
        for rank in self._ranks:
            rank.output.out.finish()
            rank.output.err.finish()
            rank.output.release()

    def _interrupt(self) -> None:
        """Raise KeyboardInterrupt in the functions that still run; end all ranks where one goes on all the same."""
        deadline = time.monotonic() + _INTERRUPT_S
        for rank in self._missing() if not self._ended else ():
            rank.process.send_signal(signal.SIGINT)
        while not self._ended and (missing := self._missing()):
            self._pump()
            if time.monotonic() > deadline:
                self._end(f"rank {missing[0].number} went on for {_INTERRUPT_S:g} s after it was interrupted")
        if not self._ended:
            self._show_rest()
            self._drop_group()

    def _drop_group(self) -> None:
        for rank in self._ranks:
            rank.send(b"")

    def _failure(self) -> Exception:
        """Choose the error of the function itself before errors that follow from it; note the others in it."""
        if not self._ended:
            self._drop_group()
        first = min(self._errors, key=lambda rank: isinstance(rank.error, _CONSEQUENCES))
        error = first.error or FerroError(first.line, rank=first.number)
        error.__cause__ = RankTraceback(f"\n{first.traceback}")
        error.add_note(f"(raised on rank {first.number})")
        for rank in self._errors:
            if rank is not first:
                error.add_note(f"rank {rank.number} ended with {rank.line}")
        if self._ended:
            error.add_note(f"The ranks have ended: {self._ended}.")
        return error

    def _end(self, why: str) -> None:
        self._ended = why
        self._release()

    def close(self) -> None:
        if self._ended or os.getpid() != self._pid:
            return
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.channel.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_S
        try:
            while self._supervisor.running() and time.monotonic() < deadline:
                self._supervisor.wait(_TICK_S)
        finally:
            self._end("the cluster was closed")


def _close_in(pid: int, resources: contextlib.ExitStack) -> None:
    if os.getpid() == pid:
        resources.close()
