"""`ferro show collective`: prove and draw the algorithms of a collective, core's and those of any installed plugin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ferro import collectives
from ferro.cli.parser import Parser
from ferro.collectives import CollectiveInfo
from ferro.errors import UsageError
from ferro_testing.schedules.checker import check
from ferro_testing.schedules.drawing import table

_MOST_RANKS = 64
_EPILOG = """\
`0→1 [2]⊕` reads: rank 0 sends chunk 2 of the buffer to rank 1, which combines it with its own;
without ⊕ it takes the place of its own. A line `r3` is the third round; what stands in one round
happens at the same time.
"""


def show(arguments: Sequence[str]) -> int:
    """Print the algorithms that are named; return the exit status.

    Raises:
        UsageError: there is no such collective, algorithm, world size or root.
        PluginError: an algorithm is wrong; the message names rank and round.
    """
    given = _parser().parse_args(arguments)
    if not 1 <= given.ranks <= _MOST_RANKS:
        raise UsageError(f"-n {given.ranks}: give 1 to {_MOST_RANKS} ranks")
    for info in _named(given.name, given.algorithm):
        proof = check(info.collective, info.build, given.ranks, given.root)
        about = f"rounds: {proof.rounds}, messages of the busiest rank: {proof.messages}; proved right"
        print(f"{info.algorithm} {info.collective}, {given.ranks} ranks; {about}")  # noqa: T201 - a command prints
        print(table(info.build, given.ranks, given.root, columns=given.columns) + "\n")  # noqa: T201
    return 0


def _named(name: str, algorithm: str | None) -> list[CollectiveInfo]:
    """Find one algorithm of a collective, all of a collective, or all that have the name."""
    offered = collectives.available()
    if name in offered:
        return [collectives.get(name, it) for it in ([algorithm] if algorithm else offered[name])]
    found = [collective for collective, names in offered.items() if name in names]
    if not found or algorithm:
        listed = "; ".join(f"{collective} ({', '.join(names)})" for collective, names in offered.items())
        raise UsageError(f"there is no collective or algorithm {name!r}; there are: {listed}")
    return [collectives.get(collective, name) for collective in found]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ferro show collective",
        usage="ferro show collective NAME [ALGORITHM] [-n N] [--root R] [--columns C]",
        description="Prove and draw the algorithms of a collective, or all algorithms of one name.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", metavar="NAME", help="a collective, such as all_reduce, or an algorithm, such as ring")
    add("algorithm", metavar="ALGORITHM", nargs="?", help="one algorithm of the collective (default: all)")
    add("-n", "-np", dest="ranks", type=int, default=4, metavar="N", help="ranks (default 4)")
    add("--root", type=int, default=0, metavar="R", help="the root, where there is one (default 0)")
    add("--columns", type=int, default=100, metavar="C", help="width of the picture in characters (default 100)")
    return parser
