"""The launchers of several nodes agree on the job, and on the store and the outcome of each attempt.

They meet in a store that node 0's launcher hosts at the endpoint. Keys:

    node/<r>              node r's job spec: all that must be the same everywhere
    node/<r>/taken        how many launchers call themselves node r
    spec                  node 0's answer: its own job spec, or a sentence on the difference
    heartbeat/<r>         grows while node r's launcher lives
    left                  launchers that need nothing more
    <attempt>/endpoint    where the attempt's ranks find their store
    <attempt>/stop        above 0 once something failed anywhere
    <attempt>/result/<r>  node r's failure, or nothing
    <attempt>/first       the failure that node 0 chose as the first, or nothing

Only node 0 watches the others; they notice that node 0 is gone when its store does not answer.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from dataclasses import asdict
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.launch.options import LaunchOptions
from ferro.launch.report import Failure
from ferro.rendezvous import StoreClient, StoreServer, StoreTimeout, derive
from ferro.rendezvous.sockets import is_elsewhere, is_loopback, own_address, own_addresses
from ferro.runtime.environment import Address, format_address, parse_address

JOIN_S = 300.0  # how long the nodes wait for one another to start
_HEARTBEAT_S = 0.5
_LOST_S = 60.0
_REQUEST_S = 10.0
_LEAVE_S = 5.0
_LEAVE_POLL_S = 0.02


class NodeRendezvous:
    """This node's part in a job of several nodes; use it as a context.

    Every method raises RendezvousError where node 0's launcher is gone, or the nodes do not fit together.
    """

    def __init__(self, options: LaunchOptions, secret: bytes) -> None:
        """Join the other nodes, which have the same secret."""
        assert options.endpoint is not None
        self.node_rank = options.node_rank
        self.host = options.endpoint[0]  # node 0's, as all nodes reach it
        if self.node_rank == 0 and is_elsewhere(self.host):  # a machine there may forward this one port alone
            self.host = own_addresses()[0]
        self.secret = secret
        self._nnodes = options.nnodes
        self._next_heartbeat = 0.0
        self._stopped = False
        self._joined = 1
        self._joined_at = time.monotonic()
        self._heartbeats: dict[int, tuple[int, float]] = {}
        address, store_secret = options.endpoint, derive(secret, "launchers")
        with contextlib.ExitStack() as resources:
            if self.node_rank == 0:
                host, port = address
                host = host if is_loopback(host) else ""
                server = resources.enter_context(StoreServer(host, port, secret=store_secret))
                address = host or own_address(address[0]), server.address[1]
            deadline = time.monotonic() + JOIN_S
            self._store = resources.enter_context(
                StoreClient(address, store_secret, deadline=deadline, request_timeout_s=_REQUEST_S)
            )
            self._compare_specs(_job_spec(options), deadline)
            self._resources = resources.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with self._resources:
            if error is None:
                self._leave()

    def _leave(self) -> None:
        """Announce that this node needs nothing more; node 0 gives the others a moment to read its last answer."""
        with contextlib.suppress(RendezvousError):
            self._store.add("left", 1)
            deadline = time.monotonic() + _LEAVE_S
            while self.node_rank == 0 and self._store.add("left", 0) < self._joined and time.monotonic() < deadline:
                time.sleep(_LEAVE_POLL_S)

    def publish_endpoint(self, attempt: int, store: Address, master: Address) -> None:
        """On node 0: tell the address of this attempt's store, and that for torch.distributed."""
        self._store.set(f"{attempt}/endpoint", f"{format_address(store)} {format_address(master)}".encode())

    def read_endpoint(self, attempt: int) -> tuple[Address, Address]:
        """On other nodes: return the addresses that node 0 published."""
        text = self._store.get(f"{attempt}/endpoint", deadline=time.monotonic() + JOIN_S).decode()
        store, master = (parse_address(part, source="endpoint") for part in text.split(" "))
        return store, master

    def stopped(self, attempt: int) -> bool:
        """Say whether something failed elsewhere; frequent calls show that this launcher lives."""
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + _HEARTBEAT_S
            self._store.add(f"heartbeat/{self.node_rank}", 1)
            if self.node_rank == 0 and self._lost_node(now) is not None:
                self._store.add(f"{attempt}/stop", 1)
            self._stopped = self._store.add(f"{attempt}/stop", 0) > 0
        return self._stopped

    def first_failure(self, attempt: int, failure: Failure | None) -> Failure | None:
        """Wait until all nodes have ended the attempt; return the first failure, if there was any."""
        self._store.set(f"{attempt}/result/{self.node_rank}", _encode(failure))
        if failure is not None:
            self._store.add(f"{attempt}/stop", 1)
        if self.node_rank == 0:
            self._store.set(f"{attempt}/first", _encode(self._choose_first(attempt)))
        while (data := self._poll(f"{attempt}/first", attempt)) is None:
            pass
        self._stopped = False
        self._next_heartbeat = 0.0
        return Failure(**json.loads(data)) if data else None

    def _choose_first(self, attempt: int) -> Failure | None:
        """On node 0: collect the results; a node that is lost is a failure, too."""
        failures = []
        for node in range(self._nnodes):
            while (data := self._poll(f"{attempt}/result/{node}", attempt)) is None:
                if (lost := self._lost_node(time.monotonic())) is not None:
                    return Failure(
                        what=f"the launcher of node {lost} was not heard of for {_LOST_S:.0f} s",
                        status=1,
                        after_s=time.monotonic() - self._joined_at,
                        restart=False,
                    )
            if data:
                failures.append(Failure(**json.loads(data)))
        return min(failures, key=lambda f: (f.consequence, f.after_s), default=None)

    def _poll(self, key: str, attempt: int) -> bytes | None:
        """Wait a moment for a key that is set once a rank of any node has ended."""
        with contextlib.suppress(StoreTimeout):
            return self._store.get(key, deadline=time.monotonic() + _HEARTBEAT_S)
        self.stopped(attempt)
        return None

    def _lost_node(self, now: float) -> int | None:
        """On node 0: find a node whose launcher has sent no heartbeat for a long time."""
        for node in range(1, self._nnodes):
            count = self._store.add(f"heartbeat/{node}", 0)
            before, since = self._heartbeats.get(node, (-1, now))
            if count != before:
                self._heartbeats[node] = (count, now)
            elif now - since > _LOST_S:
                return node
        return None

    def _compare_specs(self, spec: str, deadline: float) -> None:
        """Compare the job specs of all nodes, and fail on all where they differ."""
        if self._store.add(f"node/{self.node_rank}/taken", 1) > 1:
            raise UsageError(f"another launcher already is node {self.node_rank}; give each node its own --node-rank")
        self._store.set(f"node/{self.node_rank}", spec.encode())
        if self.node_rank == 0:
            self._store.set("spec", self._await_specs(spec, deadline).encode())
        answer = self._store.get("spec", deadline=deadline).decode()
        if answer != spec:
            # The answer is a sentence, or the job spec of a node 0 that knows nothing of this node.
            self._leave()
            raise RendezvousError(
                _describe_difference(self.node_rank, spec, answer) if answer.startswith("{") else answer
            )

    def _await_specs(self, spec: str, deadline: float) -> str:
        """On node 0: return its job spec, or a sentence on the first other node that differs."""
        for node in range(1, self._nnodes):
            try:
                theirs = self._store.get(f"node/{node}", deadline=deadline).decode()
            except StoreTimeout:
                return f"node {node} did not come within {JOIN_S:.0f} s; read its launcher's output"
            self._joined += 1
            if theirs != spec:
                return _describe_difference(node, theirs, spec)
        return spec


def _job_spec(options: LaunchOptions) -> str:
    """Write down as JSON all that must be the same on all nodes."""
    return json.dumps(
        {
            "--nnodes": options.nnodes,
            "--nproc-per-node": options.nproc_per_node,
            "--max-restarts": options.max_restarts,
            "ferro": importlib.metadata.version("ferro"),
        }
    )


def _encode(failure: Failure | None) -> bytes:
    return b"" if failure is None else json.dumps(asdict(failure)).encode()


def _describe_difference(node: int, theirs: str, ours: str) -> str:
    one, other = json.loads(theirs), json.loads(ours)
    differing = [
        f"{name} is {one.get(name)} on node {node} and {other.get(name)} on node 0"
        for name in other
        if one.get(name) != other.get(name)
    ]
    return f"the nodes do not fit together: {', '.join(differing)}; start all of them alike"
