"""The command line of `ferro bench`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ferro
from ferro.cli.parser import Parser
from ferro.errors import UsageError
from ferro_bench.contestants import Memory
from ferro_bench.peers import PEERS
from ferro_bench.rank.case import COLLECTIVES, OPS, PERSISTENT, REDUCING
from ferro_bench.sizes import parse_sizes, size_text

_MAX_RANKS = 128  # sums over more ranks would not be exact in half precision
_MAX_TURN_BYTES = 4 << 30
_MEMORIES: tuple[Memory, ...] = ("private", "group")
_DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
)
_EPILOG = """\
Sizes are those of the whole buffer: the result of all_gather and gather, the input of the others.
`copy` is no collective: every rank copies an array of its own, which shows what memory can do.

Peers come from the environment of this interpreter, or of the one that is named:
  --compare torch-gloo=torch/bin/python,openmpi=ompi/bin/python,mpich=mpich/bin/python
openmpi and mpich need mpi4py, and mpiexec beside the interpreter or on the PATH.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The options of `ferro bench`.

    Attributes:
        collectives: the collectives to measure, in this order.
        ranks: processes to start for each library.
        backend: ferro's backend, None for the launcher's choice.
        sizes: in bytes.
        dtype: name of the elements' dtype.
        op: name of the reduction.
        memories: where ferro's arrays are; each is measured.
        algorithms: ferro's algorithms, each of which is measured; "" for its own choice.
        async_op: start calls asynchronously, then wait.
        persistent: measure each call also as a persistent operation.
        apart: enter a barrier before each timed call.
        rounds: turns that count, None for a number by size.
        calls: timed calls in a turn, None for a number by size.
        check: compare every result.
        json: file for the results, "-" for stdout, None for no file.
        plot: file for a picture of the times, or None.
        peers: interpreter by peer's name; None for our own.
    """

    collectives: tuple[str, ...]
    ranks: int
    backend: str | None
    sizes: tuple[int, ...]
    dtype: str
    op: str
    memories: tuple[Memory, ...]
    algorithms: tuple[str, ...]
    async_op: bool
    persistent: bool
    apart: bool
    rounds: int | None
    calls: int | None
    check: bool
    json: str | None
    plot: Path | None
    peers: dict[str, str | None]


def parse_options(arguments: Sequence[str]) -> BenchOptions:
    """Read the command line after `ferro bench`.

    Raises:
        UsageError: an option is unknown, malformed, or does not go with another.
    """
    given = _parser().parse_args(arguments)
    options = BenchOptions(
        collectives=tuple(dict.fromkeys(given.collectives)),
        ranks=given.ranks,
        backend=given.backend,
        sizes=parse_sizes(given.sizes),
        dtype=given.dtype,
        op=given.op,
        memories=_memories(given.memory),
        algorithms=_algorithms(given.algorithms, given.collectives),
        async_op=given.async_op,
        persistent=given.persistent,
        apart=given.apart,
        rounds=given.rounds,
        calls=given.calls,
        check=given.check,
        json=given.json,
        plot=given.plot,
        peers=parse_peers(given.compare),
    )
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ferro bench",
        usage="ferro bench COLLECTIVE [COLLECTIVE ...] [options]",
        description="Measure collectives by size, and other libraries beside them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("collectives", nargs="+", choices=COLLECTIVES, metavar="COLLECTIVE", help=", ".join(COLLECTIVES))
    add("-n", "-np", dest="ranks", type=int, default=2, metavar="N", help="ranks (default 2)")
    add("--backend", metavar="NAME", help="ferro's backend (default: as ferro.init chooses)")
    add(
        "--sizes",
        default="4B:64MiB",
        metavar="FROM:TO[:FACTOR]",
        help="or a list with commas; default 4B:64MiB, and factor 4",
    )
    add("--dtype", choices=_DTYPES, default="float32", metavar="NAME", help=", ".join(_DTYPES))
    add("--op", choices=OPS, default="sum", help="the reduction (default sum)")
    add(
        "--memory",
        default="private",
        metavar="KIND",
        help="ferro's arrays: private (NumPy's), group (from group.empty), or private,group",
    )
    add(
        "--algorithms",
        default="auto",
        metavar="NAME,...",
        help="ferro's algorithms to compare, such as ring,tree,auto; auto (default) is ferro's own choice",
    )
    add("--async", dest="async_op", action="store_true", help="async_op=True, then wait()")
    add(
        "--persistent",
        action="store_true",
        help="also as persistent operations: group.persistent, and MPI's MPI_*_init",
    )
    add("--apart", action="store_true", help="a barrier, which is not timed, before each call")
    add("--rounds", type=int, metavar="K", help="turns that count (default by size)")
    add("--calls", type=int, metavar="K", help="timed calls in a turn (default by size)")
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare every result, bit for bit (default)",
    )
    add("--json", metavar="FILE", help="write the results; - for stdout, the table on stderr")
    add("--plot", type=Path, metavar="FILE", help="write a picture; needs matplotlib")
    add("--compare", default="", metavar="PEER[=PYTHON],...", help=f"measure beside: {', '.join(PEERS)}")
    return parser


def _memories(text: str) -> tuple[Memory, ...]:
    named = text.split(",")
    chosen = tuple(memory for memory in _MEMORIES if memory in named)
    if len(chosen) != len(named):
        raise UsageError(f"--memory {text}: give private, group, or private,group")
    return chosen


def _algorithms(text: str, collectives: Sequence[str]) -> tuple[str, ...]:
    """Read the names of algorithms, which every collective that is measured must have; "" stands for auto."""
    offered = ferro.collectives.available()
    named = tuple(dict.fromkeys(text.split(",")))
    for name in (name for name in named if name != "auto"):
        for collective in collectives:
            if name not in offered.get(collective, ()):
                known = ", ".join(("auto", *offered.get(collective, ())))
                raise UsageError(f"--algorithms {text}: {collective} has no {name!r}; there are: {known}")
    return tuple("" if name == "auto" else name for name in named)


def parse_peers(text: str) -> dict[str, str | None]:
    """Return the interpreter, or None for our own, by name of the peers in "PEER=PYTHON,PEER,...".

    Raises:
        UsageError: there is no such peer.
    """
    peers: dict[str, str | None] = {}
    for part in text.split(",") if text else ():
        name, _, python = part.partition("=")
        if name not in PEERS:
            raise UsageError(f"--compare {name}: the peers are {', '.join(PEERS)}")
        peers[name] = python or None
    return peers


def _check(options: BenchOptions) -> None:
    """Refuse options that cannot work, before anything starts."""
    if not 1 <= options.ranks <= _MAX_RANKS:
        raise UsageError(f"-n {options.ranks}: give 1 to {_MAX_RANKS} ranks")
    if options.ranks == 1 and "sendrecv" in options.collectives:
        raise UsageError("-n 1: sendrecv needs another rank; give at least 2")
    if options.persistent and not PERSISTENT.issuperset(options.collectives):
        others = ", ".join(sorted(set(options.collectives) - PERSISTENT))
        raise UsageError(f"--persistent: it is for collectives; leave out {others}")
    for name, number in (("--rounds", options.rounds), ("--calls", options.calls)):
        if number is not None and not 1 <= number <= 10_000:
            raise UsageError(f"{name} {number}: give 1 to 10000")
    if options.calls is not None and options.calls * max(options.sizes) > _MAX_TURN_BYTES:
        raise UsageError(
            f"--calls {options.calls}: every call has memory of its own, which would be more than "
            f"{size_text(_MAX_TURN_BYTES)} on each rank; give fewer calls, and more --rounds"
        )
    for name, file in (("--plot", options.plot), ("--json", options.json)):
        if file not in (None, "-") and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{name} {file}: its directory does not exist; make it first")
    for name in options.peers:
        if options.dtype not in PEERS[name].dtypes and not REDUCING.isdisjoint(options.collectives):
            raise UsageError(f"--compare {name}: it does not reduce {options.dtype}; choose another --dtype")
