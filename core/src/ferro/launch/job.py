"""`ferro run`: start this node's ranks, attempt after attempt, until one succeeds or no restart is left."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from ferro.errors import UsageError
from ferro.launch.attempt import Attempt
from ferro.launch.nodes import NodeRendezvous
from ferro.launch.options import LaunchOptions, parse_options
from ferro.launch.output import Console
from ferro.launch.report import Failure
from ferro.launch.trace import merge_parts, parts_directory
from ferro.launch.writer import BackgroundWriter, open_writers
from ferro.rendezvous import StoreServer, derive, per_user_secret
from ferro.rendezvous.sockets import bound_socket, is_loopback
from ferro.runtime.environment import Address, read_secret
from ferro.runtime.environment.schedulers import slurm_tasks

_UNREAD_S = 2.5  # how long output that nobody reads keeps a launcher that was told to end


def main(arguments: Sequence[str]) -> int:
    return run(parse_options(arguments))


def run(options: LaunchOptions) -> int:
    """Run the program as this node's ranks; return the exit status.

    That is 0, the status of the rank that failed first, or 128 + n when signal n ended that rank or stopped this
    launcher. With `keep_going` it is 0, too, if ranks that were left after a failure ended well.

    Raises:
        UsageError: another launcher has this node's rank, or the log directory cannot be made.
        RendezvousError: the nodes could not meet or do not fit together, or node 0's launcher is gone.
        AuthenticationError: there is no secret that the nodes could share.
    """
    if options.log_dir is not None:
        try:
            options.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--log-dir {options.log_dir}: {exc.strerror}; name a directory to write to") from exc
    writers = open_writers()
    console = Console(options.world_size, *writers)
    if options.nnodes == 1 and slurm_tasks() > 1:
        console.say(
            f"each of this step's {slurm_tasks()} tasks starts a job of its own; for one job start one task on each "
            "node (srun --ntasks-per-node=1)"
        )
    failure: Failure | None = None
    try:
        failure = _run_attempts(options, console, writers)
    finally:
        # Output that is not read now may be read later, unless somebody wants the job to end.
        stopped = failure is not None and not failure.restart
        for writer in writers:
            writer.drain(_UNREAD_S if stopped else None)
    return 0 if failure is None else failure.status


def _run_attempts(
    options: LaunchOptions, console: Console, writers: tuple[BackgroundWriter, BackgroundWriter]
) -> Failure | None:
    """Run attempt after attempt; return the failure of the last one."""
    with contextlib.ExitStack() as stack:
        nodes = None
        if options.nnodes > 1:
            # All nodes have FERRO_SECRET, or the user's secret in a shared home directory.
            secret = read_secret() or per_user_secret()
            nodes = stack.enter_context(NodeRendezvous(options, secret, console.say))
        restarts = 0
        while (failure := _run_attempt(options, restarts, console, writers, nodes)) is not None:
            if restarts == options.max_restarts or not failure.restart:
                break
            restarts += 1
            console.say(f"starting all ranks again: restart {restarts} of {options.max_restarts}")
    return failure


def _run_attempt(
    options: LaunchOptions,
    number: int,
    console: Console,
    writers: tuple[BackgroundWriter, BackgroundWriter],
    nodes: NodeRendezvous | None,
) -> Failure | None:
    """Run one attempt, with a store of its own and a directory for its trace."""
    with _open_endpoint(number, nodes) as endpoint, contextlib.ExitStack() as stack:
        parts = None
        if options.trace is not None:
            parts = stack.enter_context(parts_directory())
        failure = Attempt(options, number, console, writers, endpoint, nodes, parts).run()
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
    listening = host if is_loopback(host) else ""
    with StoreServer(listening, secret=secret) as server, bound_socket(listening, 0) as free:
        store, master = (host, server.address[1]), (host, int(free.getsockname()[1]))
        free.close()
        if nodes is not None:
            nodes.publish_endpoint(attempt, store, master)
        yield store, master, secret
