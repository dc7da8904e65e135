"""A world: the processes of one library's ranks, and orders to all of them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ferro.errors import BackendError
from ferro_bench.contestants import WorldPlan
from ferro_bench.link import Link
from ferro_bench.peers import PEERS

# How long processes have to report why they end, to leave in order when their driver is gone, and
# to end when asked to.
_REPORT_S = 2.0
_LEAVE_S = 2.0
_GRACE_S = 5.0
_TAIL_BYTES = 4 * 1024


class World:
    """The ranks of one library, once all have reported.

    Attributes:
        plan: what was started.
        version: what its ranks say of their library.
    """

    def __init__(self, plan: WorldPlan, folder: Path, contact: Mapping[str, object]) -> None:
        """Start the processes.

        Args:
            plan: what to start.
            folder: private to us; output and task are written there.
            contact: "host", "port" and "secret" of the driver.

        Raises:
            BackendError: a process could not be started.
        """
        self.plan = plan
        self.version = ""
        self._links: dict[int, Link] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._output = folder / f"{plan.name}.output"
        task = folder / f"{plan.name}.task"
        meeting = str(folder / f"{plan.name}.meeting")
        about = {"world": plan.name, "world_size": plan.world_size, "backend": plan.backend}
        task.write_text(json.dumps({**about, **contact, "meeting": meeting}))
        try:
            for command in plan.commands(task):
                self._start(command)
        except OSError as exc:
            self.close()
            raise BackendError(f"{plan.name} could not be started: {exc}") from exc

    def _start(self, command: list[str]) -> None:
        with self._output.open("ab") as output:
            self._processes.append(
                subprocess.Popen(  # noqa: S603 - from the plan
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    def welcome(self, link: Link, hello: Mapping[str, Any]) -> None:
        """Take a rank that has reported.

        Raises:
            BackendError: it is not one of the ranks that were started.
        """
        rank, size = hello["rank"], hello["world_size"]
        expected = PEERS[self.plan.peer.name].family if self.plan.peer else ""
        self.version = hello["version"]
        if size != self.plan.world_size or rank in self._links:
            link.close()
            raise BackendError(
                f"{self.plan.name}: a rank says it is {rank} of {size}, and "
                f"{self.plan.world_size} were started: launcher and library ({self.version}) do "
                f"not belong together"
            )
        if expected not in self.version.lower():
            link.close()
            raise BackendError(
                f"{self.plan.name}: its ranks run with {self.version!r}; use an environment of its own for each MPI"
            )
        self._links[rank] = link

    def complete(self) -> bool:
        """Say whether all ranks have reported.

        Raises:
            BackendError: a process has ended before.
        """
        if len(self._links) == self.plan.world_size:
            return True
        if any(process.poll() is not None for process in self._processes):
            raise self.failure("ended before all its ranks were connected")
        return False

    def ask(self, order: Mapping[str, object], timeout_s: float) -> list[dict[str, Any]]:
        """Give all ranks an order; return their replies, by rank.

        Raises:
            BackendError: a rank left, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        replies: dict[int, dict[str, Any]] = {}
        try:
            for link in self._links.values():
                link.send(dict(order))
        except OSError as exc:
            raise self.failure("lost a rank") from exc
        with selectors.DefaultSelector() as selector:
            for rank, link in self._links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while len(replies) < len(self._links):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    late = sorted(set(self._links) - set(replies))
                    what = f"did not answer within {timeout_s:g} s (ranks {late})"
                    raise self.failure(what, ending=False)
                for key, _ in selector.select(left_s):
                    reply = self._take(key.data)
                    if reply is not None:
                        replies[key.data] = reply
        return [replies[rank] for rank in range(len(self._links))]

    def _take(self, rank: int) -> dict[str, Any] | None:
        try:
            return self._links[rank].take()
        except EOFError:
            raise self.failure(f"lost rank {rank}") from None

    def failure(self, what: str, *, ending: bool = True) -> BackendError:
        """Return an error with the last words of the processes, which are ended.

        Args:
            what: what happened.
            ending: they are about to end by themselves: a launcher's report takes a moment.
        """
        if ending:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[0].wait(_REPORT_S)
        self.close()
        words = self._output.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        return BackendError(
            f"{self.plan.name}, {self.plan.world_size} ranks: it {what}. It last wrote:\n{words or '(nothing)'}"
        )

    def dismiss(self, timeout_s: float) -> None:
        """Let the ranks leave their library in order; `close` makes who does not."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send({"do": "end"})
        self._wait(timeout_s)

    def close(self) -> None:
        """End all processes, however they are. Idempotent."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        running = [process for process in self._processes if process.poll() is None]
        self._wait(_LEAVE_S)  # without a driver ranks leave in order, if they can
        _signal([process for process in running if process.poll() is None], signal.SIGTERM)
        self._wait(_GRACE_S)
        _signal(running, signal.SIGKILL)  # and what a launcher that has ended left in its group
        for process in running:
            process.wait()

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def _signal(processes: Sequence[subprocess.Popen[bytes]], signum: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
