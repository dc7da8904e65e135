"""The processes of one library's ranks, and the orders that the driver sends them."""

from __future__ import annotations

import contextlib
import json
import selectors
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ferro.errors import BackendError
from ferro.launch.processes import Supervisor
from ferro_bench.contestants import WorldPlan
from ferro_bench.link import Link
from ferro_bench.peers import PEERS

# How long processes may take to report why they end (_REPORT_S), to leave in order when the driver
# is gone (_LEAVE_S), and to end when asked to (_GRACE_S).
_REPORT_S = 2.0
_LEAVE_S = 2.0
_GRACE_S = 5.0
_TAIL_BYTES = 4 * 1024


class BenchWorld:
    """The ranks of one library.

    Attributes:
        plan: how the ranks were started.
        version: name and version of their library, as the ranks report it.
    """

    def __init__(self, plan: WorldPlan, folder: Path, endpoint: Mapping[str, object]) -> None:
        """Start the processes.

        Args:
            plan: how to start the ranks.
            folder: private to this user; output and task are written there.
            endpoint: "host", "port" and "secret" of the driver.

        Raises:
            BackendError: a process could not be started.
        """
        self.plan = plan
        self.version = ""
        self._closed = False
        self._links: dict[int, Link] = {}
        # Without a driver ranks leave in order, if they can, before the guard kills them.
        self._supervisor = Supervisor(orphan_grace_s=_LEAVE_S + _GRACE_S)
        self._output = folder / f"{plan.name}.output"
        task = folder / f"{plan.name}.task"
        init_file = str(folder / f"{plan.name}.init")
        about = {"world": plan.name, "world_size": plan.world_size, "backend": plan.backend}
        task.write_text(json.dumps({**about, **endpoint, "init_file": init_file}))
        try:
            for command in plan.commands(task):
                with self._output.open("ab") as output:
                    self._supervisor.start(command, stdout=output)
        except OSError as exc:
            self.close()
            raise BackendError(f"{plan.name} could not be started: {exc}") from exc

    def add_rank(self, link: Link, hello: Mapping[str, Any]) -> None:
        """Add a rank that has identified itself.

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
        """Say whether all ranks are connected.

        Raises:
            BackendError: a process has ended before.
        """
        if len(self._links) == self.plan.world_size:
            return True
        self._supervisor.wait(0)
        if len(self._supervisor.running()) < len(self._supervisor.children):
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
                    reply = self._receive(key.data)
                    if reply is not None:
                        replies[key.data] = reply
        return [replies[rank] for rank in range(len(self._links))]

    def _receive(self, rank: int) -> dict[str, Any] | None:
        try:
            return self._links[rank].receive()
        except EOFError:
            raise self.failure(f"lost rank {rank}") from None

    def failure(self, what: str, *, ending: bool = True) -> BackendError:
        """End the processes; return an error with the end of their output.

        Args:
            what: the event, as a predicate: "lost rank 0".
            ending: the processes are about to end by themselves, and get a moment to report why.
        """
        if ending:
            deadline = time.monotonic() + _REPORT_S
            while self._supervisor.children[0].ended_at is None and (left_s := deadline - time.monotonic()) > 0:
                self._supervisor.wait(left_s)
        self.close()
        words = self._output.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        return BackendError(
            f"{self.plan.name}, {self.plan.world_size} ranks: it {what}. It last wrote:\n{words or '(nothing)'}"
        )

    def shut_down(self, timeout_s: float) -> None:
        """Let the ranks leave their library in order; `close` ends the others."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send({"do": "end"})
        self._supervisor.wait_all(timeout_s)

    def close(self) -> None:
        """End all processes, whatever state they are in. Idempotent."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        if not self._closed:
            self._closed = True
            with self._supervisor:
                self._supervisor.wait_all(_LEAVE_S)  # without a driver ranks leave in order, if they can
                self._supervisor.end(grace_s=_GRACE_S)
