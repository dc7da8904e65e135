"""The launchers of several nodes agree on the job, and on the store and the outcome of each attempt.

They meet in a store that node 0's launcher hosts at the endpoint. Keys:

    node/<r>              node r's job spec: all that must be the same everywhere
    node/<r>/taken        how many launchers call themselves node r
    spec                  node 0's answer: its own job spec, or a sentence on the difference
    heartbeat/<r>         grows while node r's launcher lives
    gone                  the nodes whose launchers ended without a word
    left                  launchers that need nothing more
    <attempt>/endpoint    where the attempt's ranks find their store
    <attempt>/stop        above 0 once something failed anywhere
    <attempt>/early/<r>   node r's ranks that ended with exit code 0, and when
    <attempt>/result/<r>  node r's failure, or nothing
    <attempt>/first       the failure that node 0 chose as the first, or nothing

Only node 0 watches the others; they notice that node 0 is gone when its store does not answer. A thread does so, since
a request may take long while the network is down.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Self

from ferro.errors import RendezvousError, UsageError
from ferro.launch.options import LaunchOptions
from ferro.launch.report import Failure, name_early_ranks
from ferro.rendezvous import StoreClient, StoreServer, StoreTimeout, derive
from ferro.rendezvous.sockets import is_elsewhere, is_loopback, own_address, own_addresses
from ferro.runtime.environment import Address, format_address, parse_address
from ferro.runtime.environment import options as environment_options

JOIN_S = 300.0  # how long the nodes wait for one another to start
_HEARTBEAT_S = 0.5
_LOST_S = 60.0  # a network that is down for so long, or for the job's own timeout, is tolerated
_REQUEST_S = 10.0
_NOTICE_S = 3.0  # after which the user is told what is waited for, and
_NEXT_NOTICE_S = 30.0  # after which again
_LEAVE_S = 5.0
_LEAVE_POLL_S = 0.02


class NodeRendezvous:
    """This node's part in a job of several nodes; use it as a context.

    Every method raises RendezvousError where node 0's launcher is gone, or the nodes do not fit together.
    """

    def __init__(self, options: LaunchOptions, secret: bytes, say: Callable[[str], object] = lambda _: None) -> None:
        """Join the other nodes, which have the same secret; `say` tells the user what is waited for."""
        assert options.endpoint is not None
        self.node_rank = options.node_rank
        self.host = options.endpoint[0]  # node 0's, as all nodes reach it
        if self.node_rank == 0 and is_elsewhere(self.host):  # a machine there may forward this one port alone
            self.host = own_addresses()[0]
        self.secret = secret
        self._nnodes = options.nnodes
        self._keep_going = options.keep_going
        self._say = say
        self._patience_s = max(_LOST_S, options.timeout_s or environment_options().timeout_s or 0.0)
        self._attempt = 0
        self._stopped_attempt = self._stop_requested = -1
        self._error: RendezvousError | None = None  # why this node has lost node 0
        self._over = threading.Event()
        self._joined = 1
        self._joined_at = time.monotonic()
        self._heartbeats: dict[int, tuple[int, float]] = {}
        self._connected = False
        self._server: StoreServer | None = None  # on node 0
        address, store_secret = options.endpoint, derive(secret, "launchers")
        with contextlib.ExitStack() as resources:
            with _notices(say, lambda: self._describe_waiting(address)):
                own = address
                if self.node_rank == 0:
                    host, port = address
                    host = host if is_loopback(host) else ""
                    server = self._server = resources.enter_context(StoreServer(host, port, secret=store_secret))
                    own = host or own_address(address[0]), server.address[1]
                deadline = time.monotonic() + JOIN_S
                self._store = resources.enter_context(
                    StoreClient(
                        own, store_secret, deadline=deadline, request_timeout_s=max(self._patience_s, _REQUEST_S)
                    )
                )
                self._connected = True
                self._compare_specs(_job_spec(options), deadline)
            if self.node_rank > 0:
                self._store.append_on_disconnect("gone", b"%d " % self.node_rank)
            resources.callback(self._over.set)
            threading.Thread(target=self._watch, name="ferro-run-nodes", daemon=True).start()
            self._resources = resources.pop_all()

    def _describe_waiting(self, address: Address) -> str:
        """Describe for the user which nodes are waited for, and where."""
        others = [node for node in range(self._nnodes) if node != self.node_rank]
        missing = [node for node in others if self._connected and self._read(f"node/{node}") is None]
        if not self._connected and self.node_rank > 0:
            missing = [0]
        nodes = f"for node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self._nnodes}"
        text = f"waiting {nodes if missing else 'to listen'} at {format_address(address)}"
        try:
            socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        except OSError as exc:
            text += f", a name that cannot be resolved so far ({exc.strerror})"
        if self._server is not None and self._server.refused:
            text += (
                f"; {self._server.refused} connections with another secret were turned away: is FERRO_SECRET the same "
                "on all nodes?"
            )
        return f"{text}; {time.monotonic() - self._joined_at:.0f} s of {JOIN_S:.0f} s"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with self._resources:
            if error is None:
                self._leave()
            else:
                self._store.declare_lost()

    def _leave(self) -> None:
        """Announce that this node needs nothing more; node 0 gives the others a moment to read its last answer."""
        with contextlib.suppress(RendezvousError):
            self._store.add("left", 1)
            deadline = time.monotonic() + _LEAVE_S
            while self.node_rank == 0 and time.monotonic() < deadline:
                if self._store.add("left", 0) + len(self._lost_nodes()) >= self._joined:
                    break
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
        """Say whether something failed elsewhere, or node 0 is gone."""
        self._attempt = attempt
        return self._error is not None or self._stopped_attempt == attempt

    def request_stop(self) -> None:
        """Have the other nodes end their ranks, too, while those of this node are ending."""
        self._stop_requested = self._attempt

    def _watch(self) -> None:
        """Show that this launcher lives, and watch the others, until the job is over."""
        told: set[int] = set()
        try:
            while not self._over.wait(_HEARTBEAT_S):
                attempt = self._attempt
                self._store.add(f"heartbeat/{self.node_rank}", 1)
                if self.node_rank == 0 and (lost := self._lost_nodes()):
                    self._store.add(f"{attempt}/stop", int(not self._keep_going))
                    for node in lost.keys() - told if self._keep_going else ():
                        self._say(f"the launcher of node {node} {lost[node]}; the others go on (--keep-going)")
                    told |= lost.keys()
                if self._store.add(f"{attempt}/stop", int(self._stop_requested == attempt)) > 0:
                    self._stopped_attempt = attempt
        except RendezvousError as error:
            self._error = error

    def first_failure(
        self, attempt: int, failure: Failure | None, early: Mapping[int, float] | None = None
    ) -> Failure | None:
        """Wait until all nodes have ended the attempt; return the first failure, if there was any.

        `early` are this node's ranks that ended with exit code 0, and after how many seconds.
        """
        self._store.set(f"{attempt}/early/{self.node_rank}", json.dumps(early or {}).encode())
        self._store.set(f"{attempt}/result/{self.node_rank}", _encode(failure))
        if failure is not None and not self._keep_going:
            self._store.add(f"{attempt}/stop", 1)
        if self.node_rank == 0:
            self._store.set(f"{attempt}/first", _encode(self._choose_first(attempt)))
        while (data := self._read(f"{attempt}/first", _HEARTBEAT_S)) is None:
            if self._error is not None:
                raise self._error
        if not data:
            return None
        found = Failure(**json.loads(data))
        return replace(found, named=tuple(found.named))

    def describe_unfinished(self, attempt: int) -> str:
        """Describe for the user which nodes have not ended the attempt, and how long they have been silent."""
        if self.node_rank > 0:
            return "waiting for node 0, which collects the failures of all nodes"
        since = {n: time.monotonic() - heard for n, (_, heard) in self._heartbeats.items()}
        missing = [n for n in since if self._read(f"{attempt}/result/{n}") is None]
        silent = [f"node {n} (silent for {since[n]:.0f} s)" for n in missing]
        return f"waiting for {', '.join(silent) or 'the other nodes'} to end, up to {self._patience_s:.0f} s of silence"

    def _choose_first(self, attempt: int) -> Failure | None:
        """On node 0: collect the results; a node that is lost is a failure, too."""
        failures: list[Failure] = []
        early: dict[int, float] = {}
        forgiven = stopped = False  # ranks of some node went on and ended well; a launcher was told to end the job
        for node in range(self._nnodes):
            while (data := self._read(f"{attempt}/result/{node}", _HEARTBEAT_S)) is None:
                if (lost := self._lost_nodes().get(node)) is not None:
                    what, after_s = f"the launcher of node {node} {lost}", time.monotonic() - self._joined_at
                    failures.append(Failure(what=what, status=1, after_s=after_s, restart=False))
                    break
            if data is not None:
                early |= {
                    int(rank): after_s
                    for rank, after_s in json.loads(self._read(f"{attempt}/early/{node}") or b"{}").items()
                }
                forgiven = forgiven or (self._keep_going and not data)
            if data:
                failures.append(Failure(**json.loads(data)))
                stopped = stopped or not failures[-1].restart
        if not failures or (forgiven and not stopped):
            return None
        return name_early_ranks(min(failures, key=lambda f: (f.consequence, f.after_s)), early)

    def _read(self, key: str, wait_s: float = 0.0) -> bytes | None:
        """Wait a moment for a key; None where it is not set."""
        with contextlib.suppress(StoreTimeout):
            return self._store.get(key, deadline=time.monotonic() + wait_s)
        return None

    def _lost_nodes(self) -> dict[int, str]:
        """On node 0: find the nodes whose launchers are gone, or have sent no heartbeat for a long time."""
        gone = {int(node) for node in (self._read("gone") or b"").split()}
        lost = dict.fromkeys(gone, "is gone: it was killed, or its host went down")
        for node in range(1, self._nnodes):
            count, now = self._store.add(f"heartbeat/{node}", 0), time.monotonic()
            before, since = self._heartbeats.get(node, (-1, now))
            if count != before:
                self._heartbeats[node] = (count, now)
            elif now - since > self._patience_s:
                lost.setdefault(node, f"was not heard of for {self._patience_s:.0f} s")
        return lost

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


@contextlib.contextmanager
def _notices(say: Callable[[str], object], describe: Callable[[], str]) -> Iterator[None]:
    """Tell the user now and then what a long wait is for."""
    over = threading.Event()

    def tell() -> None:
        pause_s = _NOTICE_S
        with contextlib.suppress(RendezvousError):
            while not over.wait(pause_s):
                say(describe())
                pause_s = _NEXT_NOTICE_S

    threading.Thread(target=tell, name="ferro-run-notices", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _job_spec(options: LaunchOptions) -> str:
    """Write down as JSON all that must be the same on all nodes."""
    return json.dumps(
        {
            "--nnodes": options.nnodes,
            "--nproc-per-node": options.nproc_per_node,
            "--max-restarts": options.max_restarts,
            "--keep-going": options.keep_going,
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
