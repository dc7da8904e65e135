"""`ferro run`: attempt after attempt, until one succeeds or no restart is left."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ferro.errors import UsageError
from ferro.launch.attempt import Attempt
from ferro.launch.contact import meet, open_contact
from ferro.launch.nodes import Meeting
from ferro.launch.options import LaunchOptions
from ferro.launch.output import Console
from ferro.launch.report import Failure
from ferro.launch.trace import merge_parts


def run(options: LaunchOptions) -> int:
    """Run the program as this node's ranks; return the exit status.

    That is 0, the status of the rank that failed first, or 128 + n when signal n ended that rank
    or stopped this launcher.

    Raises:
        UsageError: another launcher has this node's rank, or the log directory cannot be made.
        RendezvousError: the nodes could not meet or do not fit together, or node 0's launcher
            is gone.
    """
    console = Console(options.world_size, sys.stdout.buffer, sys.stderr.buffer)
    if options.log_dir is not None:
        _make_directory(options.log_dir)
    with meet(options) as meeting:
        restarts = 0
        while True:
            failure = _attempt(options, restarts, console, meeting)
            if failure is None:
                return 0
            if restarts == options.max_restarts or not failure.restart:
                return failure.status
            restarts += 1
            console.say(f"starting all ranks again: restart {restarts} of {options.max_restarts}")


def _attempt(options: LaunchOptions, restarts: int, console: Console, meeting: Meeting | None) -> Failure | None:
    """One attempt, with a store of its own and a directory for its trace."""
    with open_contact(restarts, meeting) as contact:
        if options.trace is None:
            return Attempt(options, restarts, console=console, contact=contact, meeting=meeting, trace=None).run()
        with tempfile.TemporaryDirectory(prefix="ferro-trace-") as parts:
            directory = Path(parts)
            failure = Attempt(
                options, restarts, console=console, contact=contact, meeting=meeting, trace=directory
            ).run()
            _merge_trace(options, options.trace, directory, console)
            return failure


def _merge_trace(options: LaunchOptions, target: Path, parts: Path, console: Console) -> None:
    """Join this node's parts; a trace that cannot be written does not fail the job."""
    if options.node_rank > 0:
        target = target.with_suffix(f".node{options.node_rank}{target.suffix}")
    first = options.node_rank * options.nproc_per_node
    try:
        amiss = merge_parts(parts, range(first, first + options.nproc_per_node), target)
    except OSError as exc:
        amiss = [f"the trace could not be written: {exc}"]
    for line in amiss:
        console.say(line)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"--log-dir {path}: {exc.strerror}; name a directory to write to") from exc
