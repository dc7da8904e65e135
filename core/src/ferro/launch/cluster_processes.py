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
_DROP_GROUP = frame(b"")


class _TextStream:
    """`sys.stdout` or `sys.stderr` as it is now, which in a notebook takes text only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, data: bytes, /) -> None:
        getattr(sys, self._name).write(self._decoder.decode(data))

    def flush(self) -> None:
        getattr(sys, self._name).flush()


@dataclass(frozen=True, slots=True)
class _ClusterRank:
    """One rank: its process, and this end of the socket to it."""

    process: ChildProcess
    output: RankOutput
    channel: socket.socket
    inbox: Inbox = field(default_factory=Inbox)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the end of the process is noticed elsewhere
            self.channel.sendall(data)


@dataclass(frozen=True, slots=True)
class _RankError:
    """An error that a rank reported."""

    rank: int
    text: str  # the traceback
    line: str  # its last line
    error: Exception | None  # itself, if it can be sent

    def exception(self) -> Exception:
        """Make the exception to raise here, with the traceback as its cause, as text."""
        error = self.error or FerroError(self.line, rank=self.rank)
        error.add_note(f"(raised on rank {self.rank})")
        error.__cause__ = RankTraceback(f"\n{self.text}")
        return error


class RankTraceback(Exception):
    """The traceback of another process, as text; it is the cause of the exception that came from there."""


class RankProcesses:
    """The ranks of one cluster, with their store; `run` may be called by one thread at a time."""

    def __init__(self, world_size: int, timeout_s: float | None) -> None:
        self._ranks: list[_ClusterRank] = []
        self._ended = ""  # why there are no ranks any more
        self._heard = 0.0
        self._pid = os.getpid()
        console = Console(world_size, _TextStream("stdout"), _TextStream("stderr"))
        secret = secrets.token_bytes(32)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(StoreServer(secret=secret)).address
            self._supervisor = stack.enter_context(Supervisor())
            for rank in range(world_size):
                place = LaunchInfo(
                    rank=rank,
                    world_size=world_size,
                    local_rank=rank,
                    local_world_size=world_size,
                    launcher="ferro",
                    store=store,
                    secret=secret,
                )
                self._start(RankOutput(console, rank), child_environment(place, timeout_s=timeout_s))
                stack.callback(self._ranks[-1].channel.close)
            resources = stack.pop_all()
        self._release = weakref.finalize(self, _close_in, self._pid, resources)  # also at the end of the program

    def _start(self, output: RankOutput, env: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        program = f"import sys; sys.path[:] = {sys.path!r}; from ferro.launch.cluster_rank import main; main()"
        with theirs:
            process = self._supervisor.start(
                [sys.executable, "-c", program],
                stdin=theirs.fileno(),
                stdout=self._noticing(output.out.receive),
                stderr=self._noticing(output.err.receive),
                env=env,
                on_end=output.finish,
            )
        rank = _ClusterRank(process, output, ours)
        self._ranks.append(rank)
        self._supervisor.watch(ours.fileno(), rank.inbox.receive)

    def _noticing(self, receive: Callable[[bytes], object]) -> Callable[[bytes], object]:
        def note_and_receive(data: bytes) -> None:
            self._heard = time.monotonic()
            receive(data)

        return note_and_receive

    def run(self, function: Callable[..., Any], arguments: tuple[object, ...]) -> list[Any]:
        if self._ended or os.getpid() != self._pid:
            raise UsageError(f"the ranks have ended: {self._ended or 'they belong to the parent process'}; make others")
        message = frame(pack_call(function, arguments))
        for rank in self._ranks:
            rank.inbox.messages.clear()
            rank.send(message)
        results: dict[int, Any] = {}
        errors: list[_RankError] = []
        try:
            self._collect(results, errors)
        except BaseException:  # KeyboardInterrupt, or an exception of a signal handler
            self._interrupt(results, errors)
            raise
        if errors:
            raise self._failure(errors)
        return [results[rank] for rank in range(len(self._ranks))]

    def _collect(self, results: dict[int, Any], errors: list[_RankError]) -> None:
        """Receive the answers of all ranks; once one has failed, interrupt those that take long."""
        deadline = None
        while missing := self._missing(results, errors):
            self._pump(_TICK_S)
            self._take_answers(missing, results, errors)
            if errors and deadline is None:
                deadline = time.monotonic() + _PEER_ERROR_S
            if deadline is not None and time.monotonic() > deadline:
                self._interrupt(results, errors)
                return
        self._drain()
        if errors:
            self._drop_group()

    def _missing(self, results: dict[int, Any], errors: list[_RankError]) -> list[int]:
        answered = {*results, *(error.rank for error in errors)}
        return [rank for rank in range(len(self._ranks)) if rank not in answered]

    def _pump(self, timeout_s: float) -> None:
        self._supervisor.wait(timeout_s)
        for rank in self._ranks:
            rank.output.release_due()

    def _take_answers(self, missing: list[int], results: dict[int, Any], errors: list[_RankError]) -> None:
        """Take the answers that have come; end all ranks, and raise, where one has died without an answer."""
        dead = [rank for rank in missing if self._ranks[rank].process.ended_at is not None]
        if dead:
            self._drain()  # the last answers and words
        for rank in missing:
            for message in self._ranks[rank].inbox.messages:
                text, *answer = unpack(message)
                if text is None:
                    results[rank] = answer[0]
                else:
                    errors.append(_RankError(rank, text, *answer))
        if died := [rank for rank in dead if not self._ranks[rank].inbox.messages]:
            code = describe_code(self._ranks[died[0]].process.returncode or 0)
            self._end(f"rank {died[0]} died ({code})")
            if any(not isinstance(error.error, _CONSEQUENCES) for error in errors):
                raise self._failure(errors)
            text = f"rank {died[0]} died while it ran the function: {code}. Read its output; the other ranks were ended"
            raise PeerLost(text, peer=died[0])

    def _drain(self) -> None:
        """Show all that the ranks have written by now, the unfinished last lines and held tracebacks too."""
        began = 0.0
        while self._heard >= began:
            began = time.monotonic()
            self._supervisor.wait(0)
        for rank in self._ranks:
            rank.output.out.finish()
            rank.output.err.finish()
            rank.output.release()

    def _interrupt(self, results: dict[int, Any], errors: list[_RankError]) -> None:
        """Raise KeyboardInterrupt in the functions that still run; end all ranks where one goes on all the same."""
        if self._ended:
            return
        deadline = time.monotonic() + _INTERRUPT_S
        for rank in self._missing(results, errors):
            self._ranks[rank].process.send_signal(signal.SIGINT)
        while missing := self._missing(results, errors):
            self._pump(_TICK_S)
            self._take_answers(missing, results, errors)
            if time.monotonic() > deadline:
                self._end(f"rank {missing[0]} went on for {_INTERRUPT_S:g} s after it was interrupted")
                return
        self._drain()
        self._drop_group()

    def _drop_group(self) -> None:
        for rank in self._ranks:
            rank.send(_DROP_GROUP)

    def _failure(self, errors: list[_RankError]) -> Exception:
        """Choose the error of the function itself before errors that follow from it; note the others in it."""
        first = min(errors, key=lambda item: isinstance(item.error, _CONSEQUENCES))
        error = first.exception()
        for other in errors:
            if other is not first:
                error.add_note(f"rank {other.rank} ended with {other.line}")
        if self._ended:
            error.add_note(f"The ranks have ended: {self._ended}.")
        return error

    def _end(self, why: str) -> None:
        """End the ranks by force."""
        self._ended = why
        self._release()

    def close(self) -> None:
        if self._ended or os.getpid() != self._pid:
            return
        self._ended = "the cluster was closed"
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.channel.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _END_S
        try:
            while self._supervisor.running() and time.monotonic() < deadline:
                self._pump(_TICK_S)
        finally:
            self._release()


def _close_in(pid: int, resources: contextlib.ExitStack) -> None:
    """Release the resources, but not in a forked child, whose parent goes on using them."""
    if os.getpid() == pid:
        resources.close()
