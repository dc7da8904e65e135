"""The supervisor of processes: it starts them, passes on their output, ends them, and leaves none behind.

Every process leads a session, and so a process group, of its own; signals to the group reach its descendants too.
Two small programs, run by a bare interpreter (`-I -S`: no site, no environment), act when this process dies, however
it dies:

- the guard, one for each supervisor, waits for the end of a pipe that only this process holds open, and then kills
  what is left of the groups, grandchildren too, on any POSIX system;
- the starter, for processes started with `dies_with_parent`, asks Linux to kill it when this process dies, and then
  executes the program in its place.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import BinaryIO, NoReturn, Self, TypeAlias

Receiver: TypeAlias = Callable[[bytes], None]

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FORWARDED = (signal.SIGUSR1, signal.SIGUSR2)  # for programs that handle them, as under Slurm
END_GRACE_S = 2.5  # between the signal that asks processes to end and the one that kills them
_TICK_S = 0.5
_POLL_S = 0.02  # between two checks for changes that no file descriptor reports
_REAP_S = 5.0  # a killed process ends at once, unless the kernel holds it
_READ_BYTES = 64 * 1024
_DRAIN_READS = 64  # more than a pipe holds, yet bounded, since a grandchild may go on writing

_BARE_PYTHON = (sys.executable, "-I", "-S", "-c")
_STARTER = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)  # the parent died before the request above could see it
os.execvp(sys.argv[2], sys.argv[2:])
"""
_GUARD = """
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    group = int(line)
    if group > 0:
        groups.add(group)
    else:
        groups.discard(-group)
deadline = time.monotonic() + float(sys.argv[1])
def send(group, signum):
    try:
        os.killpg(group, signum)
    except OSError:
        return False
    return True
while groups and time.monotonic() < deadline:
    groups = {group for group in groups if send(group, 0)}
    time.sleep(0.05)
for group in groups:
    send(group, signal.SIGKILL)
"""


class ChildProcess(subprocess.Popen[bytes]):
    """A process that a supervisor started; its process group has the same id."""

    ended_at: float | None = None  # `time.monotonic()` when the supervisor noticed its end
    signalled_at: float | None = None  # when the supervisor first signalled the group of the running process
    group_gone = False  # all processes of the group have ended or were killed: its id may belong to others now
    pidfd: int | None = None  # is readable once the process has ended, on Linux

    def signal_group(self, signum: signal.Signals) -> None:
        """Send a signal to the process and to those of its descendants that share its group."""
        if not self.group_gone:
            if self.ended_at is None and self.signalled_at is None:
                self.signalled_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signum)

    def check_group(self) -> bool:
        """Check whether the process and all others in its group have ended."""
        if not self.group_gone and self.ended_at is not None:
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):  # macOS raises PermissionError for zombies
                self.group_gone = True
        return self.group_gone


class Supervisor:
    """Starts processes and watches them; leaving the context ends all that is left of them."""

    def __init__(self, *, wake: socket.socket | None = None, orphan_grace_s: float = 0.0) -> None:
        """Start the guard, which gives the processes `orphan_grace_s` to end in order after this one's death.

        A `wait` ends when `wake` is readable.
        """
        self.children: list[ChildProcess] = []
        self._receivers: dict[int, Receiver] = {}  # by descriptor
        self._on_end: dict[ChildProcess, Callable[[ChildProcess], object]] = {}
        self._selector = selectors.DefaultSelector()
        if wake is not None:
            self._selector.register(wake, selectors.EVENT_READ)
        self._guard = subprocess.Popen(  # noqa: S603 - our own program
            [*_BARE_PYTHON, _GUARD, str(orphan_grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        finally:
            for child in self.children:
                child.signal_group(signal.SIGKILL)
                if child.ended_at is None and child.pidfd is not None:
                    os.close(child.pidfd)
            self._guard.kill()
            for process in (*self.children, self._guard):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_REAP_S)
                for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                    stream.close()
            self._selector.close()

    def start(
        self,
        command: Sequence[str],
        *,
        stdout: BinaryIO | Receiver,
        stderr: Receiver | None = None,
        stdin: int = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        on_end: Callable[[ChildProcess], object] = lambda _: None,
        dies_with_parent: bool = False,
    ) -> ChildProcess:
        """Start a process.

        Args:
            command: program and arguments.
            stdout: a file, or a function that is given the bytes as they come.
            stderr: a function that is given the bytes; None to write them where `stdout` goes.
            stdin: a descriptor to read from; empty by default.
            env: its environment; this process's own by default.
            on_end: called once with the process, when its end was noticed and all output received.
            dies_with_parent: on Linux, the kernel kills the process when the thread that started it ends.

        Raises:
            OSError: it could not be started.
        """
        if dies_with_parent:
            command = [*_BARE_PYTHON, _STARTER, str(os.getpid()), *command]
        child = ChildProcess(
            command,
            env=env,
            stdin=stdin,
            stdout=subprocess.PIPE if callable(stdout) else stdout,
            stderr=subprocess.STDOUT if stderr is None else subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.children.append(child)
        self._on_end[child] = on_end
        self._tell_guard(child.pid)
        for stream, receiver in ((child.stdout, stdout), (child.stderr, stderr)):
            if stream is not None and callable(receiver):
                os.set_blocking(stream.fileno(), False)
                self._receivers[stream.fileno()] = receiver
                self._selector.register(stream, selectors.EVENT_READ)
        with contextlib.suppress(OSError, AttributeError):  # without one, `wait` polls
            child.pidfd = os.pidfd_open(child.pid)
            self._selector.register(child.pidfd, selectors.EVENT_READ)
        return child

    def watch(self, descriptor: int, receiver: Receiver) -> None:
        """Receive from a further descriptor while waiting, until its end; it must stay open as long."""
        self._receivers[descriptor] = receiver
        self._selector.register(descriptor, selectors.EVENT_READ)

    def running(self) -> list[ChildProcess]:
        """List the processes whose end was not noticed yet."""
        return [child for child in self.children if child.ended_at is None]

    def wait(self, timeout_s: float = _TICK_S) -> None:
        """Wait for output, the end of a process or `wake`, and receive all that has come."""
        if any(child.pidfd is None for child in self.running()):
            timeout_s = min(timeout_s, _POLL_S)
        for key, _ in self._selector.select(max(timeout_s, 0.0)):
            # One piece per turn, so that a process that writes without end does not delay the others.
            if self._receive(key.fd) == 0:
                self._selector.unregister(key.fd)
        for child in self.running():
            if child.poll() is not None:
                self._notice_end(child)

    def wait_all(self, timeout_s: float) -> bool:
        """Wait until all processes have ended; return False where some have not by then."""
        deadline = time.monotonic() + timeout_s
        while self.running() and (left_s := deadline - time.monotonic()) > 0:
            self.wait(left_s)
        return not self.running()

    def end(
        self,
        signum: signal.Signals = signal.SIGTERM,
        *,
        grace_s: float = END_GRACE_S,
        hurry: Callable[[], object] = lambda: None,
    ) -> None:
        """Signal all groups, wait until they are gone, and kill what is left after `grace_s`.

        `hurry` is called while waiting; a true result ends the wait.
        """
        self.wait(0)  # a process that has failed by now has failed by itself
        for child in self.children:
            child.signal_group(signum)
        deadline = time.monotonic() + grace_s
        while not all(child.check_group() for child in self.children):
            self.wait(_POLL_S)
            if time.monotonic() > deadline or hurry():
                for child in self.children:
                    child.signal_group(signal.SIGKILL)
                self.wait_all(END_GRACE_S)
                for child in self.children:  # descendants are dead, too, but may stay zombies
                    child.group_gone = child.ended_at is not None
                return

    def _receive(self, pipe: int) -> int | None:
        """Pass on one piece of output; return its size: 0 at the end, None when there is nothing yet."""
        if pipe not in self._receivers:
            return None
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return None
        if data:
            self._receivers[pipe](data)
        return len(data)

    def _notice_end(self, child: ChildProcess) -> None:
        child.ended_at = time.monotonic()
        if child.pidfd is not None:
            self._selector.unregister(child.pidfd)
            os.close(child.pidfd)
        for stream in filter(None, (child.stdout, child.stderr)):
            for _ in range(_DRAIN_READS):
                if not self._receive(stream.fileno()):
                    break
        self._on_end[child](child)
        if child.check_group():
            self._tell_guard(-child.pid)

    def _tell_guard(self, group: int) -> None:
        """Make the guard watch a group; a negated id ends that, since the system may reuse the id."""
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(b"%d\n" % group)


@contextlib.contextmanager
def collected_signals() -> Iterator[socket.socket]:
    """Make a context in which signals to this process only become bytes in a socket.

    Signals that were ignored before (SIGHUP under nohup) stay ignored. Only for the main thread.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            # Python writes to the socket only for signals that have a handler.
            with _handled((*STOPPING, *FORWARDED), lambda *_: None):
                yield reader
        finally:
            signal.set_wakeup_fd(previous_fd)


def take_signals(reader: socket.socket) -> list[signal.Signals]:
    """Return the signals that arrived since the last call, in order."""
    received = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := reader.recv(4096):
            received += chunk
    return [signal.Signals(number) for number in received if number in (*STOPPING, *FORWARDED)]


def exit_on_signals() -> contextlib.AbstractContextManager[None]:
    """Make a context in which SIGTERM and SIGHUP raise SystemExit, so that every `with` ends its processes."""

    def leave(signum: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    return _handled((signal.SIGTERM, signal.SIGHUP), leave)


@contextlib.contextmanager
def _handled(signums: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Handle signals, except those that are ignored."""
    handled = [signum for signum in signums if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, handler) for signum in handled}
    try:
        yield
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
