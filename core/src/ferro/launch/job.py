"""`ferro run`: start this node's ranks, attempt after attempt, until one succeeds or no restart is left."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ferro.errors import FerroError, UsageError
from ferro.launch.nodes import NodeRendezvous
from ferro.launch.options import LaunchOptions, parse_options
from ferro.launch.output import Console, RankOutput
from ferro.launch.processes import FORWARDED, STOPPING, Supervisor, collected_signals, take_signals
from ferro.launch.report import Failure, RankProcess, describe_failure, first_failure, show_report
from ferro.launch.trace import merge_parts, parts_directory
from ferro.rendezvous import StoreServer, derive, per_user_secret
from ferro.runtime.environment import Address, LaunchInfo, child_environment, read_secret

# A rank that lost a peer may end before the peer does: the launcher waits so long for the peer's own error.
_PEER_ERROR_S = 1.0


def main(arguments: Sequence[str]) -> int:
    return run(parse_options(arguments))


def run(options: LaunchOptions) -> int:
    """Run the program as this node's ranks; return the exit status.

    That is 0, the status of the rank that failed first, or 128 + n when signal n ended that rank or stopped this
    launcher.

    Raises:
        UsageError: another launcher has this node's rank, or the log directory cannot be made.
        RendezvousError: the nodes could not meet or do not fit together, or node 0's launcher is gone.
        AuthenticationError: there is no secret that the nodes could share.
    """
    console = Console(options.world_size, sys.stdout.buffer, sys.stderr.buffer)
    if options.log_dir is not None:
        try:
            options.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--log-dir {options.log_dir}: {exc.strerror}; name a directory to write to") from exc
    with contextlib.ExitStack() as stack:
        nodes = None
        if options.nnodes > 1:
            # All nodes have FERRO_SECRET, or the user's secret in a shared home directory.
            nodes = stack.enter_context(NodeRendezvous(options, read_secret() or per_user_secret()))
        restarts = 0
        while (failure := _run_attempt(options, restarts, console, nodes)) is not None:
            if restarts == options.max_restarts or not failure.restart:
                return failure.status
            restarts += 1
            console.say(f"starting all ranks again: restart {restarts} of {options.max_restarts}")
    return 0


def _run_attempt(options: LaunchOptions, number: int, console: Console, nodes: NodeRendezvous | None) -> Failure | None:
    """Run one attempt, with a store of its own and a directory for its trace."""
    with _open_endpoint(number, nodes) as endpoint, contextlib.ExitStack() as stack:
        parts = None
        if options.trace is not None:
            parts = stack.enter_context(parts_directory())
        failure = _Attempt(options, number, console, endpoint, nodes, parts).run()
        if options.trace is not None and parts is not None:
            target = options.trace
            if options.node_rank > 0:
                target = target.with_suffix(f".node{options.node_rank}{target.suffix}")
            first = options.node_rank * options.nproc_per_node
            for problem in merge_parts(Path(parts), range(first, first + options.nproc_per_node), target):
                console.say(problem)
        return failure


@contextlib.contextmanager
def _open_endpoint(attempt: int, nodes: NodeRendezvous | None) -> Iterator[tuple[Address, Address, bytes]]:
    """Host the attempt's store here, or learn where node 0 hosts it.

    Yields the store's address, that of a free port for programs that use torch.distributed, and the store's secret.
    Attempts share nothing, so no key or secret of one is left over in the next.
    """
    host, secret = "127.0.0.1", secrets.token_bytes(32)
    if nodes is not None:
        host, secret = nodes.host, derive(nodes.secret, f"ranks of attempt {attempt}")
        if nodes.node_rank > 0:
            yield *nodes.read_endpoint(attempt), secret
            return
    with StoreServer(host, secret=secret) as server:
        store, master = (host, server.address[1]), (host, _free_port(host))
        if nodes is not None:
            nodes.publish_endpoint(attempt, store, master)
        yield store, master, secret


def _free_port(host: str) -> int:
    """Find a port on which nobody listens now."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


@dataclass
class _Attempt:
    """One attempt of a job on this node: start the ranks, watch them, end them, and say who failed."""

    options: LaunchOptions
    number: int
    console: Console
    endpoint: tuple[Address, Address, bytes]  # as `_open_endpoint` yields it
    nodes: NodeRendezvous | None
    trace: str | None  # the directory for the ranks' traces
    ranks: list[RankProcess] = field(default_factory=list)

    def run(self) -> Failure | None:
        """Run the ranks until all have ended; return the first failure in the job, if any."""
        started = time.monotonic()
        with contextlib.ExitStack() as logs, collected_signals() as signals, Supervisor(wake=signals) as supervisor:
            self._start(supervisor, logs)
            stopped_by = self._watch(supervisor, signals)
        first, failure = first_failure(self.ranks), None
        if stopped_by is not None:
            node = "" if self.nodes is None else f" of node {self.options.node_rank}"
            what = f"the launcher{node} was stopped by {stopped_by.name}"
            after_s = time.monotonic() - started
            first, failure = None, Failure(what=what, status=128 + stopped_by, after_s=after_s, restart=False)
        elif first is not None:
            failure = describe_failure(first, started, alone=self.options.world_size == 1)
        agreed = failure
        try:
            if self.nodes is not None:
                agreed = self.nodes.first_failure(self.number, failure)
        finally:  # this node's failures are reported even if node 0 is gone
            if agreed is not None:
                local = first if agreed == failure else None
                show_report(self.console, self.ranks, local, agreed, verbose=self.options.verbose)
        return agreed

    def _start(self, supervisor: Supervisor, logs: contextlib.ExitStack) -> None:
        options = self.options
        store, master, secret = self.endpoint
        for local_rank in range(options.nproc_per_node):
            info = LaunchInfo(
                rank=options.node_rank * options.nproc_per_node + local_rank,
                world_size=options.world_size,
                local_rank=local_rank,
                local_world_size=options.nproc_per_node,
                launcher="ferro",
                store=store,
                master=master,
                secret=secret,
            )
            env = child_environment(info, restart=self.number, trace=self.trace, timeout_s=options.timeout_s)
            files: list[IO[bytes]] = []
            if options.log_dir is not None:  # later attempts append to the logs
                for name in (f"rank{info.rank}.out", f"rank{info.rank}.err"):
                    mode = "ab" if self.number else "wb"
                    files.append(logs.enter_context((options.log_dir / name).open(mode, buffering=0)))
            output = RankOutput(self.console, info.rank, files)
            try:
                process = supervisor.start(
                    [sys.executable, *options.python_arguments()],
                    env=env,
                    stdout=output.out.receive,
                    stderr=output.err.receive,
                    on_end=output.finish,
                    dies_with_parent=True,
                )
            except OSError as exc:
                raise FerroError(
                    f"rank {info.rank} could not be started: {exc}; ask for fewer ranks, or "
                    "raise the limit on processes or open files (ulimit)"
                ) from exc
            self.ranks.append(RankProcess(info.rank, process, output))

    def _watch(self, supervisor: Supervisor, signals: socket.socket) -> signal.Signals | None:
        """Wait until the ranks have ended, or end them; return the signal that stopped the launcher."""

        def handle_events() -> list[signal.Signals]:
            """Show held output that is due, and forward signals; return the signals that stop the launcher."""
            if not any(rank.failed for rank in self.ranks):
                for rank in self.ranks:
                    rank.output.release_due()
            received = take_signals(signals)
            for child in supervisor.running():
                for signum in received:
                    if signum in FORWARDED:
                        child.send_signal(signum)
            return [signum for signum in received if signum in STOPPING]

        while supervisor.running():
            supervisor.wait()
            if stopping := handle_events():
                supervisor.end(stopping[0], hurry=handle_events)
                return stopping[0]
            if self.nodes is not None and self.nodes.stopped(self.number):
                break
            failed = [rank for rank in self.ranks if rank.failed]
            if failed:
                only_lost_peers = all(rank.output.traceback.is_consequence() for rank in failed)
                since = min(rank.process.ended_at or 0.0 for rank in failed)
                if not only_lost_peers or time.monotonic() > since + _PEER_ERROR_S:
                    break
        supervisor.end(hurry=handle_events)
        return None
