"""The rank server: a process that has imported what ranks need, and forks one for each request.

Starting an interpreter and importing NumPy and ferro takes longer than most tests; a fork takes milliseconds. The
server is `python -m ferro_testing.rank_server FD MODULE…`: it imports the modules, finds ferro's plugins, whose modules
are light, and then reads requests from the socket FD, one JSON object a line:

    {"start": {"arguments": […], "environment": {…}, "folder": "…"}}    answered by {"started": PID}
    {"end": PID}                                                          answered by {"ended": PID}

It reports `{"exited": PID, "status": CODE}` when a rank has ended; CODE is negative for the signal that ended it. Each
rank leads a session of its own. Its process id stays taken until "end", which kills what is left of its group. When
the socket closes, the server kills all ranks and leaves.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from importlib_metadata import entry_points

from ferro import strategies
from ferro.errors import PluginError
from ferro.runtime.environment import replace_environment
from ferro_testing import rank


class _RankServer:
    """Serves the requests of one client."""

    def __init__(self, client: socket.socket, woken: socket.socket) -> None:
        self._client = client
        self._woken = woken  # is readable after a SIGCHLD
        self._running: set[int] = set()
        self._exited: set[int] = set()
        self._requests = b""

    def serve(self) -> Mapping[str, Any] | None:
        """Serve until the client is gone; in the process of a new rank, return its request at once."""
        while True:
            ready, _, _ = select.select([self._client, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(4096)
                self._report_exits()
            if self._client not in ready:
                continue
            data = self._client.recv(1 << 20)
            if not data:
                break
            *lines, self._requests = (self._requests + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "end" in request:
                    self._end(request["end"])
                    self._answer(ended=request["end"])
                    continue
                pid = os.fork()
                if pid == 0:
                    return request["start"]  # type: ignore[no-any-return]
                self._running.add(pid)
                self._answer(started=pid)
        for pid in self._running | self._exited:
            with contextlib.suppress(OSError):  # nobody reads the answers
                self._end(pid)
        return None

    def _report_exits(self) -> None:
        for pid in list(self._running):
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                self._running.remove(pid)
                self._exited.add(pid)
                status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._answer(exited=pid, status=status)

    def _end(self, pid: int) -> None:
        """Kill what is left of a rank's group, and release its process id."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if pid in self._running:
            self._answer(exited=pid, status=os.waitstatus_to_exitcode(status))
        self._running.discard(pid)
        self._exited.discard(pid)

    def _answer(self, **content: int) -> None:
        self._client.sendall(json.dumps(content).encode() + b"\n")


def main(descriptor: str, *modules: str) -> None:
    """Serve; in a rank's process, carry out its task and exit."""
    for module in (*modules, *(entry.module for entry in entry_points(group="ferro"))):
        with contextlib.suppress(Exception):  # a rank that needs the module meets the error
            importlib.import_module(module)
    with contextlib.suppress(PluginError):  # likewise
        strategies.available()
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    client = socket.socket(fileno=int(descriptor))
    with client, reader, writer:
        request = _RankServer(client, reader).serve()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request is not None:
        _become_rank(request)


def _become_rank(request: Mapping[str, Any]) -> NoReturn:
    """Make this process look like one that was started for the rank, and carry out its task."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    replace_environment(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    np.random.seed()
    status = rank.main(*request["arguments"])
    # The rank ends as a child of `multiprocessing` does. The interpreter would take apart all that the server has
    # imported, which takes longer than most tests; nothing of that belongs to the rank.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
