"""Ranks that the rank server forks, watched as a `Supervisor` watches those that it starts itself."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from ferro.errors import FerroError

# Modules that the rank server imports, besides the hook modules of all plugins; a test suite may add what its ranks
# need. None may start threads or a library that must not be forked, such as MPI.
PRELOADED = ["ferro.runtime.world", "ferro.simulated", "ferro_testing.conformance", "numpy.random", "numpy.typing"]
_ANSWER_S = 60.0
_MOST_SERVERS = 3
_READ_AT_START = ("PYTHON", "LD_", "OPENBLAS_", "OMP_", "MKL_", "MALLOC_", "GLIBC_")


def can_fork(python: str, environments: Sequence[Mapping[str, str]]) -> bool:
    """Say whether forked ranks are the same as started ones.

    They are not with another interpreter, with different values on the ranks of variables that an interpreter or its
    libraries read when they start, where such values have changed too often to keep a server for each, or on systems
    whose libraries forbid a fork.
    """
    if sys.platform != "linux" or python != sys.executable:
        return False
    read = _read_at_start(environments[0])
    return all(_read_at_start(environment) == read for environment in environments) and _RankServerClient.has_room(read)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}


class ForkedRank:
    """A rank's process, with the id of its session."""

    def __init__(self, pid: int, on_end: Callable[[ForkedRank], object]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.ended_at: float | None = None  # `time.monotonic()`
        self.on_end = on_end
        self.released = False  # the system may reuse the id

    def signal_group(self, signum: signal.Signals) -> None:
        """Send a signal to the rank and to those of its descendants that share its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if not self.released:
                os.killpg(self.pid, signum)


class ForkedRanks:
    """The ranks of one run; leaving the context ends all that is left of them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """Use this process's rank server for the environment `env`, or start one."""
        self.children: list[ForkedRank] = []
        self._server = _RankServerClient.shared(env)

    def __enter__(self) -> Self:
        self._server.lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        finally:
            self._server.lock.release()

    def start(
        self, arguments: Sequence[str], *, env: Mapping[str, str], on_end: Callable[[ForkedRank], object]
    ) -> None:
        """Fork a rank that carries out `ferro_testing.rank.main(*arguments)`."""
        request = {"arguments": list(arguments), "environment": dict(env), "folder": str(Path.cwd())}
        pid = self._server.request("started", start=request)
        self.children.append(ForkedRank(pid, on_end))

    def running(self) -> list[ForkedRank]:
        """List the ranks whose end was not noticed yet."""
        return [child for child in self.children if child.ended_at is None]

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of a rank."""
        exited = self._server.exits(timeout_s)
        for child in self.running():
            if child.pid in exited:
                child.returncode, child.ended_at = exited[child.pid], time.monotonic()
                child.on_end(child)

    def wait_all(self, timeout_s: float) -> bool:
        """Wait until all ranks have ended; return False where some have not by then."""
        deadline = time.monotonic() + timeout_s
        while self.running() and (left_s := deadline - time.monotonic()) > 0:
            self.wait(left_s)
        return not self.running()

    def end(self, signum: signal.Signals = signal.SIGKILL, *, grace_s: float = 0.0) -> None:
        """Signal what is left of the ranks, wait `grace_s`, and kill them."""
        for child in self.running():
            child.signal_group(signum)
        self.wait_all(grace_s)
        for child in self.children:
            if not child.released:
                self._server.request("ended", end=child.pid)
                child.released = True
        self.wait(0.0)


class _RankServerClient:
    """A rank server of this process, which ends when this process does, however that happens.

    A server's variables that are read at the start are those of its ranks. Worlds of one have another number of threads
    than larger ones, so a test suite needs two servers.
    """

    _shared: ClassVar[list[_RankServerClient]] = []

    @classmethod
    def has_room(cls, read_at_start: Mapping[str, str]) -> bool:
        """Say whether there is a server with these variables, or may be one."""
        living = cls._living()
        return len(living) < _MOST_SERVERS or any(server.read_at_start == read_at_start for server in living)

    @classmethod
    def shared(cls, env: Mapping[str, str]) -> _RankServerClient:
        """Find or start the server for `env`."""
        for server in cls._living():
            if server.read_at_start == _read_at_start(env):
                return server
        cls._shared.append(cls(env))
        return cls._shared[-1]

    @classmethod
    def _living(cls) -> list[_RankServerClient]:
        """Forget servers that have ended, and in a forked process those of its parent."""
        cls._shared[:] = [it for it in cls._shared if it.owner == os.getpid() and it.process.poll() is None]
        return cls._shared

    def __init__(self, env: Mapping[str, str]) -> None:
        self.read_at_start = _read_at_start(env)
        self.owner = os.getpid()
        self.lock = threading.Lock()  # is held during a run: answers of two runs would mix
        self._socket, theirs = socket.socketpair()
        self._answers = b""
        self._exits: dict[int, int] = {}  # status by process id, of ranks that no run has taken note of
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "ferro_testing.rank_server", str(theirs.fileno()), *PRELOADED],
                env=env,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def request(self, answer: str, **content: Any) -> int:
        """Send a request; return what its answer says."""
        self._socket.sendall(json.dumps(content).encode() + b"\n")
        self._socket.settimeout(_ANSWER_S)
        while True:
            for found in self._received():
                if answer in found:
                    return int(found[answer])

    def exits(self, timeout_s: float) -> dict[int, int]:
        """Wait for an exit; return those that were reported since the last call, status by process id."""
        if not self._exits and select.select([self._socket], [], [], max(timeout_s, 0.0))[0]:
            for _ in self._received():
                pass
        exits, self._exits = self._exits, {}
        return exits

    def _received(self) -> list[dict[str, int]]:
        """Receive some answers, and take note of the exits among them."""
        data = self._socket.recv(1 << 16)
        if not data:
            raise FerroError(f"the rank server left with exit status {self.process.wait(_ANSWER_S)}")
        *lines, self._answers = (self._answers + data).split(b"\n")
        found: list[dict[str, int]] = [json.loads(line) for line in lines]
        self._exits |= {answer["exited"]: answer["status"] for answer in found if "exited" in answer}
        return found
