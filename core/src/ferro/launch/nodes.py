"""How the launchers of several nodes agree: on the job, on each attempt's store, on how it ended.

They meet in a store that node 0's launcher hosts at the endpoint. Keys:

    node/<r>              node r's terms: what must be the same everywhere
    node/<r>/taken        how many launchers call themselves node r
    terms                 node 0's answer: its own terms, or what does not fit
    beat/<r>              grows while node r's launcher lives
    left                  launchers that need nothing more
    <attempt>/contact     where the attempt's ranks find their store
    <attempt>/stop        above 0 once something failed anywhere
    <attempt>/result/<r>  node r's failure, or nothing
    <attempt>/verdict     node 0's choice among them, or nothing

Only node 0 watches the others; they watch node 0 by the answers of its store.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.launch.options import LaunchOptions
from ferro.launch.report import Failure
from ferro.launch.terms import describe_difference, write_terms
from ferro.rendezvous import StoreClient, StoreServer, StoreTimeout
from ferro.runtime.environment import Address, format_address, parse_address

JOIN_S = 300.0
"""How long nodes wait for one another to start."""

_BEAT_S = 0.5
_LOST_S = 60.0
_REQUEST_S = 10.0
_FAREWELL_S = 5.0
_FAREWELL_POLL_S = 0.02


class _NodeLostError(Exception):
    """The launcher of `node` is not heard of any more."""

    def __init__(self, node: int) -> None:
        super().__init__(node)
        self.node = node


class Meeting:
    """This node's part in a job of several nodes; use it as a context.

    Attributes:
        node_rank: this node.
        host: node 0's host, as all nodes reach it.
    """

    def __init__(self, options: LaunchOptions, secret: bytes) -> None:
        """Meet the other nodes.

        Raises:
            UsageError: another launcher has this node's rank.
            RendezvousError: node 0 cannot be reached, a node did not come, or the nodes were
                started with different options.
            AuthenticationError: this node does not hold node 0's secret.
        """
        assert options.endpoint is not None
        self.node_rank = options.node_rank
        self.host = options.endpoint[0]
        self._nnodes = options.nnodes
        self._next_beat = 0.0
        self._stopped = False
        self._came = 1
        self._met_at = time.monotonic()
        self._beats: dict[int, tuple[int, float]] = {}
        self._server: StoreServer | None = None
        address = options.endpoint
        if self.node_rank == 0:
            self._server = StoreServer(*options.endpoint, secret=secret)
            address = self._server.address
        self._store = StoreClient(address, secret, deadline=time.monotonic() + JOIN_S, request_timeout_s=_REQUEST_S)
        try:
            self._agree(options)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None:
            self._say_goodbye()
        self._close()

    def _say_goodbye(self) -> None:
        """Need nothing more; node 0 gives the others a moment to read its last word."""
        with contextlib.suppress(RendezvousError):
            self._store.add("left", 1)
            deadline = time.monotonic() + _FAREWELL_S
            while self.node_rank == 0 and time.monotonic() < deadline:
                if self._store.add("left", 0) >= self._came:
                    break
                time.sleep(_FAREWELL_POLL_S)

    def _close(self) -> None:
        self._store.close()
        if self._server is not None:
            self._server.close()

    def share_contact(self, attempt: int, store: Address, master: Address) -> None:
        """On node 0: tell where this attempt's ranks meet."""
        text = f"{format_address(store)} {format_address(master)}"
        self._store.set(f"{attempt}/contact", text.encode())

    def contact(self, attempt: int) -> tuple[Address, Address]:
        """The attempt's store, and the master for scripts that use torch.distributed too."""
        text = self._store.get(f"{attempt}/contact", deadline=time.monotonic() + JOIN_S).decode()
        store, master = (parse_address(part, source="contact") for part in text.split(" "))
        return store, master

    def stopped(self, attempt: int) -> bool:
        """Whether something failed elsewhere; call it often, it also shows that we live.

        Raises:
            RendezvousError: node 0's launcher is gone.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._store.add(f"beat/{self.node_rank}", 1)
            if self.node_rank == 0 and self._lost_node(now) is not None:
                self._store.add(f"{attempt}/stop", 1)
            self._stopped = self._store.add(f"{attempt}/stop", 0) > 0
        return self._stopped

    def conclude(self, attempt: int, failure: Failure | None) -> Failure | None:
        """Wait until all nodes have ended the attempt; return what failed first, if anything.

        Raises:
            RendezvousError: node 0's launcher is gone.
        """
        result = b"" if failure is None else failure.to_json()
        self._store.set(f"{attempt}/result/{self.node_rank}", result)
        if failure is not None:
            self._store.add(f"{attempt}/stop", 1)
        if self.node_rank == 0:
            verdict = self._judge(attempt)
            self._store.set(f"{attempt}/verdict", verdict.to_json() if verdict else b"")
        data = self._wait_for(f"{attempt}/verdict", attempt)
        self._stopped = False
        self._next_beat = 0.0
        return Failure.from_json(data) if data else None

    def _judge(self, attempt: int) -> Failure | None:
        """Node 0: collect the results; a node that is lost is a failure, too."""
        failures = []
        for node in range(self._nnodes):
            try:
                data = self._wait_for(f"{attempt}/result/{node}", attempt, self._check_lost)
            except _NodeLostError as exc:
                return Failure(
                    what=f"the launcher of node {exc.node} was not heard of for {_LOST_S:.0f} s",
                    status=1,
                    after_s=time.monotonic() - self._met_at,
                    restart=False,
                )
            if data:
                failures.append(Failure.from_json(data))
        return min(failures, key=lambda f: (f.consequence, f.after_s), default=None)

    def _wait_for(self, key: str, attempt: int, check: Callable[[], None] = lambda: None) -> bytes:
        """The value of a key that is set once some rank somewhere ends, whenever that is."""
        while True:
            with contextlib.suppress(StoreTimeout):
                return self._store.get(key, deadline=time.monotonic() + _BEAT_S)
            self.stopped(attempt)
            check()

    def _check_lost(self) -> None:
        lost = self._lost_node(time.monotonic())
        if lost is not None:
            raise _NodeLostError(lost)

    def _lost_node(self, now: float) -> int | None:
        """On node 0: a node whose launcher has not been heard of for a long time, or None."""
        for node in range(1, self._nnodes):
            count = self._store.add(f"beat/{node}", 0)
            before, since = self._beats.get(node, (-1, now))
            if count != before:
                self._beats[node] = (count, now)
            elif now - since > _LOST_S:
                return node
        return None

    def _agree(self, options: LaunchOptions) -> None:
        """Compare the terms of all nodes, and fail on all where they differ."""
        terms = write_terms(options)
        if self._store.add(f"node/{self.node_rank}/taken", 1) > 1:
            raise UsageError(f"another launcher already is node {self.node_rank}; give each node its own --node-rank")
        self._store.set(f"node/{self.node_rank}", terms.encode())
        deadline = time.monotonic() + JOIN_S
        if self.node_rank == 0:
            self._store.set("terms", self._compare(terms, deadline).encode())
        answer = self._store.get("terms", deadline=deadline).decode()
        if answer != terms:
            # Either what does not fit, or the terms of a node 0 that knows nothing of this node.
            accord = answer.startswith("{")
            self._say_goodbye()
            raise RendezvousError(describe_difference(self.node_rank, terms, answer) if accord else answer)

    def _compare(self, terms: str, deadline: float) -> str:
        """Node 0: its terms, or in what another node differs."""
        for node in range(1, self._nnodes):
            try:
                theirs = self._store.get(f"node/{node}", deadline=deadline).decode()
            except StoreTimeout:
                return f"node {node} did not come within {JOIN_S:.0f} s; read its launcher's output"
            self._came += 1
            if theirs != terms:
                return describe_difference(node, theirs, terms)
        return terms
