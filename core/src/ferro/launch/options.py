"""The command line of `ferro run`."""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import math
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ferro.cli.parser import Parser
from ferro.errors import UsageError
from ferro.runtime.environment import Address, node_defaults, parse_address, variable
from ferro.runtime.environment.settings import NodeDefaults

_MAX_RANKS = 1_000_000
_MOST_NESTED = 3  # a program that starts itself would multiply without end

_EPILOG = """\
Several nodes: start the same command on each, with its own --node-rank; node 0 hosts the store
at --rdzv-endpoint, and each attempt's ranks meet on another free port of that host. All nodes
need the same FERRO_SECRET (64 hexadecimal digits), or one home directory. Where Slurm, Flux, PBS,
SkyPilot, a JobSet, a LeaderWorkerSet or Kubeflow (PET_*) started one launcher on each node, its
variables are the defaults of --nnodes, --node-rank and --rdzv-endpoint; --nnodes 1 is this node alone.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """The options of `ferro run`, which its help explains; `endpoint` is that of node 0's launcher."""

    nproc_per_node: int
    nnodes: int
    node_rank: int
    endpoint: Address | None
    module: bool
    program: str
    arguments: tuple[str, ...]
    log_dir: Path | None
    max_restarts: int
    keep_going: bool
    grace_s: float
    trace: Path | None
    timeout_s: float | None
    verbose: bool

    @property
    def world_size(self) -> int:
        return self.nnodes * self.nproc_per_node

    def python_arguments(self) -> list[str]:
        """Return the part of a rank's command line after the interpreter."""
        return [*(["-m"] if self.module else []), self.program, *self.arguments]


class _RunParser(Parser):
    """Explains the remedy when the program is missing."""

    def error(self, message: str) -> NoReturn:
        if "PROGRAM" in message:
            message = "name a program to run, as in: ferro run -n 2 train.py"
        super().error(message)


def parse_options(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> LaunchOptions:
    """Read the command line after `ferro run`; defaults come from `environ`, or this process's environment.

    Raises:
        UsageError: an option is unknown, malformed or missing.
    """
    defaults = node_defaults(environ)
    given = _parser(defaults).parse_args(arguments)
    if int(variable("FERRO_NESTED") or 0) >= _MOST_NESTED:
        raise UsageError(
            f"this is a rank of a rank, {_MOST_NESTED} launchers deep, that starts ferro run again: does the program "
            "start itself? Unset FERRO_NESTED where this is meant"
        )
    endpoint = defaults.endpoint
    if given.rdzv_endpoint is not None:
        endpoint = parse_address(given.rdzv_endpoint, source="--rdzv-endpoint")
    del given.rdzv_endpoint
    if given.nnodes is None:
        if defaults.nnodes is None and defaults.node_rank is not None:
            raise UsageError(
                f"this is node {defaults.node_rank} by the scheduler, which does not say of how many: give --nnodes"
            )
        given.nnodes = defaults.nnodes or 1
    if given.node_rank is None:  # the scheduler's number is one among its own nodes
        its_own = given.nnodes == defaults.nnodes or (defaults.nnodes is None and given.nnodes > 1)
        given.node_rank = defaults.node_rank or 0 if its_own else 0
    given.arguments = tuple(given.arguments)
    options = LaunchOptions(endpoint=endpoint, **vars(given))
    _check(options)
    return options


def _parser(defaults: NodeDefaults) -> argparse.ArgumentParser:
    parser = _RunParser(
        prog="ferro run",
        usage="ferro run [options] [-m] PROGRAM [ARGUMENT ...]",
        description="Run a Python program as several ranks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    nproc = 1 if defaults.nproc_per_node is None else defaults.nproc_per_node
    add("-n", "-np", "--nproc-per-node", type=int, default=nproc, metavar="N", help="ranks on each node (default 1)")
    add("--nnodes", type=int, metavar="K", help="nodes (default 1)")
    add("--node-rank", type=int, metavar="R", help="this node, from 0 (default 0)")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="where node 0 listens, with several nodes")
    add("-m", dest="module", action="store_true", help="PROGRAM is a module, not a file")
    add("--log-dir", type=Path, metavar="DIR", help="also write DIR/rank<r>.out and .err")
    restarts = "after a failure start all ranks again, up to M times (default 0)"
    add("--max-restarts", type=int, default=0, metavar="M", help=restarts)
    going = "let the ranks that are left go on after one has failed, for programs that call group.shrink()"
    add("--keep-going", action="store_true", help=going)
    grace = "seconds that ranks have to end, to save their work, after they were told to (default 30)"
    add("--grace-s", type=float, default=30.0, metavar="S", help=grace)
    trace = "write a Chrome trace of all ranks; node r > 0 writes OUT.node<r>.json"
    add("--trace", type=Path, metavar="OUT.json", help=trace)
    add("--timeout-s", type=float, metavar="S", help="seconds that a collective may take")
    add("-v", "--verbose", action="store_true", help="show every failing rank's traceback")
    add("program", metavar="PROGRAM", help="Python file to run")
    add("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="passed to it untouched")
    return parser


def _module_exists(name: str) -> bool:
    """Say whether the ranks would find a top-level module; they look in the working directory first."""
    here = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd())])
    return here is not None or name in sys.modules or (name != "" and importlib.util.find_spec(name) is not None)


def _check(options: LaunchOptions) -> None:
    """Refuse options that cannot work, before anything starts."""
    if options.nproc_per_node < 1:
        raise UsageError(f"-n {options.nproc_per_node}: start at least one rank per node")
    if options.nnodes < 1:
        raise UsageError(f"--nnodes {options.nnodes}: there is at least one node")
    if options.world_size > _MAX_RANKS:
        raise UsageError(f"{options.world_size} ranks are more than {_MAX_RANKS}: correct -n")
    if not 0 <= options.node_rank < options.nnodes:
        raise UsageError(
            f"--node-rank {options.node_rank} is out of range: with --nnodes {options.nnodes} "
            f"it goes from 0 to {options.nnodes - 1}"
        )
    if options.nnodes > 1 and options.endpoint is None:
        raise UsageError(
            f"--nnodes {options.nnodes} needs --rdzv-endpoint HOST:PORT, where node 0 can be reached from all nodes"
        )
    if options.max_restarts < 0:
        raise UsageError(f"--max-restarts {options.max_restarts}: give 0 or more")
    if options.timeout_s is not None and not 0 < options.timeout_s < math.inf:
        raise UsageError(f"--timeout-s {options.timeout_s}: give a positive number of seconds")
    if not 0 <= options.grace_s < math.inf:
        raise UsageError(f"--grace-s {options.grace_s}: give 0 or more seconds")
    program = Path(options.program)
    if not options.module and re.fullmatch(r"python[0-9.]*", program.name) and not program.is_dir():
        raise UsageError(f"ferro run starts Python itself: leave {options.program!r} away, and name the file to run")
    if not options.module and not program.exists():
        raise UsageError(f"there is no file {options.program!r}; for a module put -m before it")
    if not options.module and program.is_dir() and not (program / "__main__.py").exists():
        raise UsageError(f"{options.program!r} is a directory without a file __main__.py; name the file to run")
    if options.module and not _module_exists(options.program.partition(".")[0]):
        raise UsageError(f"there is no module {options.program!r}; for a file leave -m away")
    if options.trace is not None and not options.trace.absolute().parent.is_dir():
        raise UsageError(f"--trace {options.trace}: its directory does not exist; make it first")
    files, limit = _open_files(options), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and files > limit:
        raise UsageError(
            f"-n {options.nproc_per_node} takes about {files} open files, and the limit is {limit}: raise it "
            f"(ulimit -n {files}), or start fewer ranks"
        )


def _open_files(options: LaunchOptions) -> int:
    """Estimate how many files and sockets the launcher has open at once."""
    each = 5 if options.log_dir is None else 7  # output, end of the process, two connections to the store; logs
    return 20 + each * options.nproc_per_node
